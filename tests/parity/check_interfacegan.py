"""InterFaceGAN: boundary training, conditional projection, interpolation."""

import numpy as np
import torch
from goldens import Golden

from trainers.editing.interfacegan import choose_extremes, move, project_boundary, train_boundary


def check(golden: Golden) -> None:
    io = golden.io
    codes = io["latent_codes"].numpy()
    seed = golden.config["np_random_seed_before_each_call"]

    for k in sorted(name.removeprefix("scores_") for name in io if name.startswith("scores_")):
        scores = io[f"scores_{k}"].numpy()[:, 0]
        invalid = -99.0 if k == "invalid" else None
        settings = {f"boundary_{k}": (0.1, 0.7), f"boundary_{k}_num": (75, 0.8)}
        for name, (chosen, train_share) in settings.items():
            if name not in io:
                continue
            rows, labels, *_ = choose_extremes(codes, scores, chosen, train_share, np.random.RandomState(seed), invalid)
            recorded = name.removeprefix("boundary_")
            if f"train_x_{recorded}" in io:
                golden.close(f"train_x_{recorded}", rows)
                golden.close(f"train_y_{recorded}", labels)
            normal, accuracy = train_boundary(codes, scores, np.random.RandomState(seed), chosen, train_share, invalid)
            golden.close(name, normal[None])
            assert 0 <= accuracy <= 1

    a, *conditions = (io[f"boundary_{k}"].numpy()[0] for k in "abcd")
    for count in (1, 2, 3):
        golden.close(f"project_{count}", project_boundary(a, np.stack(conditions[:count]))[None])

    def interpolate(code: torch.Tensor, boundary: str, start: float, end: float, name: str) -> None:
        steps = len(io[name])
        codes = code.expand(steps, *code.shape[1:])
        golden.close(name, move(codes, io[boundary][0], torch.linspace(start, end, steps)))

    interpolate(io["latent_codes"][:1], "boundary_a", -3, 3, "interp_z")
    interpolate(io["latent_codes"][5:6], "boundary_b", -1.5, 4, "interp_z_custom")
    interpolate(io["wplus"], "boundary_a", -2, 2, "interp_wplus")
