"""Every metric class gives on two processes, with uneven batches, what it gives on one."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torchmetrics import Metric

from metrics import (
    alignment,
    distribution,
    editing,
    emotion,
    motion,
    perceptual,
    retargeting,
    rig,
    samples,
    timing,
)

LIPS = torch.tensor([1, 2])
GENERATOR = torch.Generator().manual_seed(3)


def clips(**more):
    pairs = [torch.randn(2, 3 + 2 * i, 6, 3, generator=GENERATOR) for i in range(4)]
    return [{"predicted": predicted, "truth": truth, **more} for predicted, truth in pairs]


def draws(*shape, name):
    """Four clips of other lengths: ``shape`` has None where the frames go."""
    shapes = [[3 + 2 * i if size is None else size for size in shape] for i in range(4)]
    return [{name: torch.randn(*sizes, generator=GENERATOR)} for sizes in shapes]


def together(*parts, **more):
    """Batches of several arguments from batches of one each."""
    return [{key: value for part in batch for key, value in part.items()} | more for batch in zip(*parts, strict=True)]


def emotion_batches():
    logits = [torch.randn(2, 3 + i, 4, generator=GENERATOR) for i in range(4)]
    return [{"logits": a, "logits_of_truth": b, "emotions": torch.arange(len(a)) % 4} for a, b in logits]


def feature_batches():
    batches = [torch.randn(10 + 3 * i, 4, generator=GENERATOR) for i in range(6)]
    return [{"features": batch, "real": i % 2 == 0} for i, batch in enumerate(batches)]


def image_batches(first, second):
    return [{name: torch.rand(3 + i, 3, generator=GENERATOR) for name in (first, second)} for i in range(4)]


class Brightness(torch.nn.Module):
    def layers(self, image):
        return [image.mean((2, 3))]

    def between(self, first, second):
        return (first[0] - second[0]).norm(dim=1)


def pictures(number):
    return torch.rand(number, 3, 4, 4, generator=GENERATOR)


def embedding_batches():
    pairs = [torch.randn(2, 3 + i, 4, generator=GENERATOR) for i in range(4)]
    return [{"image": image, "text": image + text} for image, text in pairs]


def captioned_batches():
    start = 0
    for batch in embedding_batches():
        number = len(batch["image"])
        position = torch.arange(start, start + number)
        yield {**batch, "captions": [f"face {i}" for i in position.tolist()], "position": position}
        start += number


CASES: dict[str, tuple[Metric, list[dict]]] = {
    "lip vertex error": (motion.LipVertexError("l2"), clips(lips=LIPS)),
    "lip vertex error by clip": (motion.LipVertexError(pooling="clips"), clips(lips=LIPS)),
    "mean vertex error": (motion.MeanVertexError(), clips()),
    "dynamics": (motion.FaceDynamicsDeviation(), clips(template=torch.zeros(6, 3), upper_face=LIPS)),
    "mouth opening": (motion.MouthOpeningDifference(), clips(upper_lip=LIPS, lower_lip=torch.tensor([3]))),
    "upper face": (motion.UpperFaceError("mean"), clips(upper_face=LIPS)),
    "surface": (motion.SurfaceDistance("clips"), clips(triangles=torch.tensor([[0, 1, 2], [3, 4, 5]]))),
    "mean estimate": (
        samples.MeanEstimateError(),
        together(draws(4, None, 6, 3, name="samples"), draws(None, 6, 3, name="truth"), lips=LIPS),
    ),
    "coverage": (
        samples.CoverageError("l2"),
        together(draws(4, None, 6, 3, name="samples"), draws(None, 6, 3, name="truth"), lips=LIPS),
    ),
    "sample diversity": (samples.SampleDiversity("halves"), draws(4, None, 6, 3, name="samples")),
    "style diversity": (samples.StyleDiversity(), draws(None, 5, 6, 3, name="styles")),
    "multimodality": (samples.Multimodality(), draws(4, None, 6, 3, name="samples")),
    "controls": (
        rig.ControlError(),
        together(draws(None, 5, name="predicted"), draws(None, 5, name="truth"), controls=LIPS),
    ),
    "dynamics of controls": (
        rig.ControlDynamicsDeviation(),
        together(draws(None, 5, name="predicted"), draws(None, 5, name="truth"), controls=LIPS),
    ),
    "coefficient distance": (
        rig.CoefficientDistance(4, length=2, stride=1),
        [clip | {"real": i % 2 == 0} for i, clip in enumerate(draws(None, 2, name="curves"))],
    ),
    "retargeting": (
        retargeting.RetargetingError("max"),
        together(draws(None, 6, 3, name="retargeted"), draws(None, 6, 3, name="truth")),
    ),
    "codes": (retargeting.CodeError(), together(draws(None, 6, name="codes"), draws(None, 6, name="truth"))),
    "lip closure": (
        timing.BilabialClosure(tolerance=0.5),
        together(
            draws(None, name="predicted"), draws(None, name="truth"), rest=-0.5, phonemes=[("m", 0.0, 1.0)] * 2, fps=2
        ),
    ),
    "closure offset": (
        timing.ClosureOffset(tolerance=0.5, scale=1000),
        together(draws(None, name="predicted"), draws(None, name="truth"), rest=0.0, phonemes=[("m", 0.0, 1.0)], fps=2),
    ),
    "sync": (
        timing.SyncCorrelation(largest=0.0),
        together(draws(None, name="opening"), draws(None, name="energy"), fps=30),
    ),
    "lip sync": (
        timing.LipSyncConfidence(largest=1),
        together(draws(None, 4, name="video"), draws(None, 4, name="audio")),
    ),
    "beat alignment": (
        timing.BeatAlignment(),
        together(draws(None, 3, name="rotations"), [{"energy": torch.tensor([0.0, 0, 4, 5, 5])}] * 4, fps=10),
    ),
    "rotation speed": (timing.RotationSpeed(), together(draws(None, 3, name="rotations"), fps=25)),
    "rotation deviation": (timing.RotationDeviation(), draws(None, 3, name="rotations")),
    "emotion accuracy": (emotion.EmotionAccuracy(), emotion_batches()),
    "relative emotion accuracy": (emotion.EmotionAccuracy(relative=True), emotion_batches()),
    "frechet distance": (distribution.FrechetDistance(4), feature_batches()),
    "kernel distance": (distribution.KernelDistance(), feature_batches()),
    "kernel distance on subsets": (distribution.KernelDistance(5, 20), feature_batches()),
    "neighbours": (distribution.NeighbourMetrics(3), feature_batches()),
    "frechet distance at infinity": (distribution.FrechetInfinity(10, 4), feature_batches()),
    "clip score": (alignment.CLIPScore(), embedding_batches()),
    "r-precision": (alignment.RPrecision("drawn", 10), list(captioned_batches())),
    "r-precision in batches": (alignment.RPrecision("batches", 4), list(captioned_batches())),
    "distance to the real image": (
        perceptual.DistanceToReal(Brightness()),
        [{"generated": pictures(2 + i), "real": pictures(2 + i)} for i in range(4)],
    ),
    "diversity": (perceptual.Diversity(Brightness()), [{"images": pictures(2 + i)} for i in range(5)]),
    "mask accuracy": (
        editing.MaskAccuracy(),
        [{"parsed": pictures(2 + i).argmax(1), "condition": pictures(2 + i).argmax(1)} for i in range(4)],
    ),
    "landmark error": (
        editing.LandmarkError(),
        [{name: torch.rand(2 + i, 68, 2, generator=GENERATOR) for name in ("predicted", "truth")} for i in range(4)],
    ),
    "recognition": (
        editing.RelativeRecognition(3),
        [{"similarity": torch.rand(3, 2 + i, generator=GENERATOR)} for i in range(4)],
    ),
    "editing accuracy": (editing.EditingAccuracy(0), image_batches("source", "edited")),
    "attribute preservation": (editing.AttributePreservation([1, 2]), image_batches("source", "edited")),
    "identity similarity": (editing.IdentitySimilarity(), image_batches("reference", "edited")),
}


def compute(metric, batches):
    for batch in batches:
        metric.update(**batch)
    return metric.compute()


def numbers(value):
    """Every number of a metric with one value or with several."""
    return torch.stack(list(value)).tolist() if isinstance(value, tuple) else value.flatten().tolist()


def work(rank: int, cases: dict[str, tuple[Metric, list[dict]]], folder: str) -> None:
    """One process: takes two of each metric's batches, the other the rest."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    values = {
        name: numbers(compute(metric, batches[:2] if rank == 0 else batches[2:]))
        for name, (metric, batches) in cases.items()
    }
    torch.save(values, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, args=(CASES, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name, of_two_processes):
    one = compute(*CASES[name])
    for values in of_two_processes:
        assert values[name] == pytest.approx(numbers(one), rel=1e-9)
