"""FaceFormer's decoding: keys and values kept and vertices folded out of the loop, against the naive loop.

Without the speech encoder. The naive loop recomputes the whole past at every step, as the official code does.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.table import Row, growth, median_seconds, run, speedup
from trainers.nets.cached_decoder import alignment_mask, causal_bias, periodic_positions
from trainers.speech.faceformer import MotionDecoder

MESHES = {"demo head": 3689, "FLAME": 5023}
LENGTHS = (150, 300, 600, 1200)
TRAINING_LENGTH = 100


def naive_decode(decoder: MotionDecoder, speech: Tensor, style: Tensor) -> Tensor:
    """What :class:`MotionDecoder` gives, computed by the definition: everything anew at every frame."""
    length = speech.shape[1] // decoder.audio_per_frame
    memory, code = decoder.audio_projection(speech), decoder.style(style)[:, None]
    positions = periodic_positions(length, code.shape[-1], decoder.period)
    bias = causal_bias(decoder.layer.heads, length, decoder.period).repeat(len(speech), 1, 1)
    mask = alignment_mask(length, decoder.audio_per_frame)
    tokens = code
    for t in range(1, length + 1):
        states = decoder.dropout(tokens + positions[:t])
        states = decoder.layer(states, memory, tgt_mask=bias[:, :t, :t], memory_mask=mask[:t])
        offsets = decoder.vertex_decoder(states)
        tokens = torch.cat([tokens, decoder.vertex_encoder(offsets[:, -1:]) + code], dim=1)
    return offsets


def build(num_vertices: int) -> MotionDecoder:
    """A decoder at the paper's width with random weights."""
    torch.manual_seed(0)
    decoder = MotionDecoder(num_vertices, num_subjects=8, audio_dim=768)
    torch.nn.init.normal_(decoder.vertex_decoder.weight, std=0.01)
    return decoder


def inputs(length: int) -> tuple[Tensor, Tensor]:
    """Random speech states of one clip, and a style."""
    return torch.randn(1, length, 768), torch.eye(8)[:1]


def measure() -> Iterator[Row]:
    """Inference by length and mesh, its growth, and a training step."""
    for mesh, num_vertices in MESHES.items():
        decoder = build(num_vertices).eval()
        case = f"{mesh} ({num_vertices} vertices)"
        with torch.inference_mode():
            for length in LENGTHS:
                yield decoding(f"{case}, T={length}, naive / ours", decoder, length)
            short, long = (functools.partial(decoder, *inputs(length)) for length in (600, 1200))
            half, whole = median_seconds(short, long, repeats=9)
            yield growth(f"{case}, T=1200 / T=600", whole, half, 2.3)
        yield training_step(f"{case}, training step, T={TRAINING_LENGTH}, naive / ours", decoder)


def decoding(case: str, decoder: MotionDecoder, length: int) -> Row:
    """Free-running inference of one clip, after a look at whether both give the same."""
    speech, style = inputs(length)
    ours, naive = functools.partial(decoder, speech, style), functools.partial(naive_decode, decoder, speech, style)
    torch.testing.assert_close(ours(), naive(), rtol=1e-4, atol=1e-5)
    mine, theirs = median_seconds(ours, naive, repeats=5 if length < 600 else 3, warm_up=0)
    return speedup(case, mine, theirs, 20 if length == 600 else None)


def training_step(case: str, decoder: MotionDecoder) -> Row:
    """Free-running forward and backward pass through one clip of 100 frames."""
    speech, style = inputs(TRAINING_LENGTH)

    def step(decode) -> None:
        decoder.zero_grad()
        decode(decoder, speech, style).square().mean().backward()

    mine, theirs = median_seconds(functools.partial(step, MotionDecoder.forward), functools.partial(step, naive_decode))
    return speedup(case, mine, theirs, 5)


if __name__ == "__main__":
    run("FaceFormer decoding", measure)
