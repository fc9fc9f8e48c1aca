"""Networks that look at a face: attribute classifiers, identity encoders and a perceptual distance.

They come in pairs of different architecture and training, one to guide a system's training and one to judge its
result. All take images (B, 3, H, W) float32 in [-1, 1] of any size and resize them to the size they were trained
at.

The paper-scale shapes follow what AdaTrans (ICCV 2023) used: a ResNet-34 with one three-layer head per attribute,
and an IResNet with the ArcFace embedding head (Deng et al., "ArcFace", CVPR 2019, section 3.2.2). ``resnet10``,
``iresnet10`` and ``vgg8`` are narrow versions for images of 64 pixels.
"""

from itertools import pairwise
from typing import NamedTuple
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, resnet34, resnet50
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

from datamodules.errors import UserError
from metrics.perceptual import perceptual_distance


class Trunk(NamedTuple):
    """Four convolutional stages, each halving the resolution of the one before.

    Attributes:
        stages: to be applied one after the other.
        channels: of each stage's output.
        stride: by how much the last output is smaller than the image.
    """

    stages: nn.Sequential
    channels: list[int]
    stride: int


def trunk(architecture: str, width: int = 64) -> Trunk:
    """Builds a trunk.

    Args:
        architecture: ``resnet34`` or ``resnet50`` (torchvision's, 64 wide); ``resnet10`` (one basic block per
            stage); ``iresnet10``, ``iresnet34``, ``iresnet50`` (ArcFace's improved residual blocks); ``vgg8``
            (1, 1, 2 and 2 plain convolutions).
        width: channels of the first stage, doubled by every following one.

    Raises:
        UserError: another architecture, or a width that torchvision's ResNets do not have.
    """
    channels = [width, 2 * width, 4 * width, 8 * width]
    if architecture in _TORCHVISION:
        if width != 64:
            raise UserError(f"width: {width}, but {architecture} is 64 wide; use resnet10 for a narrow network")
        network = _TORCHVISION[architecture]()
        return Trunk(_torchvision_stages(network), [c * network.layer1[0].expansion for c in channels], 32)
    if architecture == "resnet10":
        return Trunk(_resnet10(channels), channels, 16)
    if architecture == "vgg8":
        return Trunk(_vgg8(channels), channels, 16)
    if architecture in _IRESNET_DEPTHS:
        return Trunk(_iresnet(_IRESNET_DEPTHS[architecture], channels), channels, 16)
    known = ", ".join(["resnet10", *_TORCHVISION, "vgg8", *_IRESNET_DEPTHS])
    raise UserError(f"architecture '{architecture}': expected one of {known}")


_TORCHVISION = {"resnet34": resnet34, "resnet50": resnet50}
_IRESNET_DEPTHS = {"iresnet10": (1, 1, 1, 1), "iresnet34": (3, 4, 6, 3), "iresnet50": (3, 4, 14, 3)}


def load_imagenet(stages: nn.Sequential, architecture: str) -> None:
    """Starts ``resnet34`` or ``resnet50`` stages from torchvision's ImageNet weights.

    Raises:
        UserError: an architecture without such weights, or weights that can neither be found nor downloaded.
    """
    if architecture not in _TORCHVISION:
        raise UserError(f"imagenet: no ImageNet weights for '{architecture}'; use one of {', '.join(_TORCHVISION)}")
    try:
        network = _TORCHVISION[architecture](weights="IMAGENET1K_V1")
    except (URLError, OSError) as error:
        raise UserError(
            f"imagenet: torchvision's {architecture} weights are not in {torch.hub.get_dir()}/checkpoints and "
            "cannot be downloaded; copy them there from a machine with network, or set imagenet: false"
        ) from error
    stages.load_state_dict(_torchvision_stages(network).state_dict())


def _torchvision_stages(network: ResNet) -> nn.Sequential:
    stem = (network.conv1, network.bn1, network.relu, network.maxpool)
    return nn.Sequential(nn.Sequential(*stem, network.layer1), network.layer2, network.layer3, network.layer4)


