"""A transformer decoder layer that decodes token by token without computing the past again; FaceFormer's masks."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention


class CachedDecoderLayer(nn.TransformerDecoderLayer):
    """PyTorch's post-norm decoder layer, which can also take one token at a time and remember the past."""

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.self_attn.num_heads

    def project_memory(self, memory: Tensor, per_token: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the cross-attention for all tokens: two of (B, T, heads, per_token, d / heads)."""
        attention = self.multihead_attn
        _, weight = attention.in_proj_weight.split([attention.embed_dim, 2 * attention.embed_dim])
        _, bias = attention.in_proj_bias.split([attention.embed_dim, 2 * attention.embed_dim])
        projected = linear(memory, weight, bias).unflatten(-1, (2, self.heads, -1)).unflatten(1, (-1, per_token))
        keys, values = projected.permute(3, 0, 1, 4, 2, 5)
        return keys, values

    def step(
        self,
        token: Tensor,
        past: tuple[Tensor, Tensor] | None,
        bias: Tensor | None,
        cross_keys: Tensor,
        cross_values: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The newest token's output, equal to the last row of :meth:`forward` over all tokens so far.

        Args:
            token: (B, d).
            past: self-attention keys and values of the tokens before it, (B, heads, t, d / heads) each.
            bias: (heads, 1, t + 1), added to the self-attention scores; None for none.
            cross_keys: (B, heads, m, d / heads), of the memory that this token sees.
            cross_values: likewise.

        Returns:
            (B, d), and the keys and values with the token's own.
        """
        attention = self.self_attn
        projected = linear(token, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = projected.view(len(token), 3, self.heads, 1, -1).unbind(1)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        attended = self._attend(attention, query, key, value, bias)
        x = self.norm1(token + self.dropout1(attended))

        attention = self.multihead_attn
        width = attention.embed_dim
        query = linear(x, attention.in_proj_weight[:width], attention.in_proj_bias[:width])
        attended = self._attend(attention, query.view(len(token), self.heads, 1, -1), cross_keys, cross_values)
        x = self.norm2(x + self.dropout2(attended))
        return self.norm3(x + self._ff_block(x)), (key, value)

    def _attend(
        self, attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        dropout = attention.dropout if self.training else 0.0
        attended = scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return attention.out_proj(attended.flatten(1))


def periodic_positions(length: int, dim: int, period: int) -> Tensor:
    """Sinusoidal positions that repeat after ``period`` frames (FaceFormer, equation 5): (length, dim)."""
    phase = torch.arange(length) % period
    frequency = torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000) / dim))
    angle = phase[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim]


def distance_bias(heads: int, length: int, period: int) -> Tensor:
    """What a distance of 0 ... length - 1 frames adds to an attention score (FaceFormer, equation 7): (heads, length).

    One slope for each head, as in ALiBi (Press et al. 2022), for every full period between two frames.
    """
    slopes = 2 ** (-8 / heads * torch.arange(1, heads + 1))
    return -slopes[:, None] * (torch.arange(length) // period)


def causal_bias(heads: int, length: int, period: int) -> Tensor:
    """:func:`distance_bias` for all pairs of frames, and minus infinity for the future: (heads, length, length)."""
    frame = torch.arange(length)
    distance = frame[:, None] - frame
    bias = distance_bias(heads, length, period)[:, distance.clamp(min=0)]
    return bias.masked_fill(distance < 0, float("-inf"))


def alignment_mask(frames: int, audio_per_frame: int) -> Tensor:
    """True where a frame must not see a speech state: all but its own, (frames, frames·audio_per_frame) bool."""
    owner = torch.arange(frames * audio_per_frame) // audio_per_frame
    return torch.arange(frames)[:, None] != owner
