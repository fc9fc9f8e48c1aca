"""Floors and ceilings of a task: the rows that say what a score is worth."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from datamodules.speech import SpeechDataModule
from metrics.protocols import Protocol
from metrics.score_speech import Clip, mean_motion, mean_offset, neutral_motion, score_speech
from metrics.scoring import Scores
from sweeps.score import bind_judges, score_photos, score_reconstruction, speech_judges, truths


def bounds(task: str, root: str, protocol: Protocol, config: str) -> Iterator[tuple[dict[str, Any], Scores, Protocol]]:
    """Scores what needs no training.

    Args:
        task: speech-to-mesh, face-editing or text-to-face.
        root: data folder.
        protocol: of that task.
        config: config of a system of the task: names the latent space for face editing.

    Yields:
        the row's name, title and role, its scores, and the bound protocol.
    """
    if task == "face-editing":
        model = yaml.safe_load(Path(config).read_text())["model"]["init_args"]
        scores, bound = score_reconstruction(model["generator"], model["inverter"], root, protocol)
        yield {"system": "inversion", "title": "Inversion, no edit", "role": "ceiling"}, scores, bound
        return
    if task == "text-to-face":
        number = protocol.spec["samples"]
        rows = {
            ("photo", "The photo itself", "ceiling"): lambda photos: photos.expand(number, *photos.shape),
            # Real faces, whatever the caption says.
            ("other-photos", "Photos of others", "floor"): lambda photos: torch.stack(
                [photos.roll(1 + i, dims=0) for i in range(number)]
            ),
            ("mean-photo", "Mean photo", "floor"): lambda photos: photos.mean(0).expand(number, *photos.shape),
        }
        for (system, title, role), change in rows.items():
            scores, bound = score_photos(root, protocol, change)
            yield {"system": system, "title": title, "role": role}, scores, bound
        return

    data = SpeechDataModule(root, batch_size=1)
    split = protocol.spec["split"]
    bound = bind_judges(protocol.bind_regions(data.regions))
    judges = speech_judges(bound, data, data.regions)
    mean = mean_offset((clip.truth, clip.template) for clip in truths(data, "train"))

    def score(predict: Any) -> Scores:
        number = protocol.spec["samples"]

        def moved(clip: Clip) -> Clip:
            vertices = predict(clip.truth, clip.template)
            clip = replace(clip, predicted=vertices.expand(number, *vertices.shape))
            if vertices is clip.truth or clip.controls is None or clip.pose is None:
                return clip
            # The floors know meshes alone: neither rig controls nor a head that turns.
            return replace(clip, controls=torch.zeros_like(clip.controls), pose=torch.zeros_like(clip.pose))

        clips = map(moved, truths(data, split))
        return score_speech(clips, bound, data.regions, data.topology.get("triangles"), judges)

    neutral = {"system": "neutral", "title": "Neutral face", "role": "floor"}
    yield neutral, score(neutral_motion), bound
    moving = {"system": "mean-motion", "title": "Mean motion", "role": "floor"}
    yield moving, score(lambda truth, template: mean_motion(truth, template, mean)), bound
    truth_row = {"system": "ground-truth", "title": "Ground truth", "role": "ceiling"}
    yield truth_row, score(lambda truth, template: truth), bound
