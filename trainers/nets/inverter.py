"""Inversion encoder: a face photo to the W+ code of a StyleGAN2 generator.

After Tov et al., "Designing an Encoder for StyleGAN Image Manipulation" (e4e), SIGGRAPH 2021: a feature pyramid,
one small convolutional head per generator layer, and a code that is *one* vector of W plus an offset per layer.
Training keeps the offsets small, so that codes stay near W, where edits work (section 3 of the paper).

Differences: the trunk is any :func:`trainers.nets.face_encoders.trunk` (e4e: IR-SE50, that is, IResNet-50 with
squeeze-and-excitation); heads may be narrower than the codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.errors import UserError
from trainers.nets.face_encoders import resize, trunk


class StyleHead(nn.Module):
    """One vector from a feature map: stride-2 convolutions down to one position, then Linear.

    Args:
        side: the map's height and width.
        width: its channels.
        dim: D of the vector.
    """

    def __init__(self, side: int, width: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while side > 1:
            layers += [nn.Conv2d(width, width, 3, 2, 1), nn.LeakyReLU(0.2)]
            side = (side + 1) // 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, dim))

    def forward(self, features: Tensor) -> Tensor:
        """(B, width, side, side) -> (B, dim)."""
        return self.layers(features)


class InversionEncoder(nn.Module):
    """Image -> W+ code: mean code + one shared vector + an offset for every layer but the first.

    Layers 0-2 read the coarsest feature map, 3-6 the middle one, the others the finest, as in e4e.

    Args:
        num_layers: L, the number of codes the generator takes.
        dim: D of a code.
        architecture, width: of the trunk, see :func:`trainers.nets.face_encoders.trunk`.
        head_width: channels of the pyramid and the heads; e4e has 512.
        size: the image size in pixels it is trained at.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        architecture: str = "iresnet50",
        width: int = 64,
        head_width: int = 512,
        size: int = 256,
    ) -> None:
        super().__init__()
        self.size = size
        self.stages, channels, stride = trunk(architecture, width)
        self.lateral = nn.ModuleList(nn.Conv2d(c, head_width, 1) for c in reversed(channels[1:]))
        self.level = [0 if i < 3 else 1 if i < 7 else 2 for i in range(num_layers)]
        self.heads = nn.ModuleList(StyleHead((size // stride) << i, head_width, dim) for i in self.level)
        self.w_avg: Tensor
        self.register_buffer("w_avg", torch.zeros(dim))

    @classmethod
    def from_hub(cls, name: str) -> nn.Module:
        """No hub has an encoder for these generators.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"backbone 'hub:{name}': an inversion encoder belongs to one generator; train it with "
            "'facebench fit --config configs/systems/inverter.yaml' and give it as path:<file>"
        )

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, L, D) float32 codes."""
        shared, offsets = self.components(image)
        return self.w_avg + shared[:, None] + offsets

    def components(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of a code.

        Returns:
            shared: (B, D) float32, relative to the mean code.
            offsets: (B, L, D) float32, zero for the first layer.
        """
        pyramid = self._pyramid(resize(image, self.size))
        codes = torch.stack([head(pyramid[i]) for head, i in zip(self.heads, self.level, strict=True)], 1)
        codes = codes.float()
        return codes[:, 0], torch.cat([torch.zeros_like(codes[:, :1]), codes[:, 1:]], 1)

    def _pyramid(self, image: Tensor) -> list[Tensor]:
        """Feature maps of one width, coarsest first, each with what the coarser ones saw added."""
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        pyramid = [self.lateral[0](maps[-1])]
        for lateral, finer in zip(self.lateral[1:], reversed(maps[1:-1]), strict=True):
            pyramid.append(lateral(finer) + F.interpolate(pyramid[-1], scale_factor=2, mode="bilinear"))
        return pyramid
