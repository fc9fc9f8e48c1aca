import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from cleanfid.resize import build_resizer
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_pil_image
from transformers import (
    CLIPModel,
    CLIPProcessor,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from datamodules.errors import UserError
from trainers import backbones
from trainers.nets.extractors import to_bytes


class TinyInception(nn.Module):
    """The outline of the published TorchScript network: ``layers`` gives 2,048 features of a 299-pixel image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2048))

    def forward(self, image):
        return self.layers(image)


@pytest.fixture
def inception(tmp_path):
    torch.manual_seed(0)
    network = TinyInception()
    torch.jit.script(network).save(str(tmp_path / "inception-2015-12-05.pt"))
    return f"path:{tmp_path}/inception-2015-12-05.pt", network


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 52, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_inception_sees_what_clean_fid_shows_it(inception, images):
    spec, network = inception
    resize = build_resizer("clean")
    shown = torch.stack([torch.from_numpy(resize(image.permute(1, 2, 0).numpy())) for image in to_bytes(images)])
    expected = network.layers((shown.permute(0, 3, 1, 2) - 128) / 128)
    torch.testing.assert_close(backbones.load(spec, "features").features(images), expected, rtol=1e-5, atol=1e-6)
    assert len(backbones.weight_hash(spec)) == 64


def test_inception_that_cannot_be_had(tmp_path):
    with pytest.raises(UserError, match="no such weights; clean-fid downloads it"):
        backbones.load(f"path:{tmp_path}/inception-2015-12-05.pt", "features")
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match="not a TorchScript network"):
        backbones.load(f"path:{tmp_path}/inception-2015-12-05.pt", "features")
    (tmp_path / "other.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"other.pt: expected the TorchScript network inception-2015-12-05.pt"):
        backbones.load(f"path:{tmp_path}/other.pt", "features")
    with pytest.raises(UserError, match="unknown feature extractor; expected path:"):
        backbones.load("hub:vgg16", "features")


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
@pytest.mark.parametrize("name", ["inception-torchmetrics", "inception-torch-fidelity"])
def test_variants_say_what_they_need(name):
    with pytest.raises(UserError, match=f"'hub:{name}': needs the package torch-fidelity; pip install"):
        backbones.load(f"hub:{name}", "features")


def test_features_of_an_attribute_classifier(tiny, images):
    classifier = backbones.load(tiny["attributes"], "attributes")
    extractor = backbones.load(tiny["attributes"], "features")
    assert torch.equal(extractor.features(images), classifier.features(images))
    assert torch.equal(classifier.classify(classifier.features(images)), classifier(images))
    with pytest.raises(UserError, match="weights of kind 'identity', expected 'features'"):
        backbones.load(tiny["identity"], "features")


@torch.no_grad()
def test_clip_embeds_as_transformers_does(clip_folder, images):
    encoder = backbones.load(f"path:{clip_folder}", "clip")
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    captions = ["a man", "an old woman with very long hair"]
    pictures: list[Image.Image] = [to_pil_image(image) for image in to_bytes(images)]
    for i, picture in enumerate(pictures):
        inputs = processor(images=picture, return_tensors="pt")
        expected = model.visual_projection(model.vision_model(**inputs).pooler_output)
        torch.testing.assert_close(encoder.encode_image(images)[i : i + 1], expected, rtol=1e-4, atol=1e-5)
    embeddings = encoder.encode_text(captions)
    for caption, embedding in zip(captions, embeddings, strict=True):  # the padding of a batch changes nothing
        inputs = processor(text=[caption], return_tensors="pt", truncation=True)
        expected = model.text_projection(model.text_model(**inputs).pooler_output)[0]
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)
    assert F.cosine_similarity(embeddings[:1], embeddings[1:]).item() < 0.9999
    assert len(backbones.weight_hash(f"path:{clip_folder}")) == 64


def test_clip_that_cannot_be_had(tmp_path, clip_folder):
    with pytest.raises(UserError, match=r"'hub:nobody/clip': no CLIP model .* 'hf download"):
        backbones.load("hub:nobody/clip", "clip")
    with pytest.raises(UserError, match="no such weights"):
        backbones.load(f"path:{tmp_path}", "clip")
    (tmp_path / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="no CLIP model there"):
        backbones.load(f"path:{tmp_path}", "clip")


@pytest.fixture
def parser_folder(tmp_path):
    """A tiny SegFormer with random weights."""
    sizes = {"hidden_sizes": [8] * 4, "decoder_hidden_size": 8, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    names = {0: "background", 1: "skin", 2: "nose"}
    torch.manual_seed(0)
    model = SegformerForSemanticSegmentation(SegformerConfig(**sizes, id2label=names))
    model.save_pretrained(tmp_path / "parser")
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "parser")
    return tmp_path / "parser"


@torch.no_grad()
def test_faces_are_parsed_as_transformers_does(parser_folder, images):
    parser = backbones.load(f"path:{parser_folder}", "parser")
    model = SegformerForSemanticSegmentation.from_pretrained(parser_folder).eval()
    processor = SegformerImageProcessor.from_pretrained(parser_folder)
    found = parser(images)
    assert parser.parts == ["background", "skin", "nose"]
    for image, parts in zip(images, found, strict=True):
        logits = model(**processor(images=to_pil_image(to_bytes(image)), return_tensors="pt"))
        (expected,) = processor.post_process_semantic_segmentation(logits, [(40, 52)])
        assert (parts == expected).float().mean() > 0.999
    assert len(found.unique()) > 1


def test_a_parser_that_cannot_be_had(tmp_path, clip_folder):
    with pytest.raises(UserError, match=r"'hub:nobody/parser': no SegFormer .* 'hf download"):
        backbones.load("hub:nobody/parser", "parser")
    with pytest.raises(UserError, match="SegFormer"):
        backbones.load(f"path:{clip_folder}", "parser")


def test_landmarks_need_dlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(UserError, match=r"dlib is missing; pip install 'facebench\[dlib\]'"):
        backbones.load("hub:dlib-68", "landmarks")
    with pytest.raises(UserError, match="expected hub:dlib-68"):
        backbones.load("hub:mediapipe", "landmarks")
    with pytest.raises(UserError, match="no such weights; dlib publishes it"):
        backbones.load(f"path:{tmp_path}/shape_predictor_68_face_landmarks.dat", "landmarks")
