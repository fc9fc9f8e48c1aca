"""Motion metrics against the official scripts of CodeTalker, FaceDiffuser and ProbTalk3D."""

from typing import Any

import torch
from torch import Tensor

from metrics.motion import (
    FaceDynamicsDeviation,
    LipVertexError,
    MeanVertexError,
    MotionMetric,
    lip_vertex_error,
)

TIGHT = {"rtol": 1e-6, "atol": 0.0}
# Controls of the mouth and of the upper face in FaceDiffuser's script for BEAT.
BEAT_MOUTH = [23, 25, 27, 28, 31, 37, 39, 40, 41, 42, 47, 48]
BEAT_UPPER = [*range(8, 22), 49, 50]


def check(golden: Any) -> None:
    """Reproduces lip and mean vertex errors and dynamics deviations; clips are cut to the shorter."""
    io = golden.io
    lips, upper = io["mouth_map"], io["upper_map"]
    clips = [
        (io[name.replace("gt_", "pred_")], io[name], io["template_" + name.split("_")[1]])
        for name in sorted(io)
        if name.startswith("gt_")
    ]
    codetalker = scored(clips, lips, upper)
    golden.close("codetalker_LVE", codetalker["LVE"], **TIGHT)
    golden.close("codetalker_FDD", codetalker["FDD"], **TIGHT)
    golden.close("codetalker_frames", int(codetalker["frames"]))
    for name in ("MVE", "LVE", "FDD", "ABS_FDD"):
        golden.close(f"facediffuser_{name}", codetalker[name], **TIGHT)
    short = [(predicted[:6], truth, template) for predicted, truth, template in clips]
    for name, value in scored(short, lips, upper).items():
        if name != "frames":
            golden.close(f"facediffuser_short6_{name}", value, **TIGHT)
    check_beat(golden)
    check_probtalk3d(golden)


def check_beat(golden: Any) -> None:
    """Rig controls are one vertex of C coordinates; clips count alike, whatever their length."""
    clips = [
        (golden.io[name.replace("_gt_", "_pred_")][:, None], golden.io[name][:, None])
        for name in sorted(golden.io)
        if name.startswith("beat_gt_")
    ]
    mve, lve = MeanVertexError(pooling="clips"), MeanVertexError(pooling="clips")
    fdd, abs_fdd = FaceDynamicsDeviation(signed=True), FaceDynamicsDeviation(signed=False)
    for predicted, truth in clips:
        frames = min(len(predicted), len(truth))
        predicted, truth = predicted[:frames], truth[:frames]
        mve.update(predicted, truth)
        lve.update(predicted[..., BEAT_MOUTH], truth[..., BEAT_MOUTH])
        for metric in (fdd, abs_fdd):
            template = torch.zeros(1, len(BEAT_UPPER))
            metric.update(predicted[..., BEAT_UPPER], truth[..., BEAT_UPPER], template, torch.tensor([0]))
    for name, metric in {"MVE": mve, "LVE": lve, "FDD": fdd, "ABS_FDD": abs_fdd}.items():
        golden.close(f"beat_{name}", metric.compute(), **TIGHT)


def check_probtalk3d(golden: Any) -> None:
    """Ten samples a clip: errors of the first, of their mean (MEE) and of the best (CE)."""
    lips = golden.io["mouth_map"]
    mve, lve, mee, ce = MeanVertexError(), LipVertexError(), LipVertexError(), LipVertexError()
    for clip in range(2):
        samples, truth = golden.io[f"pt_samples_{clip}"], golden.io[f"pt_gt_{clip}"]
        mve.update(samples[0], truth)
        lve.update(samples[0], truth, lips)
        mee.update(samples.mean(0), truth, lips)
        ce.update(min(samples, key=lambda sample: lip_vertex_error(sample, truth, lips).sum()), truth, lips)
    for name, metric in {"MVE": mve, "LVE": lve, "MEE": mee, "CE": ce}.items():
        golden.close(f"probtalk3d_{name}", metric.compute(), **TIGHT)


def scored(clips: list[tuple[Tensor, Tensor, Tensor]], lips: Tensor, upper: Tensor) -> dict[str, Tensor]:
    """Every official value of one set of clips."""
    lve, mve = LipVertexError("squared"), MeanVertexError()
    fdd, abs_fdd = FaceDynamicsDeviation(signed=True), FaceDynamicsDeviation(signed=False)
    for predicted, truth, template in clips:
        frames = min(len(predicted), len(truth))
        predicted, truth = predicted[:frames], truth[:frames]
        lve.update(predicted, truth, lips)
        mve.update(predicted, truth)
        for metric in (fdd, abs_fdd):
            metric.update(predicted, truth, template, upper)
    metrics: dict[str, MotionMetric] = {"LVE": lve, "MVE": mve, "FDD": fdd, "ABS_FDD": abs_fdd}
    return {name: metric.compute() for name, metric in metrics.items()} | {"frames": lve.count}
