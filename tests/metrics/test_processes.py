"""Every metric class gives on two processes, with uneven batches, what it gives on one."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torchmetrics import Metric

from metrics import distribution, editing, motion

LIPS = torch.tensor([1, 2])
GENERATOR = torch.Generator().manual_seed(3)


def clips(**more):
    pairs = [torch.randn(2, 3 + 2 * i, 6, 3, generator=GENERATOR) for i in range(4)]
    return [{"predicted": predicted, "truth": truth, **more} for predicted, truth in pairs]


def feature_batches():
    batches = [torch.randn(10 + 3 * i, 4, generator=GENERATOR) for i in range(6)]
    return [{"features": batch, "real": i % 2 == 0} for i, batch in enumerate(batches)]


def image_batches(first, second):
    return [{name: torch.rand(3 + i, 3, generator=GENERATOR) for name in (first, second)} for i in range(4)]


CASES: dict[str, tuple[Metric, list[dict]]] = {
    "lip vertex error": (motion.LipVertexError("l2"), clips(lips=LIPS)),
    "lip vertex error by clip": (motion.LipVertexError(pooling="clips"), clips(lips=LIPS)),
    "mean vertex error": (motion.MeanVertexError(), clips()),
    "dynamics": (motion.FaceDynamicsDeviation(), clips(template=torch.zeros(6, 3), upper_face=LIPS)),
    "mouth opening": (motion.MouthOpeningDifference(), clips(upper_lip=LIPS, lower_lip=torch.tensor([3]))),
    "frechet distance": (distribution.FrechetDistance(4), feature_batches()),
    "kernel distance": (distribution.KernelDistance(), feature_batches()),
    "kernel distance on subsets": (distribution.KernelDistance(5, 20), feature_batches()),
    "editing accuracy": (editing.EditingAccuracy(0), image_batches("source", "edited")),
    "attribute preservation": (editing.AttributePreservation([1, 2]), image_batches("source", "edited")),
    "identity similarity": (editing.IdentitySimilarity(), image_batches("reference", "edited")),
}


def compute(metric, batches):
    for batch in batches:
        metric.update(**batch)
    return metric.compute()


def work(rank: int, cases: dict[str, tuple[Metric, list[dict]]], folder: str) -> None:
    """One process: takes two of each metric's batches, the other the rest."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    values = {
        name: compute(metric, batches[:2] if rank == 0 else batches[2:]) for name, (metric, batches) in cases.items()
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
    one = compute(*CASES[name]).item()
    for values in of_two_processes:
        assert values[name].item() == pytest.approx(one, rel=1e-9)
