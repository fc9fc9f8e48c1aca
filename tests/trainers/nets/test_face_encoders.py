from urllib.error import URLError

import lpips
import pytest
import torch
import torch.nn.functional as F
import torchvision

from datamodules.errors import UserError
from trainers.nets import face_encoders
from trainers.nets.face_encoders import AttributeClassifier, IdentityEncoder, PerceptualDistance, load_imagenet, trunk


def parameters(network) -> int:
    return sum(p.numel() for p in network.parameters())


def refuse_download(*args, **kwargs):
    raise URLError("no network")


@pytest.mark.parametrize(
    ("architecture", "width"), [("resnet10", 8), ("resnet34", 64), ("resnet50", 64), ("vgg8", 8), ("iresnet10", 8)]
)
def test_every_stage_halves_the_resolution(architecture, width):
    stages, channels, stride = trunk(architecture, width)
    x = torch.zeros(1, 3, 64, 64)
    for i, stage in enumerate(stages.eval()):
        x = stage(x)
        assert x.shape == (1, channels[i], 64 // stride << (3 - i), 64 // stride << (3 - i))


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_torchvision_stages_are_torchvision(name):
    torch.manual_seed(0)
    reference = torchvision.models.get_model(name).eval()
    stages = face_encoders._torchvision_stages(reference)
    image = torch.randn(2, 3, 64, 64)
    features = stages(image).mean((2, 3))
    torch.testing.assert_close(reference.fc(features), reference(image))


def test_iresnet_has_the_size_of_the_official_one():
    # insightface's model zoo: IResNet-34 34.14 M and IResNet-50 43.59 M parameters with a 512-d embedding at 112 px.
    assert parameters(IdentityEncoder(architecture="iresnet34")) == pytest.approx(34.14e6, rel=2e-3)
    assert parameters(IdentityEncoder(architecture="iresnet50")) == pytest.approx(43.59e6, rel=2e-3)


def test_unknown_architecture_and_wrong_width():
    with pytest.raises(UserError, match=r"'alexnet'.*expected one of resnet10"):
        trunk("alexnet")
    with pytest.raises(UserError, match="32, but resnet34 is 64 wide"):
        trunk("resnet34", 32)


def test_classifier_resizes_and_keeps_names():
    network = AttributeClassifier(["Male", "Young"], "resnet10", 8, head_layers=0, size=32).eval()
    image = torch.rand(3, 3, 64, 64) * 2 - 1
    assert network.attributes == ["Male", "Young"]
    small = F.interpolate(image, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(network(image), network(small))
    assert network(image).shape == (3, 2)


def test_heads_of_the_paper():
    heads = AttributeClassifier(["a", "b"], "resnet34").heads
    linear_and_norm = (512 * 512 + 512) + 2 * 512
    assert [parameters(head) for head in heads] == [3 * linear_and_norm + 513] * 2


def test_identity_vectors_are_unit_and_see_only_the_crop():
    network = IdentityEncoder(16, "resnet10", 8, size=32, crop=(0.25, 0.25, 0.5)).eval()
    image = torch.rand(2, 3, 64, 64)
    vectors = network(image)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    image[..., :16, :] = 0
    image[..., 48:] = 0
    torch.testing.assert_close(network(image), vectors)
    image[..., 16:20, 16:20] = 5
    assert not torch.allclose(network(image), vectors)


def test_perceptual_distance_is_the_formula_of_lpips():
    network = PerceptualDistance("resnet10", 8, 32).eval()
    a, b = torch.randn(2, 4, 3, 32, 32)
    expected, x, y = torch.zeros(4, 1, 1, 1), a, b
    for stage in network.stages:
        x, y = stage(x), stage(y)
        difference = (lpips.normalize_tensor(x) - lpips.normalize_tensor(y)) ** 2
        expected = expected + lpips.spatial_average(difference.sum(1, keepdim=True))
    torch.testing.assert_close(network(a, b), expected.flatten(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network(a, a), torch.zeros(4))


def test_lpips_is_the_package(monkeypatch):
    torch.manual_seed(0)
    reference = lpips.LPIPS(net="alex", verbose=False, pnet_rand=True)
    monkeypatch.setattr(lpips, "LPIPS", lambda net, verbose: reference)
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    torch.testing.assert_close(PerceptualDistance.from_hub("lpips-alex")(a, b), reference(a, b)[:, 0, 0, 0])


def test_offline_says_what_to_do(monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse_download)
    with pytest.raises(UserError, match=r"lpips-vgg.*cannot be downloaded.*demo:perceptual"):
        PerceptualDistance.from_hub("lpips-vgg")
    with pytest.raises(UserError, match=r"resnet34 weights.*imagenet: false"):
        load_imagenet(trunk("resnet34").stages, "resnet34")
    with pytest.raises(UserError, match="no ImageNet weights for 'vgg8'"):
        load_imagenet(trunk("vgg8", 8).stages, "vgg8")


@pytest.mark.parametrize("network", [AttributeClassifier, IdentityEncoder, PerceptualDistance])
def test_unknown_hub_name(network):
    with pytest.raises(UserError, match="hub:nothing"):
        network.from_hub("nothing")