def _resnet10(channels: list[int]) -> nn.Sequential:
    """One basic block per stage after a 3x3 stem of stride 2, for images too small for a 7x7 one and pooling."""
    stem = nn.Sequential(
        nn.Conv2d(3, channels[0], 3, 2, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU(inplace=True)
    )
    stages = [nn.Sequential(stem, BasicBlock(channels[0], channels[0]))]
    for before, after in pairwise(channels):
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after))
        stages.append(nn.Sequential(BasicBlock(before, after, 2, shortcut)))
    return nn.Sequential(*stages)


def _vgg8(channels: list[int]) -> nn.Sequential:
    """Plain convolutions with batch normalisation, each stage ended by max pooling."""
    a, b, c, d = channels
    layers = make_layers([a, "M", b, "M", c, c, "M", d, d, "M"], batch_norm=True)
    ends = [i + 1 for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    return nn.Sequential(*(layers[start:end] for start, end in pairwise([0, *ends])))


class ImprovedBlock(nn.Module):
    """ArcFace's residual block: BN-Conv-BN-PReLU-Conv-BN, the second convolution strided."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.Conv2d(before, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.PReLU(after),
            nn.Conv2d(after, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """(B, before, H, W) -> (B, after, H / stride, W / stride)."""
        return self.shortcut(x) + self.residual(x)


def _iresnet(depths: tuple[int, ...], channels: list[int]) -> nn.Sequential:
    stem = nn.Sequential(
        nn.Conv2d(3, channels[0], 3, 1, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.PReLU(channels[0])
    )
    stages, before = [], channels[0]
    for depth, after in zip(depths, channels, strict=True):
        blocks = [ImprovedBlock(before, after, 2)] + [ImprovedBlock(after, after, 1) for _ in range(depth - 1)]
        stages.append(nn.Sequential(*blocks))
        before = after
    stages[0].insert(0, stem)
    return nn.Sequential(*stages)


def resize(image: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size), bilinear with antialiasing; untouched at that size already."""
    if image.shape[-2:] == (size, size):
        return image
    return F.interpolate(image, (size, size), mode="bilinear", antialias=True)


class AttributeClassifier(nn.Module):
    """Says of each attribute whether a face has it.

    Args:
        attributes: their names, in the order of the logits.
        architecture, width: see :func:`trunk`.
        head_layers: Linear-BN-ReLU layers of an attribute's head before its last Linear. AdaTrans has 3.
        head_width: their width.
        size: the image size in pixels it is trained at.
    """

    def __init__(
        self,
        attributes: list[str],
        architecture: str = "resnet34",
        width: int = 64,
        head_layers: int = 3,
        head_width: int = 512,
        size: int = 256,
    ) -> None:
        super().__init__()
        self.attributes = attributes
        self.size = size
        self.stages, channels, _ = trunk(architecture, width)
        self.heads = nn.ModuleList(_head(channels[-1], head_width, head_layers) for _ in attributes)

    @classmethod
    def from_hub(cls, name: str) -> nn.Module:
        """No hub has a classifier of these attributes.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"backbone 'hub:{name}': there is no public attribute classifier; train one with "
            "'facebench fit --config configs/systems/attributes.yaml' and give it as path:<file>"
        )

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, A) logits."""
        return self.classify(self.features(image))

    def classify(self, features: Tensor) -> Tensor:
        """What :meth:`features` gives -> (B, A) logits."""
        return torch.cat([head(features) for head in self.heads], 1)

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, d), the last stage averaged over positions."""
        return self.stages(resize(image, self.size)).mean((2, 3))


def _head(channels: int, width: int, layers: int) -> nn.Sequential:
    head: list[nn.Module] = []
    for _ in range(layers):
        head += [nn.Linear(channels, width), nn.BatchNorm1d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*head, nn.Linear(channels, 1))


class IdentityEncoder(nn.Module):
    """Maps a face to a unit vector; the cosine of two tells how alike the two persons are.

    The head is ArcFace's: BN-Dropout-Linear-BN on the flattened last feature map.

    Args:
        dim: d of the vectors.
        architecture, width: see :func:`trunk`.
        dropout: of the head, in training.
        size: the image size in pixels it is trained at.
        crop: (top, left, side) of the square that is cut out first, as shares of the image's side; AdaTrans cuts
            188 pixels at row 35, column 32 of 256.
    """

    def __init__(
        self,
        dim: int = 512,
        architecture: str = "iresnet50",
        width: int = 64,
        dropout: float = 0.0,
        size: int = 112,
        crop: tuple[float, float, float] = (0.0, 0.0, 1.0),
    ) -> None:
        super().__init__()
        self.size = size
        self.crop = crop
        self.stages, channels, stride = trunk(architecture, width)
        self.head = nn.Sequential(
            nn.BatchNorm2d(channels[-1]),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(channels[-1] * (size // stride) ** 2, dim),
            nn.BatchNorm1d(dim),
        )

    @classmethod
    def from_hub(cls, name: str) -> nn.Module:
        """``dlib``: the 128-d descriptor of dlib, from the optional packages of the extra ``dlib``.

        Raises:
            UserError: another name, or the extra is not installed.
        """
        if name != "dlib":
            raise UserError(f"backbone 'hub:{name}': expected hub:dlib, or your own weights as path:<file>")
        from trainers.nets.dlib_judge import DlibIdentity

        return DlibIdentity()

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, d) unit vectors."""
        return F.normalize(self.head(self.stages(self._prepare(image))).float(), dim=1)

    def _prepare(self, image: Tensor) -> Tensor:
        top, left, side = (round(share * image.shape[-1]) for share in self.crop)
        return resize(image[..., top : top + side, left : left + side], self.size)


