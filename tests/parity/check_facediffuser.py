"""FaceDiffuser, vertex and rig models: schedule, denoiser, losses with gradients, and whole samplings."""

import re

import pytest
import torch
from diffusers import DDIMScheduler
from goldens import Golden
from torch import Tensor

from datamodules.batches import SpeechBatch
from trainers import backbones, tasks
from trainers.nets.rig import Rig
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.speech import facediffuser
from trainers.speech.facediffuser import FaceDiffuser, FaceDiffuserRig, from_official, official_name, schedule

ALIGNMENTS = {25: "pair_states", 30: "resample_pairs"}
RIGS = {"FaceDiffBeat": "beat", "FaceDiffDamm": "uudamm"}


def build(golden: Golden) -> FaceDiffuser | FaceDiffuserRig:
    """The golden's network in evaluation mode; trained as the official script trains it."""
    config = golden.config
    hubert = {**config["hubert"], "model_type": "hubert"}
    settings = {
        "subjects": [str(i) for i in range(config["n_train_subjects"])],
        "encoder": "path:golden",
        "alignment": ALIGNMENTS[config["output_fps"]],
        "latent_dim": config["latent_dim"],
        "gru_dim": config["gru_latent_dim"],
        "layers": config["num_layers"],
        "diffusion_steps": config["diffusion_steps"],
    }
    controls = [str(i) for i in range(config["vertice_dim"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "load", lambda spec, kind: SpeechEncoder(hubert))
        patch.setattr(tasks, "load_rig", lambda spec: Rig(controls))
        if config["model"] in RIGS:
            system = FaceDiffuserRig("names:golden", 0, variant=RIGS[config["model"]], **settings)
        else:
            system = FaceDiffuser(config["vertice_dim"] // 3, **settings)
    system.load_state_dict(from_official(golden.weights))
    frozen = {key for key, parameter in system.named_parameters() if not parameter.requires_grad}
    assert frozen == {official_name(key, "") for key in config["frozen_parameters"]}
    return system.eval()


def batch(golden: Golden, motion: Tensor) -> SpeechBatch:
    """A batch of one clip; ``motion`` is (1, T, D), vertices or controls."""
    rig = golden.config["model"] in RIGS
    vertices = torch.zeros(1, motion.shape[1], 0, 3) if rig else motion.unflatten(-1, (-1, 3))
    audio = golden.io["audio"]
    return SpeechBatch(
        key=["clip"],
        audio=audio,
        audio_lengths=torch.tensor([audio.shape[1]]),
        vertices=vertices,
        lengths=torch.tensor([motion.shape[1]]),
        template=torch.zeros(1, 0, 3) if rig else golden.io["template"].unflatten(-1, (-1, 3)),
        subject=["anyone"],
        subject_index=golden.io["one_hot"].argmax(-1),
        emotion=torch.zeros(1, dtype=torch.int64),
        intensity=torch.zeros(1, dtype=torch.int64),
        weights=motion if rig else torch.zeros(1, motion.shape[1], 0),
        transcript=[""],
        words=[[]],
        phonemes=[[]],
    )


def check(golden: Golden) -> None:
    io, steps = golden.io, golden.config["diffusion_steps"]
    for count in {int(name) for name in re.findall(r"sched(\d+)_betas", " ".join(io))}:
        check_schedule(golden, schedule(count, count), count)

    system = build(golden)
    states, _ = system.encoder(io["audio"], torch.tensor([io["audio"].shape[1]]))
    golden.close("hubert_last_hidden", states)
    clip = batch(golden, io["x_noised"])
    speech, _ = system.hear(clip)

    def denoise(x: Tensor, step: int) -> Tensor:
        return system.denoise(x, torch.tensor([step]), speech, clip)

    for name, step in ((key, int(key[9:])) for key in io if re.fullmatch(r"denoise_t\d+", key)):
        golden.close(name, denoise(io["x_noised"], step))
    for name in (key for key in io if re.fullmatch(r"\w+_loss_t\d+", key)):
        check_loss(golden, system, *name.split("_loss_t"))

    # The official loop, on vertices or controls themselves.
    noise = io["sampling_noise"]
    x, trajectory, predictions = noise[0], [], []
    with torch.no_grad():
        for row, step in enumerate(reversed(range(steps)), start=1):
            predictions.append(denoise(x, step))
            x = system.scheduler.step(predictions[-1], step, x, eta=1.0, variance_noise=noise[row]).prev_sample
            trajectory.append(x)
        golden.close("sample_trajectory", torch.stack(trajectory))
        golden.close("pred_x0_trajectory", torch.stack(predictions))
        if "sample_skip4" in io:
            first = torch.tensor([steps - 5])
            x = system.scheduler.add_noise(torch.zeros_like(noise[0]), noise[0], first)
            for row, step in enumerate(range(steps - 5, -1, -1), start=1):
                x = system.scheduler.step(denoise(x, step), step, x, eta=1.0, variance_noise=noise[row]).prev_sample
            golden.close("sample_skip4", x)

    # Our own loop, from the same noise.
    rows = iter(noise)
    if isinstance(system, FaceDiffuser):
        basis = torch.linalg.qr(system.denoiser.input_projection.weight.mT).Q
        rows = iter(noise @ basis)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facediffuser, "gaussian", lambda generators, frames, width: next(rows))
        sample = system.animate(clip).flatten(2) if isinstance(system, FaceDiffuser) else system.control(clip)
    golden.close("sample", sample)


def check_schedule(golden: Golden, scheduler: DDIMScheduler, count: int) -> None:
    """The tables of a schedule that are recorded; diffusers computes in single precision."""
    cumulative = scheduler.alphas_cumprod
    before = torch.cat([torch.ones(1), cumulative[:-1]])
    variance = torch.stack([scheduler._get_variance(step, step - 1) for step in range(count)])
    tables = {
        "betas": scheduler.betas,
        "alphas_cumprod": cumulative,
        "sqrt_alphas_cumprod": cumulative.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - cumulative).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": torch.cat([variance[1:2], variance[1:]]).log(),
        "posterior_mean_coef1": scheduler.betas * before.sqrt() / (1 - cumulative),
        "posterior_mean_coef2": (1 - before) * scheduler.alphas.sqrt() / (1 - cumulative),
    }
    for name in (name for name in tables if f"sched{count}_{name}" in golden.io):
        golden.close(f"sched{count}_{name}", tables[name])


def check_loss(golden: Golden, system: FaceDiffuser | FaceDiffuserRig, name: str, number: str) -> None:
    """One recorded loss and its gradients, and the noised motion where it is recorded."""
    io, step = golden.io, torch.tensor([int(number)])
    clip, noise = batch(golden, io[f"{name}_x_start"]), io[f"{name}_noise"]
    if name == "same" and f"q_sample_t{number}" in io:
        golden.close(f"q_sample_t{number}", system.scheduler.add_noise(io["same_x_start"], noise, step))
    system.zero_grad()
    loss = system.loss(*system.hear(clip), clip, step, noise)
    golden.close(f"{name}_loss_t{number}", loss)
    loss.backward()
    last = "vertex_decoder" if isinstance(system, FaceDiffuser) else "control_decoder"
    gradients = {key: parameter.grad for key, parameter in system.named_parameters()}
    prefix = f"{name}_t{number}_grad."
    for recorded in (key for key in io if key.startswith(prefix)):
        golden.close_gradient(recorded, gradients[official_name(recorded.removeprefix(prefix), last)])
