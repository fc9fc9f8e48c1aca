import pytest
import torch
import torch.nn.functional as F
from torchmetrics.multimodal import CLIPScore as TorchmetricsCLIPScore

from datamodules.errors import UserError
from metrics import alignment


def embeddings(number, dimensions, seed):
    return torch.randn(number, dimensions, generator=torch.Generator().manual_seed(seed))


def numbers(*names):
    return alignment.caption_numbers([*names])


class Stub(torch.nn.Module):
    """Embeds an image by its first pixels and a text by its length, through torchmetrics' interface."""

    def get_image_features(self, pixels):
        return pixels.flatten(1)[:, :4].float()

    def get_text_features(self, lengths, _mask):
        return torch.stack([lengths.float().sum(1), torch.ones(len(lengths)), 2 * torch.ones(len(lengths))] * 2, 1)[
            :, :4
        ]

    @property
    def device(self):
        return torch.device("cpu")

    @property
    def config(self):
        class Config:
            class text_config:  # noqa: N801
                max_position_embeddings = 77

        return Config


def stub_processor(text=None, images=None, **_):
    if images is not None:
        return {"pixel_values": torch.stack(list(images))}
    return {"input_ids": torch.tensor([[len(line)] for line in text]), "attention_mask": torch.ones(len(text), 1)}


def test_clip_score_equals_torchmetrics():
    images = torch.randint(0, 255, (5, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    captions = ["a", "a man", "a woman with glasses", "old", "young"]
    theirs = TorchmetricsCLIPScore(lambda: (Stub(), stub_processor))
    theirs.update(list(images), captions)
    stub = Stub()
    image = stub.get_image_features(images)
    text = stub.get_text_features(torch.tensor([[len(line)] for line in captions]), None)
    ours = alignment.CLIPScore()
    ours.update(image[:2], text[:2])
    ours.update(image[2:], text[2:])
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_variants_by_hand():
    image, text = torch.tensor([[1.0, 0], [0, 2.0]]), torch.tensor([[3.0, 4.0], [0, -1.0]])
    assert alignment.clip_score(image, text).tolist() == pytest.approx([60, 0])
    assert alignment.clip_score(image, text, "raw").tolist() == pytest.approx([0.6, -1])


def test_r_precision_by_hand():
    # Each image is its own caption's embedding but the last, which is the first's.
    text = torch.eye(4)
    image = text[[0, 1, 2, 0]]
    found = alignment.r_precision(image, text, numbers("a", "b", "c", "d"), candidates=4)
    assert found.tolist() == [1, 1, 1, 0]


def test_equal_captions_are_no_distractors():
    text = torch.eye(3)[[0, 0, 1, 2]]
    caption = numbers("a man", "A man ", "b", "c")
    assert alignment.r_precision(text, text, caption, candidates=3).tolist() == [1, 1, 1, 1]
    assert alignment.batch_r_precision(text, text, caption, 4).tolist() == [1, 1, 1, 1]
    with pytest.raises(UserError, match="3 different captions, but 4 candidates"):
        alignment.r_precision(text, text, caption, candidates=4)


def test_ties_are_misses():
    same = torch.ones(4, 2)
    assert alignment.r_precision(same, same, numbers(*"abcd"), candidates=4).sum() == 0
    assert alignment.batch_r_precision(same, same, numbers(*"abcd"), 4).sum() == 0


def test_batches_by_brute_force_and_without_the_rest():
    image, text = embeddings(25, 3, 0), embeddings(25, 3, 1)
    found = alignment.batch_r_precision(image, text, torch.arange(25), 10)
    expected = []
    for i in range(20):
        batch = range(i // 10 * 10, i // 10 * 10 + 10)
        cosines = [F.cosine_similarity(image[i], text[j], dim=0).item() for j in batch]
        expected.append(float(cosines.index(max(cosines)) == i % 10))
    assert found.tolist() == expected
    with pytest.raises(UserError, match="5 images, but a batch has 10"):
        alignment.batch_r_precision(image[:5], text[:5], torch.arange(5), 10)


def test_random_embeddings_find_their_caption_by_chance():
    found = alignment.r_precision(embeddings(3000, 8, 2), embeddings(3000, 8, 3), torch.arange(3000), candidates=10)
    assert found.mean().item() == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 3000) ** 0.5)


@pytest.mark.parametrize("style", ["drawn", "batches"])
def test_class_does_not_depend_on_the_order_of_images(style):
    image = embeddings(40, 4, 4)
    text = image + embeddings(40, 4, 5)
    captions, order = [f"face {i}" for i in range(40)], torch.randperm(40)
    values = []
    for positions in (torch.arange(40), order, torch.cat([order, order[:3]])):
        metric = alignment.RPrecision(style, candidates=10)
        for part in positions.split(7):
            metric.update(image[part], text[part], [captions[i] for i in part], part)
        values.append(metric.compute().item())
    assert values[0] == values[1] == values[2]
    assert 0 < values[0] < 1