class PerceptualDistance(nn.Module):
    """Distance of two images in the features of a trained network.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (LPIPS), CVPR 2018,
    equation 1 with all channel weights 1: squared differences of channel-normalised features, summed over
    channels, averaged over positions, summed over stages. The demo weights are the stages of the guiding
    attribute classifier, so this is *not* LPIPS and its values do not compare with LPIPS values; LPIPS itself
    is ``hub:lpips-alex`` or ``hub:lpips-vgg``.

    Args:
        architecture, width: see :func:`trunk`.
        size: the image size in pixels the network was trained at.
    """

    def __init__(self, architecture: str, width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.stages = trunk(architecture, width).stages

    @classmethod
    def from_hub(cls, name: str) -> nn.Module:
        """``lpips-alex`` or ``lpips-vgg``: LPIPS 0.1 of the ``lpips`` package.

        Raises:
            UserError: another name, or the ImageNet trunk can neither be found nor downloaded.
        """
        if name not in ("lpips-alex", "lpips-vgg"):
            raise UserError(f"backbone 'hub:{name}': expected hub:lpips-alex or hub:lpips-vgg")
        return LPIPS.pretrained(name.removeprefix("lpips-"))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [-1, 1] -> (B,) distances."""
        return self.between(self.layers(first), self.layers(second))

    def layers(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the output of every stage, (B, C, h, w)."""
        x, outputs = resize(image, self.size), []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x.float())
        return outputs

    def between(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """The layers of two batches of images -> (B,) distances."""
        return perceptual_distance(first, second)


class LPIPS(nn.Module):
    """LPIPS 0.1 with the ``lpips`` package's trunk and heads; the layers of an image can be used for many pairs.

    Args:
        network: the package's module.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.lpips = network

    @classmethod
    def pretrained(cls, net: str) -> "LPIPS":
        """The official weights.

        Args:
            net: ``alex`` or ``vgg``.

        Raises:
            UserError: torchvision's weights of that network can neither be found nor downloaded.
        """
        import lpips

        try:
            return cls(lpips.LPIPS(net=net, verbose=False))
        except (URLError, OSError) as error:
            raise UserError(
                f"backbone 'hub:lpips-{net}': torchvision's ImageNet weights are not in "
                f"{torch.hub.get_dir()}/checkpoints and cannot be downloaded; copy them there from a machine with "
                "network, or use demo:perceptual"
            ) from error

    @property
    def heads(self) -> list[Tensor]:
        """The weight of every layer's channels, (C,)."""
        return [head.model[-1].weight.flatten() for head in self.lpips.lins]  # type: ignore[union-attr]

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [-1, 1] -> (B,) distances."""
        return self.between(self.layers(first), self.layers(second))

    def layers(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the output of every layer, (B, C, h, w)."""
        return list(self.lpips.net(self.lpips.scaling_layer(image)))  # type: ignore[operator]

    def between(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """The layers of two batches of images -> (B,) distances."""
        return perceptual_distance(first, second, self.heads)
