"""GeneFace: the VAE with flow, without and pooled; the flow alone; losses and gradients; post-net, expert, LLE."""

import torch
from goldens import Golden
from torch.nn.functional import binary_cross_entropy

from trainers.speech.geneface import (
    MotionVAE,
    PostNet,
    SyncExpert,
    continuity_loss,
    discriminator,
    from_official,
    lle_projection,
    mean_over,
    official_name,
)

VARIANTS = {"flow": (True, False), "noflow": (False, False), "sqz": (True, True)}


def check(golden: Golden) -> None:
    io = golden.io
    for variant in VARIANTS:
        check_vae(golden, variant)

    weights = from_official(golden.weights_under("postnet."))
    postnet = PostNet(io["postnet_in"].shape[-1], [len(weights[f"block{i}.0.conv.weight"]) for i in (1, 2)])
    postnet.load_state_dict(weights)
    real = io["postnet_in"].abs().sum(-1) != 0
    golden.close("postnet_out", postnet.eval()(io["postnet_in"], real))

    weights = from_official(golden.weights_under("disc."))
    critic = discriminator(io["postnet_in"].shape[-1], [len(weights["0.weight"]), len(weights["3.weight"])])
    critic.load_state_dict(weights)
    golden.close("disc_out", critic.eval()(io["postnet_in"][real]))

    weights = from_official(golden.weights_under("syncnet."))
    widths = [len(weights[f"ears.{i}.conv.weight"]) for i in (0, 4, 7)]
    mouth_width, mouth_dim, _ = weights["eyes.0.conv.weight"].shape
    expert = SyncExpert(io["sync_hubert"].shape[-1], widths, mouth_width, mouth_dim)
    expert.load_state_dict(weights)
    expert.eval()
    sound, mouth = expert.embed(io["sync_hubert"], io["sync_mouth"])
    similarity = expert(io["sync_hubert"], io["sync_mouth"])
    golden.close("sync_audio_emb", sound)
    golden.close("sync_mouth_emb", mouth)
    golden.close("sync_cos", similarity)
    golden.close("sync_loss", binary_cross_entropy(similarity, io["sync_label"]))
    golden.close("sync_loss_label1", binary_cross_entropy(similarity, torch.ones_like(similarity)))

    for neighbours in (1, 4):
        projected, combination, index = lle_projection(io["lle_feats"], io["lle_database"], neighbours)
        golden.close(f"lle_fused_k{neighbours}", projected)
        golden.close(f"lle_weights_k{neighbours}", combination)
    golden.close("lle_index_k4", index)
    golden.close("lle_errors_k4", (projected - io["lle_feats"]).abs().mean(-1))


def check_vae(golden: Golden, variant: str) -> None:
    io, config = golden.io, golden.config
    use_flow, squeeze = VARIANTS[variant]
    motion_dim = io[f"{variant}_recon"].shape[-1]
    network = MotionVAE(
        audio_dim=config["hubert_dim"],
        motion_dim=motion_dim,
        condition_dim=config["cond_dim"],
        hidden=config["hidden"],
        latent=config["latent"],
        kernel=config["kernel"],
        encoder_layers=config["encoder_layers"],
        decoder_layers=config["decoder_layers"],
        use_flow=use_flow,
        flow_hidden=config["flow_hidden"],
        flow_layers=config["flow_wn_layers"],
        squeeze=squeeze,
        stride=config["stride"],
        flow_kernel=config["flow_kernel"],
        couplings=config["n_flows"],
    )
    network.load_state_dict(from_official(golden.weights_under(f"{variant}.")))
    network.eval()
    motion, mask = io["y"][..., :motion_dim], io["y_mask"] > 0
    # Officially the padding is part of the condition.
    condition = network.condition(io["hubert"], torch.ones_like(mask))
    made = network.reconstruct(motion, condition, mask, io["posterior_noise"])
    golden.close(f"{variant}_recon", made.motion)
    golden.close(f"{variant}_kl", made.kl)
    for name, value in (("m_q", made.mean), ("logs_q", made.log_std), ("z_p", made.prior)):
        golden.close(f"{variant}_{name}", value.mT)

    for name in (key for key in io if key.startswith(f"{variant}_infer_t")):
        temperature = float(name.rpartition("_t")[2])
        drawn = network.sample(condition, temperature * io["prior_noise"])
        golden.close(name, drawn * mask[..., None])

    if network.flow is not None and not squeeze:
        latents = mask[:, None, :: network.stride].float()
        golden.close("flow_forward", network.flow(io["flow_in"], latents, io["flow_cond"]))
        golden.close("flow_reverse_of_forward", network.flow.reverse(io["flow_forward"], io["flow_cond"]))

    if f"{variant}_total" in io:
        error = made.motion - motion
        mse, continuity = mean_over(error.square(), mask), continuity_loss(made.motion, motion, mask)
        golden.close(f"{variant}_mse", mse)
        golden.close(f"{variant}_mae", mean_over(error.abs(), mask))
        golden.close(f"{variant}_continuity", continuity)
        total = 0.5 * made.kl + mse + 3 * continuity
        golden.close(f"{variant}_total", total)
        total.backward()
        gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
        prefix = f"{variant}_grad."
        for recorded in (key for key in io if key.startswith(prefix)):
            golden.close_gradient(recorded, gradients[official_name(recorded.removeprefix(prefix))])
