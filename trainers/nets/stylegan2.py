"""StyleGAN2's generator and discriminator in plain PyTorch.

Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", CVPR 2020, in the form of the official
PyTorch code: the same computations, parameter scales and state-dict keys (`from_official` drops the filter
buffers, which are constants here), without its CUDA extensions.

Deliberate differences, none of which changes a result beyond rounding:

* A modulated convolution scales the activations before a shared convolution and demodulates after it, where the
  usual fused form builds one set of weights per sample and convolves in groups (slow everywhere but on CUDA).
* The gain of a leaky ReLU is multiplied into the factors and terms before it: ``g * lrelu(x) = lrelu(g * x)``.
* A filter followed by a 1x1 convolution (the discriminator's skip branch) is one 4x4 convolution.
* Under autocast only the convolutions from 8x8 up run in the autocast type. The mapping network, modulation and
  demodulation coefficients, RGB sums and the discriminator's last block stay in float32.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NoiseMode = Literal["random", "const", "none"]

SLOPE = 0.2
GAIN = math.sqrt(2)
RESAMPLE_FILTER = (1, 3, 3, 1)


def from_official(state_dict: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Turns an official state dict (``G``, ``G_ema`` or ``D``) into one that loads strictly here.

    Args:
        state_dict: official names to tensors.
        prefix: keep only the names that start with it, and cut it off (``"G."`` where both networks share a file).
    """
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state_dict.items()
        if name.startswith(prefix) and not name.endswith("resample_filter")
    }


