from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sweeps import media


def test_strips_show_photo_inversion_and_edits_of_each_person(tmp_path, monkeypatch):
    photos = SimpleNamespace(key=["a", "b"], image=torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 1.0)]))
    edits = {"keys": np.array(["a", "b"]), "inversion": np.full((2, 8, 8, 3), 50, np.uint8)}
    edits["Young"] = np.stack([np.full((2, 8, 8, 3), 60 + s, np.uint8) for s in range(7)])
    monkeypatch.setattr(
        media, "read_description", lambda _: {"split": "test", "strengths": list(range(7)), "attributes": ["Young"]}
    )
    monkeypatch.setattr(media, "read_images", lambda _: iter([edits]))
    made = media.write_strips(tmp_path, tmp_path, SimpleNamespace(loader=lambda split: [photos]), "VOCA")
    assert [key for key, _, _ in made] == ["a", "b"]
    for (_, path, _), photo in zip(made, (0, 255), strict=True):
        pixels = np.asarray(Image.open(path))[media.LABEL_HEIGHT :]
        # Twice the size: photo, inversion, then three strengths that rise to the largest.
        assert [int(value) for value in pixels[0, ::16, 0]] == [photo, 50, 62, 64, 66]
        assert pixels.shape == (16, 5 * 16, 3)


@pytest.mark.parametrize("text", ["VOCA", "VOCA (wav2vec 2.0 for DeepSpeech)"])
def test_labels_fit(text):
    label = media._label(text, 224)
    assert label.shape == (media.LABEL_HEIGHT, 224, 3)
    assert (label[:, 0] == 255).all()
    assert (label[:, -1] == 255).all()
    assert (label < 128).any()
