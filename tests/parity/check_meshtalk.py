"""MeshTalk: mel front-end, encoders, quantisation, U-Net, prior teacher-forced and sampled, both stages, smoothing."""

import pytest
import torch
from goldens import Golden
from torch.nn.functional import one_hot, pad

from trainers import backbones
from trainers.nets.audio_windows import SAMPLE_RATE, WindowMel, frame_middles
from trainers.speech.meshtalk import MeshTalk, from_official, gumbel, quantise, smooth_over_time

RENAMED = {"encoder.fusion_model": "fusion", "geom_unet": "unet", "unmasked_linear": "audio"}
RENAMED |= {f"encoder.{name}": name for name in ("audio_encoder", "expression_encoder")}


def build(golden: Golden) -> MeshTalk:
    """The golden's network in evaluation mode, with its masks; hidden widths are those of its weights."""
    config, weights = golden.config, golden.weights
    encoder, unet = golden.weights_under("encoder."), golden.weights_under("geom_unet.")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones, "load", lambda spec, kind: WindowMel(golden.io["logmel"].shape[2]))
        system = MeshTalk(
            num_vertices=config["n_vertices"],
            subjects=["anyone"],
            smooth=["smooth"],
            heads=config["heads"],
            classes=config["classes"],
            audio_width=len(encoder["audio_encoder.convert_dimensions.bias"]),
            audio_dim=config["audio_dim"],
            expression_widths=[len(encoder[f"expression_encoder.layers.{i}.bias"]) for i in (0, 1)],
            expression_dim=config["expression_dim"],
            fusion_width=len(encoder["fusion_model.mlp.0.bias"]),
            unet_widths=[len(unet[f"encoder.{i}.bias"]) for i in (0, 1, 2)],
            prior_width=len(weights["context_model.embedding.masked_linear.bias"]) // config["heads"],
            unit=1.0,
        )
    state = from_official(encoder, unet, golden.weights_under("context_model."), golden.io["smooth_mask"][None])
    system.load_state_dict(state)
    for name, recorded in {"mouth": "mouth_mask", "eyes": "eye_mask", "landmarks": "landmarks"}.items():
        system.get_buffer(name).copy_(golden.io[recorded])
    return system.eval()


def check(golden: Golden) -> None:
    io, system = golden.io, build(golden)
    chunks, vertices, template = io["audio_chunks"], io["geom"], io["template"]
    shape = (system.heads, system.classes)

    def hear(chunks: torch.Tensor) -> torch.Tensor:
        return system.audio_encoder(system.encoder.energies(chunks.flatten(0, 1)))[:, 0].unflatten(0, chunks.shape[:2])

    golden.close("mel_filterbank", system.encoder.filters)
    golden.close("logmel", system.encoder.energies(chunks[:1, 0]).mT[:, None])
    audio, expression = hear(chunks), system.see(vertices)
    golden.close("enc_audio_code", audio)
    golden.close("audio_code_T1", hear(chunks[:, :1]))
    golden.close("enc_expression_code", expression)
    logprobs = system.fusion(expression, audio)
    golden.close("enc_logprobs", logprobs)
    codes, labels = quantise(logprobs)
    golden.close("argmax_labels", labels)
    golden.close("unet_geom", system.decode(template, codes))

    # A head sees the heads before it: the masks that we build are those that the official code stores.
    for name, layer in system.prior.named_modules():
        if hasattr(layer, "mask"):
            assert torch.equal(layer.mask, golden.weights[f"context_model.{name}.mask"][..., 0])
    golden.close("ctx_logprobs", system.prior(one_hot(io["ctx_labels"], system.classes).float(), io["ctx_audio_code"]))
    frames = io["ctx_audio_code"].shape[1]
    uniform = io["ctx_uniforms"].unflatten(0, (frames, system.heads)).permute(2, 0, 1, 3)
    golden.close("ctx_sample_argmax", system.prior.sample(io["ctx_audio_code"], torch.zeros(1, frames, *shape)))
    golden.close("ctx_sample_gumbel", system.prior.sample(io["ctx_audio_code"], gumbel(uniform)))

    # Official chunks are 16000 // 30 samples apart: a frame rate a little above 30.
    middles = frame_middles(int(io["chunk_count"]), SAMPLE_RATE / (SAMPLE_RATE // 30)) * SAMPLE_RATE
    half = SAMPLE_RATE // 2
    sound = pad(io["chunk_in"][0], (half, half))
    cut = [sound[round(middle + 0.01) :][:SAMPLE_RATE] for middle in middles[[0, -1]].tolist()]
    golden.close("chunk_rows_first_last_head", torch.stack(cut)[:, 7000:9000])

    real = torch.ones(vertices.shape[:2], dtype=torch.bool)

    losses = system.autoencoder_losses(template, vertices, hear(chunks), real, io["stage1_uniforms"], (1, 1))
    golden.close("stage1_recon", losses["reconstruction"])
    golden.close("stage1_landmarks", losses["landmarks"])
    golden.close("stage1_modality_crossing", losses["modality_crossing"])
    torch.stack(list(losses.values())).sum().backward()
    # The recorded gradients of the audio encoder hold the second stage's too, which its training never uses.
    loss = system.prior_loss(vertices, hear(chunks), real)
    golden.close("stage2_cross_entropy", loss)
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in system.named_parameters()}
    for recorded in (key for key in io if "_grad." in key):
        name = recorded.split("_grad.")[1]
        for official, ours in RENAMED.items():
            name = name.replace(official, ours)
        name = f"prior.{name}" if recorded.startswith("stage2") else name
        golden.close_gradient(recorded, gradients[name].reshape(io[recorded].shape))

    still, lengths = io["smooth_in"][None], torch.tensor([len(io["smooth_in"])])
    golden.close("smooth_out", smooth_over_time(still, torch.ones(still.shape[2]), lengths)[0])
    golden.close("smooth_out_masked", smooth_over_time(still, system.smooth_masks[0], lengths)[0])
