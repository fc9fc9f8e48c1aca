"""StyleGAN2 against the recorded outputs of the official PyTorch code: networks, losses and gradients."""

import re
from typing import Any

import torch
from torch import Tensor

from trainers.backbone.stylegan2 import (
    discriminator_fake_loss,
    discriminator_real_loss,
    generator_loss,
    path_length_penalty,
    r1_penalty,
)
from trainers.nets.stylegan2 import Discriminator, Generator, from_official


def build(golden: Any) -> tuple[Generator, Discriminator]:
    """Both networks at the golden's sizes, with its weights."""
    config = golden.config
    sizes = {
        "resolution": config["img_resolution"],
        "img_channels": config["img_channels"],
        "c_dim": config["c_dim"],
        "channel_base": config["channel_base"],
        "channel_max": config["channel_max"],
        "clamp": config["conv_clamp"],
        "resample_filter": config["resample_filter"],
    }
    G = Generator(
        z_dim=config["z_dim"],
        w_dim=config["w_dim"],
        mapping_layers=config["mapping_layers"],
        architecture=config["G_architecture"],
        w_avg_beta=config["w_avg_beta"],
        **sizes,
    )
    labels = [name for name in golden.weights if re.fullmatch(r"D\.mapping\.fc\d+\.weight", name)]
    cmap_dim = golden.weights["D.b4.out.weight"].shape[0] if config["c_dim"] else None
    D = Discriminator(
        architecture=config["D_architecture"],
        cmap_dim=cmap_dim,
        mapping_layers=len(labels),
        mbstd_group_size=config["mbstd_group_size"],
        mbstd_channels=config["mbstd_num_channels"],
        **sizes,
    )
    G.load_state_dict(from_official(golden.weights, "G."))
    D.load_state_dict(from_official(golden.weights, "D."))
    return G, D


def check(golden: Any) -> None:
    """Compares everything the card lists."""
    check_networks(golden)
    check_losses(golden)


def check_networks(golden: Any) -> None:
    """Mapping, truncation, synthesis with and without noise, features by block, discriminator."""
    G, D = build(golden)
    io = golden.io
    z, c = io["z"], io.get("c")
    assert G.num_ws == golden.config["num_ws"]

    def label(n: int) -> Tensor | None:
        return None if c is None else c[:n]

    with torch.no_grad():
        ws = G.mapping(z, c)
        golden.close("ws", ws)
        for name in io:
            if match := re.fullmatch(r"ws_psi([\d.]+)(?:_cutoff(\d+))?", name):
                cutoff = match[2] and int(match[2])
                golden.close(name, G.mapping(z, c, float(match[1]), cutoff))
            if match := re.fullmatch(r"G_forward_psi([\d.]+)", name):
                n = len(io[name])
                golden.close(name, G(z[:n], label(n), float(match[1]), noise_mode="const"))
        image = G.synthesis(ws, noise_mode="const")
        golden.close("img", image)
        golden.close("img_nonoise", G.synthesis(ws[: len(io["img_nonoise"])], noise_mode="none"))
        golden.close("img_wplus", G.synthesis(io["wplus"], noise_mode="const"))

        x = rgb = None
        for (block, block_ws), size in zip(G.synthesis.blocks(io["wplus"]), G.synthesis.resolutions, strict=True):
            x, rgb = block(x, rgb, block_ws, noise_mode="const")
            golden.close(f"wplus_x_{size}", x[:1])
            if rgb is not None and f"wplus_rgb_{size}" in io:
                golden.close(f"wplus_rgb_{size}", rgb[:1])

        golden.close("d_logits_fake", D(image, c))
        golden.close("d_logits_real", D(io["real"], c))
        x, rgb = None, io["real"][:1]
        for size in D.resolutions:
            x, rgb = D.get_submodule(f"b{size}")(x, rgb)
            golden.close(f"d_feat_{size}", x)


def check_losses(golden: Any) -> None:
    """Each training phase: reported values, gradients, and the running averages it moves."""
    config, io = golden.config, golden.io
    z, c, real = io["z"], io.get("c"), io["real"]

    def fake(G: Generator, **options: bool) -> Tensor:
        return G.synthesis(G.mapping(z, c, **options), noise_mode="const")

    def scores(phase: str, kind: str, logits: Tensor) -> None:
        golden.close(f"{phase}.Loss/scores/{kind}", logits)
        golden.close(f"{phase}.Loss/signs/{kind}", logits.sign())

    def moved(name: str, before: Tensor, actual: Tensor) -> None:
        # Some recordings hold the value from before the phase (their state was put back too early). They say
        # nothing about the update, which the penalty and the closed form of the average pin down instead.
        if torch.equal(io[name], before):
            assert not torch.equal(actual, before)
        else:
            golden.close(name, actual)

    def gradients(phase: str, G: Generator, D: Discriminator) -> None:
        found = 0
        for prefix, network in (("G", G), ("D", D)):
            for name, parameter in network.named_parameters():
                key = f"{phase}.grad.{prefix}.{name}"
                if key in io:
                    golden.close_gradient(key, parameter.grad)
                    found += 1
        assert found == sum(name.startswith(f"{phase}.grad.") for name in io)

    G, D = build(golden)
    logits = D(fake(G), c)
    loss = generator_loss(logits)
    scores("Gmain", "fake", logits)
    golden.close("Gmain.Loss/G/loss", loss)
    loss.mean().backward()
    gradients("Gmain", G, D)

    G, D = build(golden)
    n = len(z) // config["pl_batch_shrink"]
    ws = G.mapping(z[:n], None if c is None else c[:n])
    penalty, mean = path_length_penalty(
        G.synthesis(ws, noise_mode="const"), ws, io["pl_mean_before"], config["pl_decay"], io["pl_noise_unit"]
    )
    golden.close("Greg.Loss/pl_penalty", penalty)
    golden.close("Greg.Loss/G/reg", penalty * config["pl_weight"])
    moved("Greg.pl_mean_after", io["pl_mean_before"], mean)
    (penalty * config["pl_weight"]).mean().backward()
    gradients("Greg", G, D)

    for phase, main, regularise in (("Dmain", True, False), ("Dreg", False, True), ("Dboth", True, True)):
        G, D = build(golden)
        image = real.clone().requires_grad_(regularise)
        real_logits = D(image, c)
        scores(phase, "real", real_logits)
        total = torch.zeros(())
        if main:
            with torch.no_grad():
                before = G.mapping.w_avg.clone()
                generated = fake(G, update_average=True)
                after = io["ws"][:, 0].mean(dim=0).lerp(before, config["w_avg_beta"])
                torch.testing.assert_close(G.mapping.w_avg, after, rtol=1e-4, atol=1e-5)
                if f"w_avg_after_{phase}" in io:
                    moved(f"w_avg_after_{phase}", before, G.mapping.w_avg)
            fake_logits = D(generated, c)
            scores(phase, "fake", fake_logits)
            loss = discriminator_fake_loss(fake_logits) + discriminator_real_loss(real_logits)
            golden.close(f"{phase}.Loss/D/loss", loss)
            total = total + loss.mean()
        if regularise:
            penalty = r1_penalty(real_logits, image)
            golden.close(f"{phase}.Loss/r1_penalty", penalty)
            golden.close(f"{phase}.Loss/D/reg", penalty * config["r1_gamma"] / 2)
            total = total + (penalty * config["r1_gamma"] / 2).mean()
        total.backward()
        gradients(phase, G, D)
