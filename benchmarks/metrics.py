"""Fréchet distance against clean-fid's, and the memory of motion metrics over a growing test set."""

from collections.abc import Iterator

import numpy as np
import torch
from cleanfid import fid as cleanfid

from benchmarks.table import Row, growth, median_seconds, run, speedup
from metrics.distribution import frechet_distance, mean_and_covariance
from metrics.motion import LipVertexError

DIMENSIONS = 2048


def frechet() -> Iterator[Row]:
    """Ours and clean-fid's on the same moments: enough images for a full rank, and fewer than dimensions."""
    for images in (5000, 1000):
        generator = torch.Generator().manual_seed(images)
        # Features of an image network: correlated, with a long tail of small directions.
        mixing = torch.randn(DIMENSIONS, DIMENSIONS, generator=generator) * torch.logspace(0, -2, DIMENSIONS)[:, None]
        sides = [torch.randn(images, DIMENSIONS, generator=generator) @ mixing + shift for shift in (0.0, 0.05)]
        moments = [moment for side in sides for moment in mean_and_covariance(side)]
        values: dict[str, float] = {}

        def ours(moments: list[torch.Tensor] = moments, values: dict[str, float] = values) -> None:
            values["ours"] = frechet_distance(*moments).item()

        def theirs(moments: list[torch.Tensor] = moments, values: dict[str, float] = values) -> None:
            values["clean-fid"] = float(cleanfid.frechet_distance(*(moment.numpy() for moment in moments)))

        our_seconds, their_seconds = median_seconds(ours, theirs, repeats=3, warm_up=0)
        label = f"Fréchet distance, {DIMENSIONS}-d, {images} images"
        yield speedup(f"{label}: ours / clean-fid", our_seconds, their_seconds, target=4)
        difference = abs(values["ours"] - values["clean-fid"]) / values["clean-fid"]
        yield Row(f"{label}: relative difference", difference, None, difference, "", "<= 1e-6", difference <= 1e-6)


def memory() -> Iterator[Row]:
    """Bytes of a motion metric's state after 100 and after 1,000 frames of a mesh of 5,023 vertices."""
    lips = torch.arange(254)
    kilobytes = {}
    for clips in (1, 10):
        metric = LipVertexError("l2")
        for _ in range(clips):
            metric.update(torch.rand(100, 5023, 3), torch.rand(100, 5023, 3), lips)
        state = metric.metric_state.values()
        kilobytes[clips] = sum(np.asarray(value).nbytes for value in state) / 1024
    case = "lip vertex error, state after 1,000 frames / after 100"
    yield growth(case, kilobytes[10], kilobytes[1], target=1, unit="kB")


def measure() -> Iterator[Row]:
    """All rows."""
    yield from memory()
    yield from frechet()


if __name__ == "__main__":
    run("Metrics", measure)
