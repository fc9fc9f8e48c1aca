"""Motion metrics against the official scripts of CodeTalker, FaceDiffuser and ProbTalk3D.

What was recorded is found by the names of the tensors: any number of clips, vertices, styles and samples.
"""

import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from metrics.motion import FaceDynamicsDeviation, LipVertexError, MeanVertexError
from metrics.rig import (
    BEAT_MOUTH,
    BEAT_UPPER,
    DAMM_MOUTH,
    DAMM_UPPER,
    ControlDynamicsDeviation,
    ControlError,
)
from metrics.samples import CoverageError, MeanEstimateError, Multimodality, SampleDiversity, StyleDiversity

TIGHT = {"rtol": 1e-6, "atol": 0.0}
RIGS = {"damm": (DAMM_MOUTH, DAMM_UPPER), "beat": (BEAT_MOUTH, BEAT_UPPER)}


def check(golden: Any) -> None:
    """Compares every official value of the golden."""
    check_vertices(golden)
    check_styles(golden)
    check_multimodality(golden)
    check_rigs(golden)
    check_probtalk3d(golden)
    official = {name for name, value in golden.io.items() if value.ndim == 0}
    assert official == set(golden.compared), f"not compared: {', '.join(sorted(official - set(golden.compared)))}"


def check_vertices(golden: Any) -> None:
    """CodeTalker's and FaceDiffuser's values, the latter also of predictions cut to their first frames."""
    io = golden.io
    clips = [
        (io[name.replace("gt_", "pred_", 1)], io[name], io["template_" + name.split("_")[1]])
        for name in sorted(io)
        if name.startswith("gt_")
    ]
    for prefix in sorted(
        {match[1] for name in io if (match := re.match(r"(codetalker|facediffuser(_short\d+)?)_", name))}
    ):
        limit = int(short[1]) if (short := re.search(r"short(\d+)", prefix)) else None
        for name, value in scored([(p[:limit], v, t) for p, v, t in clips], io["mouth_map"], io["upper_map"]).items():
            if f"{prefix}_{name}" in io:
                golden.close(f"{prefix}_{name}", value, **TIGHT)


def scored(clips: list[tuple[Tensor, Tensor, Tensor]], lips: Tensor, upper: Tensor) -> dict[str, Any]:
    """Every official value of one set of clips, each cut to the shorter."""
    lve, mve = LipVertexError("squared"), MeanVertexError()
    fdd, abs_fdd = FaceDynamicsDeviation(signed=True), FaceDynamicsDeviation(signed=False)
    for predicted, truth, template in clips:
        predicted, truth = same_length(predicted, truth)
        lve.update(predicted, truth, lips)
        mve.update(predicted, truth)
        for metric in (fdd, abs_fdd):
            metric.update(predicted, truth, template, upper)
    values = {"LVE": lve, "MVE": mve, "FDD": fdd, "ABS_FDD": abs_fdd}
    return {name: metric.compute() for name, metric in values.items()} | {"frames": int(lve.count)}


def check_styles(golden: Any) -> None:
    """FaceDiffuser's diversity: every clip under several conditions."""
    metric = StyleDiversity()
    for styles in grouped(golden, r"div_(.+)_[^_]+").values():
        metric.update(torch.stack(styles))
    golden.close("facediffuser_diversity", metric.compute(), **TIGHT)


def check_multimodality(golden: Any) -> None:
    """FaceDiffuser's multimodality: every clip several times."""
    metric = Multimodality()
    for samples in grouped(golden, r"mm_(.+)_\d+").values():
        metric.update(torch.stack(samples))
    golden.close("facediffuser_multimodality", metric.compute(), **TIGHT)


def check_rigs(golden: Any) -> None:
    """FaceDiffuser's script for blendshapes."""
    for rig, indices in RIGS.items():
        mouth, upper = (torch.tensor(part) for part in indices)
        mbe, lbe = ControlError(), ControlError()
        fdd, abs_fdd = ControlDynamicsDeviation(signed=True), ControlDynamicsDeviation(signed=False)
        for name in sorted(golden.io):
            if name.startswith(f"{rig}_gt_"):
                predicted, truth = same_length(golden.io[name.replace("_gt_", "_pred_", 1)], golden.io[name])
                mbe.update(predicted, truth)
                lbe.update(predicted, truth, mouth)
                for metric in (fdd, abs_fdd):
                    metric.update(predicted, truth, upper)
        for name, value in {"MVE": mbe, "LVE": lbe, "FDD": fdd, "ABS_FDD": abs_fdd}.items():
            golden.close(f"{rig}_{name}", value.compute(), **TIGHT)


def check_probtalk3d(golden: Any) -> None:
    """Several samples a clip: errors of the first, of their mean and of the best; diversity of shuffled halves."""
    io, lips, upper = golden.io, golden.io["mouth_map"], golden.io["upper_map"]
    template = io["template_" + golden.config["subjects"][0]]  # one for all, as the script has it
    mve, lve, fdd, mee, ce = (
        MeanVertexError(),
        LipVertexError(),
        FaceDynamicsDeviation(),
        MeanEstimateError(),
        CoverageError(),
    )
    diversity = SampleDiversity("halves")
    for name in sorted(io):
        if name.startswith("pt_gt_"):
            clip = name.removeprefix("pt_gt_")
            truth, samples = io[name], io[f"pt_samples_{clip}"]
            mve.update(samples[0], truth)
            lve.update(samples[0], truth, lips)
            fdd.update(samples[0], truth, template, upper)
            mee.update(samples, truth, lips)
            ce.update(samples, truth, lips)
            diversity.update(samples, io[f"pt_perm_{clip}"])
    values = {"MVE": mve, "LVE": lve, "FDD": fdd, "MEE": mee, "CE": ce, "diversity": diversity}
    for name, metric in values.items():
        golden.close(f"probtalk3d_{name}", metric.compute(), **TIGHT)


def grouped(golden: Any, pattern: str) -> dict[str, list[Tensor]]:
    """Tensors whose name matches, by the pattern's group."""
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for name in sorted(golden.io):
        if match := re.fullmatch(pattern, name):
            groups[match[1]].append(golden.io[name])
    return groups


def same_length(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both cut to the shorter."""
    frames = min(len(predicted), len(truth))
    return predicted[:frames], truth[:frames]