def channels_at(resolution: int, channel_base: int, channel_max: int) -> int:
    """Feature maps of the layers at one resolution."""
    return min(channel_base // resolution, channel_max)


def block_resolutions(resolution: int) -> list[int]:
    """``[4, 8, ..., resolution]``.

    Raises:
        ValueError: not a power of two of at least 8.
    """
    if resolution < 8 or resolution & (resolution - 1):
        raise ValueError(f"resolution {resolution} is not a power of two of at least 8")
    return [2**i for i in range(2, resolution.bit_length())]


def convolution_dtype(x: Tensor) -> torch.dtype:
    """The autocast type where autocast is on, else float32."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


def normalize_second_moment(x: Tensor) -> Tensor:
    """Scales each row of ``x: (B, C)`` to a mean square of one."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


class Resample(nn.Module):
    """A separable low-pass filter for changing the resolution by two.

    Args:
        taps: the symmetric one-dimensional filter; of even length, so that it is centred between pixels.
    """

    kernel: Tensor

    def __init__(self, taps: Sequence[float] = RESAMPLE_FILTER) -> None:
        super().__init__()
        row = torch.tensor(taps, dtype=torch.float32)
        row = row / row.sum()
        self.register_buffer("kernel", torch.outer(row, row), persistent=False)
        self.pad = len(taps) // 2

    def blur(self, x: Tensor, padding: int, gain: float = 1) -> Tensor:
        """Filters every channel without changing the resolution."""
        return F.conv2d(x, self._per_channel(x, gain), padding=padding, groups=x.shape[1])

    def up(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W), keeping the mean."""
        weight = self._per_channel(x, gain=4)
        return F.conv_transpose2d(x, weight, stride=2, padding=self.pad - 1, groups=x.shape[1])

    def down(self, x: Tensor) -> Tensor:
        """(B, C, 2H, 2W) to (B, C, H, W), keeping the mean."""
        return F.conv2d(x, self._per_channel(x, gain=1), stride=2, padding=self.pad - 1, groups=x.shape[1])

    def _per_channel(self, x: Tensor, gain: float) -> Tensor:
        return (self.kernel * gain).to(x.dtype).expand(x.shape[1], 1, -1, -1)


def convolve(x: Tensor, weight: Tensor, resample: Resample, up: bool = False, down: bool = False) -> Tensor:
    """A convolution that may change the resolution by two, filtered against aliasing.

    Args:
        x: (B, I, H, W).
        weight: (O, I, k, k), k odd; used in the type of `x`.
        resample: the low-pass filter.
        up: double the resolution.
        down: halve the resolution.
    """
    half = weight.shape[-1] // 2
    if down and half == 0:
        folded = (weight * resample.kernel).to(x.dtype)
        return F.conv2d(x, folded, stride=2, padding=resample.pad - 1)
    weight = weight.to(x.dtype)
    if up and half == 0:
        return resample.up(F.conv2d(x, weight))
    if up:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        return resample.blur(x, padding=resample.pad - half, gain=4)
    if down:
        return F.conv2d(resample.blur(x, padding=resample.pad - 1 + half), weight, stride=2)
    return F.conv2d(x, weight, padding=half)


def activate(x: Tensor, gain: float, clamp: float | None) -> Tensor:
    """Leaky ReLU of an input that already carries `gain`, clamped in proportion to it."""
    x = F.leaky_relu(x, SLOPE)
    return x if clamp is None else x.clamp(-clamp * gain, clamp * gain)


class FullyConnected(nn.Module):
    """A linear layer with an equalised learning rate.

    Args:
        inputs: input features.
        outputs: output features.
        activation: apply leaky ReLU with gain sqrt(2).
        lr_multiplier: the weights learn this many times as fast as others.
        bias_init: initial bias.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        activation: bool = False,
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), bias_init))
        self.activation = activation
        self.weight_gain = lr_multiplier / math.sqrt(inputs)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) to (B, outputs)."""
        x = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return F.leaky_relu(x, SLOPE) * GAIN if self.activation else x


class Convolution(nn.Module):
    """A plain convolution with an equalised learning rate, as the discriminator and skip branches use it.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel_size: odd.
        bias: add one and apply leaky ReLU; the skip branches have neither.
        up: double the resolution.
        down: halve the resolution.
        resample_filter: taps of the filter used for `up` and `down`.
        clamp: limit the output to this range (of a unit gain).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = RESAMPLE_FILTER,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.up, self.down, self.clamp = up, down, clamp
        self.weight_gain = 1 / math.sqrt(inputs * kernel_size**2)
        self.resample = Resample(resample_filter)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H', W'), scaled by `gain`."""
        if self.bias is None:
            return convolve(x, self.weight * (self.weight_gain * gain), self.resample, self.up, self.down)
        gain = gain * GAIN
        x = convolve(x, self.weight * (self.weight_gain * gain), self.resample, self.up, self.down)
        x = x + (self.bias * gain).to(x.dtype)[:, None, None]
        return activate(x, gain, self.clamp)


class MappingNetwork(nn.Module):
    """Maps a latent and a label to intermediate latents w.

    Args:
        z_dim: latent size; 0 for the discriminator's, which sees only the label.
        c_dim: label size, 0 without labels.
        w_dim: size of w.
        num_ws: how often w is repeated for the synthesis layers; None: not repeated, and no average is kept.
        num_layers: fully connected layers.
        lr_multiplier: of their learning rate.
        w_avg_beta: decay of the running average of w, which truncation draws towards.
    """

    w_avg: Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        lr_multiplier: float = 0.01,
        w_avg_beta: float = 0.998,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.num_layers, self.w_avg_beta = num_layers, w_avg_beta
        if c_dim:
            self.embed = FullyConnected(c_dim, w_dim)
        sizes = [z_dim + (w_dim if c_dim else 0)] + [w_dim] * num_layers
        for i in range(num_layers):
            layer = FullyConnected(sizes[i], sizes[i + 1], activation=True, lr_multiplier=lr_multiplier)
            self.add_module(f"fc{i}", layer)
        if num_ws is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_average: bool = False,
    ) -> Tensor:
        """Maps to w.

        Args:
            z: (B, z_dim), standard normal; None where z_dim is 0.
            c: (B, c_dim), one-hot or continuous; None where c_dim is 0.
            truncation_psi: 1 keeps w, 0 gives the average.
            truncation_cutoff: truncate only this many of the first layers; None: all.
            update_average: let this batch move the running average.

        Returns:
            (B, num_ws, w_dim), or (B, w_dim) where num_ws is None; float32.
        """
        parts = []
        source = z if z is not None else c
        assert source is not None, "a mapping network needs z or c"
        with torch.autocast(source.device.type, enabled=False):
            if z is not None and self.z_dim:
                parts.append(normalize_second_moment(z.float()))
            if self.c_dim:
                if c is None:
                    raise ValueError(f"this network is conditional: give labels of shape (B, {self.c_dim})")
                parts.append(normalize_second_moment(self.embed(c.float())))
            w = torch.cat(parts, dim=1)
            for i in range(self.num_layers):
                w = self.get_submodule(f"fc{i}")(w)
            if update_average:
                self.w_avg.copy_(w.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
            if self.num_ws is None:
                return w
            ws = w.unsqueeze(1).repeat(1, self.num_ws, 1)
            return self.truncate(ws, truncation_psi, truncation_cutoff)

    def truncate(self, ws: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
        """Draws the first `cutoff` layers of ``ws: (B, num_ws, w_dim)`` towards the average w."""
        if psi == 1:
            return ws
        truncated = self.w_avg.lerp(ws[:, :cutoff], psi)
        return truncated if cutoff is None else torch.cat([truncated, ws[:, cutoff:]], dim=1)


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias and leaky ReLU.

    Args:
        inputs: input channels.
        outputs: output channels.
        w_dim: size of w.
        resolution: of the output.
        up: double the resolution.
        resample_filter: taps of the filter used for `up`.
        clamp: limit the output to this range (of a unit gain).
    """

    noise_const: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        w_dim: int,
        resolution: int,
        up: bool = False,
        resample_filter: Sequence[float] = RESAMPLE_FILTER,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.resolution, self.up, self.clamp = resolution, up, clamp
        self.affine = FullyConnected(w_dim, inputs, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.resample = Resample(resample_filter)

    def forward(self, x: Tensor, w: Tensor, noise_mode: NoiseMode = "random", gain: float = 1.0) -> Tensor:
        """(B, inputs, H, W) and (B, w_dim) to (B, outputs, resolution, resolution)."""
        gain = gain * GAIN
        style = self.affine(w)
        power = self.weight.square().sum(dim=(2, 3))
        demodulation = (style.square() @ power.t() + 1e-8).rsqrt()

        def scaled(value: Tensor) -> Tensor:
            return (value * gain).to(x.dtype)

        y = convolve(x * style.to(x.dtype)[:, :, None, None], self.weight, self.resample, up=self.up)
        y = y * scaled(demodulation)[:, :, None, None]
        if noise_mode == "random":
            noise = torch.randn(len(x), 1, self.resolution, self.resolution, device=x.device)
            y = y + scaled(noise * self.noise_strength)
        elif noise_mode == "const":
            y = y + scaled(self.noise_const * self.noise_strength)
        y = y + scaled(self.bias)[:, None, None]
        return activate(y, gain, self.clamp)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to pixels, without demodulation, noise or activation.

    Args:
        inputs: input channels.
        outputs: image channels.
        w_dim: size of w.
        clamp: limit the output to this range.
    """

    def __init__(self, inputs: int, outputs: int, w_dim: int, clamp: float | None = None) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = FullyConnected(w_dim, inputs, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.weight_gain = 1 / math.sqrt(inputs)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """(B, inputs, H, W) and (B, w_dim) to (B, outputs, H, W) float32."""
        style = self.affine(w) * self.weight_gain
        x = F.conv2d(x * style.to(x.dtype)[:, :, None, None], self.weight.to(x.dtype)).float()
        x = x + self.bias[:, None, None]
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class SynthesisBlock(nn.Module):
    """The layers of one resolution.

    Args:
        inputs: input channels, 0 for the first block, which starts from a learned constant.
        outputs: output channels.
        w_dim: size of w.
        resolution: of the output.
        img_channels: image channels.
        architecture: ``skip`` sums an RGB image over the resolutions, ``resnet`` sums features.
        is_last: the block that gives the image.
        resample_filter: taps of the low-pass filter.
        clamp: limit layer outputs to this range.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        architecture: str,
        is_last: bool,
        resample_filter: Sequence[float] = RESAMPLE_FILTER,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.is_first = inputs == 0
        self.num_convs = 1 if self.is_first else 2
        self.resample = Resample(resample_filter)
        layer: dict[str, Any] = {
            "w_dim": w_dim,
            "resolution": resolution,
            "resample_filter": resample_filter,
            "clamp": clamp,
        }
        if self.is_first:
            self.const = nn.Parameter(torch.randn(outputs, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(inputs, outputs, up=True, **layer)
        self.conv1 = SynthesisLayer(outputs, outputs, **layer)
        self.torgb = ToRGB(outputs, img_channels, w_dim, clamp) if is_last or architecture == "skip" else None
        self.skip = None
        if architecture == "resnet" and not self.is_first:
            self.skip = Convolution(
                inputs, outputs, kernel_size=1, bias=False, up=True, resample_filter=resample_filter
            )

    @property
    def num_ws(self) -> int:
        """Latents that this block takes."""
        return self.num_convs + (self.torgb is not None)

    def forward(
        self, x: Tensor | None, image: Tensor | None, ws: Tensor, noise_mode: NoiseMode = "random"
    ) -> tuple[Tensor, Tensor | None]:
        """Advances features and image by one resolution.

        Args:
            x: (B, inputs, H/2, W/2) features, None for the first block.
            image: (B, C, H/2, W/2) float32, the sum so far; None where there is none yet.
            ws: (B, num_ws, w_dim).
            noise_mode: fresh noise, the stored noise, or none.

        Returns:
            Features (B, outputs, H, W) and image (B, C, H, W).
        """
        dtype = convolution_dtype(ws)
        with torch.autocast(ws.device.type, enabled=False):
            if x is None:
                x = self.const.expand(len(ws), -1, -1, -1)
                x = x.to(dtype).contiguous(memory_format=torch.channels_last)
                x = self.conv1(x, ws[:, 0], noise_mode)
            elif self.skip is None:
                x = self.conv0(x.to(dtype), ws[:, 0], noise_mode)
                x = self.conv1(x, ws[:, 1], noise_mode)
            else:
                half = math.sqrt(0.5)
                skipped = self.skip(x.to(dtype), gain=half)
                x = self.conv0(x.to(dtype), ws[:, 0], noise_mode)
                x = skipped + self.conv1(x, ws[:, 1], noise_mode, gain=half)
            if image is not None:
                image = self.resample.up(image)
            if self.torgb is not None:
                rgb = self.torgb(x, ws[:, self.num_convs])
                image = rgb if image is None else image + rgb
        return x, image


class SynthesisNetwork(nn.Module):
    """Turns one latent w per layer into an image.

    Args:
        w_dim: size of w.
        resolution: a power of two, at least 8.
        img_channels: image channels.
        channel_base: feature maps times resolution.
        channel_max: at most this many feature maps.
        architecture: ``skip`` (configuration F) or ``resnet``.
        resample_filter: taps of the low-pass filter.
        clamp: limit layer outputs to this range (256 with half precision in the official code); None: no limit.
    """

    def __init__(
        self,
        w_dim: int,
        resolution: int,
        img_channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        architecture: Literal["skip", "resnet"] = "skip",
        resample_filter: Sequence[float] = RESAMPLE_FILTER,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.w_dim, self.resolution = w_dim, resolution
        self.resolutions = block_resolutions(resolution)
        self.num_ws = 2 * len(self.resolutions)
        inputs = 0
        for size in self.resolutions:
            outputs = channels_at(size, channel_base, channel_max)
            is_last = size == resolution
            block = SynthesisBlock(
                inputs,
                outputs,
                w_dim,
                size,
                img_channels,
                architecture,
                is_last,
                resample_filter,
                clamp,
            )
            self.add_module(f"b{size}", block)
            inputs = outputs

    def blocks(self, ws: Tensor) -> Iterator[tuple[SynthesisBlock, Tensor]]:
        """Each block with its latents; a block's RGB layer shares the next block's first latent."""
        first = 0
        for size in self.resolutions:
            block = self.get_submodule(f"b{size}")
            assert isinstance(block, SynthesisBlock)
            yield block, ws[:, first : first + block.num_ws]
            first += block.num_convs

    def forward(self, ws: Tensor, noise_mode: NoiseMode = "random") -> Tensor:
        """Renders.

        Args:
            ws: (B, num_ws, w_dim), a W+ code.
            noise_mode: ``random`` draws noise, ``const`` takes the stored noise, ``none`` adds none.

        Returns:
            (B, C, H, W) float32, nominally in [-1, 1], not clamped.
        """
        x: Tensor | None = None
        image: Tensor | None = None
        for block, block_ws in self.blocks(ws.float()):
            x, image = block(x, image, block_ws, noise_mode)
        assert image is not None, "the last block has an RGB layer"
        return image


class Generator(nn.Module):
    """Mapping and synthesis.

    Args:
        z_dim: size of the input latent.
        w_dim: size of w.
        resolution: a power of two, at least 8.
        c_dim: label size, 0 without labels.
        img_channels: image channels.
        channel_base: feature maps times resolution.
        channel_max: at most this many feature maps.
        mapping_layers: fully connected layers from z to w.
        architecture: ``skip`` (configuration F) or ``resnet``.
        resample_filter: taps of the low-pass filter.
        clamp: limit layer outputs to this range; None: no limit.
        w_avg_beta: decay of the running average of w.
    """

    def __init__(
        self,
        z_dim: int = 512,
        w_dim: int = 512,
        resolution: int = 1024,
        c_dim: int = 0,
        img_channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        mapping_layers: int = 8,
        architecture: Literal["skip", "resnet"] = "skip",
        resample_filter: Sequence[float] = RESAMPLE_FILTER,
        clamp: float | None = None,
        w_avg_beta: float = 0.998,
    ) -> None:
        super().__init__()
        self.z_dim, self.w_dim, self.c_dim, self.resolution = z_dim, w_dim, c_dim, resolution
        self.synthesis = SynthesisNetwork(
            w_dim, resolution, img_channels, channel_base, channel_max, architecture, resample_filter, clamp
        )
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(
            z_dim, c_dim, w_dim, self.num_ws, num_layers=mapping_layers, w_avg_beta=w_avg_beta
        )

    def forward(
        self,
        z: Tensor,
        c: Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: NoiseMode = "random",
    ) -> Tensor:
        """(B, z_dim) and labels (B, c_dim), if any, to images (B, C, H, W) float32, nominally in [-1, 1]."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        return self.synthesis(ws, noise_mode)


class DiscriminatorBlock(nn.Module):
    """The layers of one resolution; halves it.

    Args:
        inputs: input channels, 0 for the first block, which starts from the image.
        middle: channels at this resolution.
        outputs: output channels.
        img_channels: image channels.
        architecture: ``resnet`` or ``skip``.
        resample_filter: taps of the low-pass filter.
        clamp: limit layer outputs to this range.
    """

    def __init__(
        self,
        inputs: int,
        middle: int,
        outputs: int,
        img_channels: int,
        architecture: str,
        resample_filter: Sequence[float] = RESAMPLE_FILTER,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.resample = Resample(resample_filter)
        self.fromrgb = None
        if inputs == 0 or architecture == "skip":
            self.fromrgb = Convolution(img_channels, middle, kernel_size=1, clamp=clamp)
        self.conv0 = Convolution(middle, middle, kernel_size=3, clamp=clamp)
        self.conv1 = Convolution(
            middle, outputs, kernel_size=3, down=True, resample_filter=resample_filter, clamp=clamp
        )
        self.skip = None
        if architecture == "resnet":
            self.skip = Convolution(
                middle, outputs, kernel_size=1, bias=False, down=True, resample_filter=resample_filter
            )

    def forward(self, x: Tensor | None, image: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Advances features and image (used by ``skip`` only) by one resolution.

        Args:
            x: (B, inputs, H, W) features, None for the first block.
            image: (B, C, H, W), None where no later block needs it.

        Returns:
            Features (B, outputs, H/2, W/2) and image (B, C, H/2, W/2) or None.
        """
        source = x if x is not None else image
        assert source is not None, "the first block needs the image"
        dtype = convolution_dtype(source)
        with torch.autocast(source.device.type, enabled=False):
            if self.fromrgb is not None:
                assert image is not None
                rgb = self.fromrgb(image.to(dtype).contiguous(memory_format=torch.channels_last))
                x = rgb if x is None else x.to(dtype) + rgb
                image = self.resample.down(image) if self.architecture == "skip" else None
            assert x is not None
            x = x.to(dtype)
            if self.skip is None:
                x = self.conv1(self.conv0(x))
            else:
                half = math.sqrt(0.5)
                x = self.skip(x, gain=half) + self.conv1(self.conv0(x), gain=half)
        return x, image


def minibatch_std(x: Tensor, group_size: int | None, channels: int) -> Tensor:
    """Appends the standard deviation within groups of samples as feature maps.

    Sample i belongs to group i mod (B / group size).

    Args:
        x: (B, C, H, W) float32.
        group_size: samples per group, at most B; None: the whole batch.
        channels: feature maps to append; C is split into as many parts.

    Returns:
        (B, C + channels, H, W).

    Raises:
        ValueError: B is not a multiple of the group size.
    """
    B, C, H, W = x.shape
    size = min(group_size or B, B)
    if B % size:
        raise ValueError(f"a batch of {B} does not divide into groups of {size} for the minibatch deviation")
    groups = x.reshape(size, B // size, channels, C // channels, H, W)
    variance = groups.var(dim=0, correction=0)
    deviation = (variance + 1e-8).sqrt().mean(dim=(2, 3, 4))
    maps = deviation.repeat(size, 1)[:, :, None, None].expand(-1, -1, H, W)
    return torch.cat([x, maps], dim=1)


class DiscriminatorEpilogue(nn.Module):
    """The 4x4 block: minibatch deviation, convolution, two fully connected layers; always float32.

    Args:
        inputs: input channels.
        cmap_dim: size of the mapped label, 0 without labels.
        resolution: of the input, 4.
        img_channels: image channels.
        architecture: ``resnet`` or ``skip``.
        mbstd_group_size: samples per group of the minibatch deviation; None: the whole batch.
        mbstd_channels: feature maps of the minibatch deviation, 0 for none.
        clamp: limit layer outputs to this range.
    """

    def __init__(
        self,
        inputs: int,
        cmap_dim: int,
        resolution: int,
        img_channels: int,
        architecture: str,
        mbstd_group_size: int | None,
        mbstd_channels: int,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.cmap_dim = cmap_dim
        self.mbstd_group_size, self.mbstd_channels = mbstd_group_size, mbstd_channels
        self.fromrgb = Convolution(img_channels, inputs, kernel_size=1) if architecture == "skip" else None
        self.conv = Convolution(inputs + mbstd_channels, inputs, kernel_size=3, clamp=clamp)
        self.fc = FullyConnected(inputs * resolution**2, inputs, activation=True)
        self.out = FullyConnected(inputs, cmap_dim or 1)

    def forward(self, x: Tensor, image: Tensor | None, cmap: Tensor | None) -> Tensor:
        """Features (B, inputs, 4, 4), image (``skip`` only) and mapped label (B, cmap_dim) to logits (B, 1)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.fromrgb is not None:
                assert image is not None
                x = x + self.fromrgb(image.float())
            if self.mbstd_channels:
                x = minibatch_std(x, self.mbstd_group_size, self.mbstd_channels)
            x = self.out(self.fc(self.conv(x).flatten(1)))
            if cmap is not None:
                x = (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x


class Discriminator(nn.Module):
    """Scores images; with labels by projection onto the mapped label.

    Args:
        resolution: a power of two, at least 8.
        c_dim: label size, 0 without labels.
        img_channels: image channels.
        channel_base: feature maps times resolution.
        channel_max: at most this many feature maps.
        architecture: ``resnet`` (configuration F) or ``skip``.
        cmap_dim: size of the mapped label; None: the channels at 4x4.
        mapping_layers: fully connected layers that map the label.
        mbstd_group_size: samples per group of the minibatch deviation; None: the whole batch.
        mbstd_channels: feature maps of the minibatch deviation.
        resample_filter: taps of the low-pass filter.
        clamp: limit layer outputs to this range; None: no limit.
    """

    def __init__(
        self,
        resolution: int = 1024,
        c_dim: int = 0,
        img_channels: int = 3,
        channel_base: int = 32768,
        channel_max: int = 512,
        architecture: Literal["resnet", "skip"] = "resnet",
        cmap_dim: int | None = None,
        mapping_layers: int = 8,
        mbstd_group_size: int | None = 4,
        mbstd_channels: int = 1,
        resample_filter: Sequence[float] = RESAMPLE_FILTER,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.c_dim = c_dim
        self.resolutions = block_resolutions(resolution)[:0:-1]
        inputs = 0
        for size in self.resolutions:
            middle = channels_at(size, channel_base, channel_max)
            outputs = channels_at(size // 2, channel_base, channel_max)
            block = DiscriminatorBlock(inputs, middle, outputs, img_channels, architecture, resample_filter, clamp)
            self.add_module(f"b{size}", block)
            inputs = outputs
        cmap_dim = 0 if c_dim == 0 else inputs if cmap_dim is None else cmap_dim
        if c_dim:
            self.mapping = MappingNetwork(0, c_dim, cmap_dim, num_ws=None, num_layers=mapping_layers)
        self.b4 = DiscriminatorEpilogue(
            inputs, cmap_dim, 4, img_channels, architecture, mbstd_group_size, mbstd_channels, clamp
        )

    def forward(self, image: Tensor, c: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] and labels (B, c_dim), if any, to logits (B, 1) float32."""
        x: Tensor | None = None
        rgb: Tensor | None = image.float()
        for size in self.resolutions:
            x, rgb = self.get_submodule(f"b{size}")(x, rgb)
        assert x is not None, "there is at least one block"
        cmap = self.mapping(None, c) if self.c_dim else None
        return self.b4(x, rgb, cmap)
