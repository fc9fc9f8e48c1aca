"""Motion as codes: the transformers and the quantiser of a motion VQ-VAE, as in ProbTalk3D and CodeTalker.

Both systems took them from Learning to Listen (Ng et al., CVPR 2022), so their official weights have the same keys,
which :func:`official_transformer_name` renames.
"""

import re

import torch
from diffusers.models.autoencoders.vae import VectorQuantizer
from torch import Tensor, nn
from torch.nn.functional import gelu, leaky_relu, scaled_dot_product_attention

from trainers.nets.cached_decoder import periodic_positions

SLOPE = 0.2
KERNEL = 5


class Quantiser(VectorQuantizer):
    """diffusers' vector quantiser on rows, which can also draw codes.

    Args:
        codes: K, size of the codebook.
        dim: D, width of a code.
        beta: weight of the commitment term against the codebook term.
    """

    def __init__(self, codes: int, dim: int, beta: float = 0.25) -> None:
        super().__init__(codes, dim, beta, legacy=False)

    def nearest(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replaces every row by the code nearest to it; the gradient passes straight through.

        Args:
            rows: (R, D).

        Returns:
            (R, D) codes; the loss beta · |sg[code] - row|² + |code - sg[row]|², mean over all elements; (R,) int64
            numbers of the codes.
        """
        quantised, loss, (_, _, numbers) = self(rows.T[None, :, :, None])
        return quantised[0, :, :, 0].T, loss, numbers

    def probabilities(self, rows: Tensor, temperature: float) -> Tensor:
        """softmax(-|row - code|² / temperature): (R, K)."""
        return (-torch.cdist(rows, self.embedding.weight).square() / temperature).softmax(dim=-1)

    def draw(self, rows: Tensor, temperature: float, generator: torch.Generator, number: int = 1) -> Tensor:
        """Draws numbers of codes, (R,) int64.

        Args:
            rows: (R, D).
            temperature: above 0.
            generator: on the CPU.
            number: draws for each row, without replacement; the last one counts.
        """
        probabilities = self.probabilities(rows, temperature).cpu()
        return torch.multinomial(probabilities, number, generator=generator)[:, -1].to(rows.device)


class MotionTransformer(nn.Module):
    """A convolution over time with instance normalisation, then a pre-norm transformer.

    A clip in a padded batch gives what it gives alone: at its end the convolution repeats the last real frame, and
    normalisation and attention see real frames only. A single frame is normalised to zero.

    Args:
        dim: width.
        layers: of the transformer.
        heads: attention heads. Scores are scaled by the root of the full width, not of a head's.
        hidden: width of the feed-forward layers.
        dropout: on the embedded frames, while training.
        count_frames: whether positions count frames; else every frame has the positional code of the first.
    """

    def __init__(
        self, dim: int, layers: int, heads: int, hidden: int, dropout: float = 0.1, count_frames: bool = True
    ) -> None:
        super().__init__()
        self.count_frames = count_frames
        self.convolution = nn.Conv1d(dim, dim, KERNEL)
        self.embedding = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(MotionLayer(dim, heads, hidden) for _ in range(layers))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Transforms a padded batch.

        Args:
            x: (B, T, dim).
            lengths: (B,) int64, frames that are real.

        Returns:
            (B, T, dim), undefined where padded.
        """
        frames = torch.arange(x.shape[1], device=x.device)
        real = frames < lengths[:, None]
        x = leaky_relu(self.convolution(repeat_ends(x, lengths, KERNEL // 2).transpose(1, 2)), SLOPE)
        x = self.embedding(normalise_over_time(x.transpose(1, 2), real))
        count = len(frames) if self.count_frames else 1
        x = self.dropout(x + periodic_positions(count, x.shape[-1], period=count).to(x))
        for layer in self.layers:
            x = layer(x, real[:, None, None])
        return x


class MotionLayer(nn.Module):
    """Pre-norm self-attention and feed-forward layer with the tanh form of GELU."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, dim) -> (B, T, dim); ``mask`` (B, 1, 1, T) bool is True where a frame may be seen."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=x.shape[-1] ** -0.5)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x)), approximate="tanh"))


def repeat_ends(x: Tensor, lengths: Tensor, margin: int) -> Tensor:
    """(B, T, D) -> (B, T + 2·margin, D): first and last real frame of every clip repeated beyond its ends."""
    index = torch.arange(-margin, x.shape[1] + margin, device=x.device).clamp(min=0)
    return x.take_along_dim(index.minimum(lengths[:, None] - 1)[..., None], dim=1)


def normalise_over_time(x: Tensor, real: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Instance normalisation of (B, T, D) over the frames where ``real`` (B, T) is True, without weights."""
    weight = real[..., None] / real.sum(dim=1)[:, None, None]
    mean = (x * weight).sum(dim=1, keepdim=True)
    variance = ((x - mean).square() * weight).sum(dim=1, keepdim=True)
    return (x - mean) * (variance + epsilon).rsqrt()


def hold_last(x: Tensor, lengths: Tensor, frames: int) -> Tensor:
    """(B, T, D) -> (B, frames, D): the last of each clip's ``lengths`` frames stands for all that follow."""
    index = torch.arange(frames, device=x.device).minimum(lengths[:, None] - 1)
    return x.take_along_dim(index[..., None], dim=1)


LAYER_NAMES = {
    "norm": ("norm1", "norm2"),
    "fn.to_qkv": ("qkv",),
    "fn.to_out": ("out",),
    "fn.l1": ("", "up"),
    "fn.l2": ("", "down"),
}


def official_transformer_name(key: str) -> str | None:
    """What a weight of an official encoder, decoder or predictor is called in :class:`MotionTransformer`.

    ============================================  =========================================
    official                                      here
    ============================================  =========================================
    ``squasher.0.0``, ``expander.0.0``            ``convolution``
    ``*_linear_embedding.net``                    ``embedding``
    ``*_transformer.net.{2i}.fn.norm``            ``layers.{i}.norm1``
    ``*_transformer.net.{2i}.fn.fn.to_qkv``       ``layers.{i}.qkv``, and ``to_out`` ``out``
    ``*_transformer.net.{2i+1}.fn.norm``          ``layers.{i}.norm2``
    ``*_transformer.net.{2i+1}.fn.fn.l1``         ``layers.{i}.up``, and ``l2`` ``down``
    ============================================  =========================================

    Returns:
        the new key; None for one that is not the transformer's.
    """
    if match := re.fullmatch(r"(?:squasher|expander)\.0\.0\.(weight|bias)", key):
        return f"convolution.{match[1]}"
    if match := re.fullmatch(r"(?:encoder|decoder)_linear_embedding\.net\.(weight|bias)", key):
        return f"embedding.{match[1]}"
    if match := re.fullmatch(r"(?:encoder|decoder)_transformer\.net\.(\d+)\.fn\.(.+)\.(weight|bias)", key):
        layer, half = divmod(int(match[1]), 2)
        return f"layers.{layer}.{LAYER_NAMES[match[2]][half]}.{match[3]}"
    return None
