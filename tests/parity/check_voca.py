"""VOCA: losses, batch windows and layer sizes."""

import torch
from goldens import Golden
from torch import Tensor

from trainers.speech.voca import (
    VOCANetwork,
    acceleration_loss,
    offset_regulariser,
    reconstruction_loss,
    velocity_loss,
    window_indices,
)


def check(golden: Golden) -> None:
    io, config = golden.io, golden.config
    error = (io["predicted"] - io["target"])[..., 0]

    def weight(field: str) -> float:
        return float(str(config[field]).split()[0])

    def windows(tensor: Tensor, count: int) -> Tensor:
        return tensor.unflatten(0, (-1, count))

    scales = {"": 1.0, "_mm": 1000.0, "_weighted": io["weights_vx3"]}
    for name in ("abs", "sq"):
        absolute = name == "abs"
        for suffix, scale in scales.items():
            golden.close(f"rec_{name}{suffix}", reconstruction_loss(windows(scale * error, 2), absolute))
        for count in (2, 3):
            velocity = config["velocity_weight"] * velocity_loss(windows(error, count), absolute)
            golden.close(f"velocity_{name}_n{count}", velocity)
        acceleration = weight("acceleration_weight") * acceleration_loss(windows(error, 3), absolute)
        golden.close(f"acceleration_{name}_n3", acceleration)

    regulariser = weight("verts_regularizer_weight") * offset_regulariser(io["expression_offset"][..., 0])
    golden.close("verts_regularizer", regulariser)
    pairs = windows(error, config["num_consecutive_frames_default"])
    golden.close("total_default", reconstruction_loss(pairs) + config["velocity_weight"] * velocity_loss(pairs))
    for name in (key for key in io if key.startswith("window_indices_")):
        frames, count = io[name].shape
        golden.close(name, window_indices(torch.arange(frames), count))

    sizes = [config[key] for key in ("num_audio_features", "training_subjects", "default_num_vertices")]
    network = VOCANetwork(*sizes, config["default_expression_dim"])
    counts = {name: sum(p.numel() for p in layer.parameters()) for name, layer in network.named_children()}
    expected = dict(config["parameter_count"])
    assert sum(counts.values()) == expected.pop("total")
    assert counts == expected
