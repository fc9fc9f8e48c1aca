"""MeshTalk: 3D face animation from speech using cross-modality disentanglement (Richard et al., ICCV 2021).

The claim: what sound tells of a face (the mouth) and what it does not (brows, blinks) can be taken apart in one
categorical latent space, by asking that a mouth follow its own sound whoever's expression is fed in, and an upper face
its own expression whatever the sound; an autoregressive prior over that space then animates the whole face.

What stands here follows the official code (facebookresearch/meshtalk, commit 0904602). Training has two stages. First
an encoder of expressions (meshes through an LSTM) and one of sound (a second of it around every frame) give the logits
of a few categorical variables, the heads; a straight-through Gumbel-softmax makes them one-hot, and a U-Net turns them
and the template into the moving mesh. Then, with these frozen, a masked convolutional prior learns the codes of a frame
from the sound and the codes before, over time and over heads. To animate, codes are drawn head by head and frame by
frame, and forehead and neck are smoothed over time.

Two traits of the official prior are kept. Each of its six layers sees the heads *before* a head, never itself, so that
a head's logits depend on labels of the same frame six heads earlier and before, and on the last head's never, in no
frame. And its outermost layers hear no sound.

Deliberate differences:

- Windows of sound slide over a clip's energies, on multiples of 10 ms; see :mod:`trainers.nets.audio_windows`.
- The U-Net encodes a template once for a clip, not in every frame, and where a loss looks at some vertices alone, only
  those are decoded: the same numbers for less work.
- Mean and spread of the vertices are those of the training clips; officially they come with the code.
- A batch's clips can be shorter than a segment; losses are means over real frames. A batch of one clip has no other
  clip to exchange inputs with, and no cross-modality loss.
- Training starts near the template, with codes that matter: beside PyTorch's, the initial weights of the U-Net's last
  layer are a hundredth, those of its LSTM four times and those of the logits five times as large.
- Of a large mesh, some vertices drawn anew for every step can stand for all in the reconstruction loss.
- The learning rate falls at given epochs, officially at given iterations.
- The demo hears by its frozen speech encoder and a linear layer (``encoder: demo:speech``): a minute is too short to
  learn to hear from mel energies. A learning rate of its own for the layers that read vertices is the demo's, too.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, linear, nll_loss, one_hot, pad
from torch.nn.utils.rnn import pad_sequence

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from datamodules.stream import Loader
from trainers.measuring import split_clips
from trainers.nets.audio_windows import WindowEncoder
from trainers.nets.speech_encoder import Alignment
from trainers.stages import Staged
from trainers.tasks import Condition, SpeechToMesh, SystemInfo

SLOPE = 0.2  # of every leaky ReLU


class MeshTalk(Staged, SpeechToMesh):
    """MeshTalk as a trainable system.

    Its masks are regions of the data (weight 1) or text files with a weight for each vertex, as the official ones.

    Args:
        num_vertices: V of the mesh.
        subjects: training subjects; the network does not tell them apart.
        fps: frames per second of the data.
        mouth: mask of what must follow the sound.
        eyes: mask of what must follow the expression.
        eye_landmarks: mask of the vertices whose error counts once more.
        smooth: masks of what is smoothed over time in an animation: forehead and neck.
        encoder: of the sound: ``mel100:80``, or backbone specification of a speech encoder, frozen.
        heads: H, categorical variables of a frame.
        classes: C, values of each.
        audio_width: of the convolutions over mel energies.
        audio_dim: of the code of sound.
        expression_widths: of the two layers of the expression encoder; the second is its LSTM's.
        expression_dim: of the code of an expression.
        fusion_width: of the layers that make logits of the two codes.
        unet_widths: of the U-Net's layers; the last is its LSTM's.
        prior_width: of the prior's layers, for each head.
        dropout: in the encoder of sound, while training.
        segments: frames of a training clip in each stage.
        stage_epochs: of the first stage.
        decay_epochs: the epoch, counted from the start of the run, in which each stage's learning rate falls to a
            tenth; never where not given.
        sampled_vertices: how many vertices the reconstruction loss looks at in a step; all where not given.
        weight_decay: of the U-Net.
        temperature: scales the noise of the draws; 0 takes the likeliest code.
        samples: animations to draw for each clip.
        unit: metres; losses are measured in it, 0.001 for millimetres.
        lr: learning rate of Adam.
        vertex_lr: learning rate of the two layers that read all vertices, whose output a step moves the more the more
            vertices there are; ``lr`` where not given.
    """

    info = SystemInfo(
        name="meshtalk",
        title="MeshTalk",
        task="speech-to-mesh",
        paper="Richard et al., MeshTalk: 3D Face Animation from Speech using Cross-Modality Disentanglement, ICCV",
        year=2021,
        url="https://arxiv.org/abs/2104.08223",
        basis="official code",
    )
    conditions: ClassVar[tuple[Condition, ...]] = ()
    mean: Tensor
    spread: Tensor
    smooth_masks: Tensor

    def __init__(
        self,
        num_vertices: int,
        subjects: list[str],
        fps: float = 30.0,
        mouth: str = "lips",
        eyes: str = "upper_face",
        eye_landmarks: str = "eyelids",
        smooth: list[str] | None = None,
        encoder: str = "mel100:80",
        heads: int = 16,
        classes: int = 128,
        audio_width: int = 128,
        audio_dim: int = 128,
        expression_widths: list[int] | None = None,
        expression_dim: int = 128,
        fusion_width: int = 256,
        unet_widths: list[int] | None = None,
        prior_width: int = 64,
        dropout: float = 0.2,
        segments: list[int] | None = None,
        stage_epochs: list[int] | None = None,
        decay_epochs: list[int] | None = None,
        sampled_vertices: int | None = None,
        weight_decay: float = 1e-3,
        temperature: float = 1.0,
        samples: int = 1,
        unit: float = 1e-3,
        lr: float = 1e-4,
        vertex_lr: float | None = None,
    ) -> None:
        windows = encoder.startswith("mel100:")
        alignment: Alignment = "native" if windows else "interpolate_states"
        super().__init__(num_vertices, subjects, encoder, alignment, samples=samples)
        self.save_hyperparameters()
        self.fps = fps
        self.loss_masks = {"mouth": mouth, "eyes": eyes, "landmarks": eye_landmarks}
        self.smooth = smooth or []
        self.heads, self.classes = heads, classes
        self.segments = segments or [32, 64]
        self.decay_epochs = decay_epochs
        if decay_epochs is not None and len(decay_epochs) != 2:
            raise UserError(f"model.decay_epochs: {decay_epochs}, expected two epochs, one for each stage")
        self.sampled_vertices = sampled_vertices
        self.weight_decay = weight_decay
        self.temperature = temperature
        self.unit = unit
        self.lr = lr
        self.vertex_lr = vertex_lr or lr
        self.register_buffer("mean", torch.zeros(num_vertices, 3))
        self.register_buffer("spread", torch.ones(num_vertices, 3))
        self.register_buffer("smooth_masks", torch.zeros(len(self.smooth), num_vertices))
        for name in self.loss_masks:
            self.register_buffer(name, torch.zeros(num_vertices), persistent=False)
        self.audio_encoder = (
            WindowEncoder(self.encoder.dim, audio_width, audio_dim, dropout)
            if windows
            else nn.Linear(self.encoder.dim, audio_dim)
        )
        self.expression_encoder = ExpressionEncoder(num_vertices, expression_widths or [256, 128], expression_dim)
        self.fusion = FusionMLP(expression_dim + audio_dim, fusion_width, heads, classes)
        self.unet = VertexUNet(num_vertices, heads * classes, unet_widths or [512, 256, 128])
        self.prior = Prior(heads, classes, audio_dim, prior_width)
        autoencoder: list[nn.Module] = [self.audio_encoder, self.expression_encoder, self.fusion, self.unet]
        self.plan_stages(stage_epochs or [1], [autoencoder, [self.prior]])

    @property
    def frame_rate(self) -> float:
        """That of the audio windows."""
        return self.fps

    def setup(self, stage: str) -> None:
        """Also takes masks, mean and spread of the vertices from the data.

        Raises:
            UserError: a mask is neither a region of the data nor a file.
        """
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage != "fit":
            return
        for name, mask in self.loss_masks.items():
            self.get_buffer(name).copy_(vertex_mask(mask, data))
        for row, mask in zip(self.smooth_masks, self.smooth, strict=True):
            row.copy_(vertex_mask(mask, data))
        mean, spread = vertex_statistics(data.loader("train", whole=True))
        self.mean.copy_(mean)
        self.spread.copy_(spread)

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """First stage: reconstruction, landmark and cross-modality losses; second: the codes' cross-entropy."""
        frames = min(self.segments[self.stage], int(batch.lengths.max()))
        latest = (batch.lengths - frames).clamp(min=0)
        first = (torch.rand(len(batch), device=latest.device) * (latest + 1)).long()
        chosen = first[:, None] + torch.arange(frames, device=first.device)
        real = chosen < batch.lengths[:, None]
        vertices = batch.vertices.take_along_dim(chosen[..., None, None], dim=1)
        if self.stage == 0:
            audio = self.hear(batch, frames, first)
            losses = self.autoencoder_losses(batch.template, vertices, audio, real)
        else:
            # A frozen encoder drops nothing.
            self.audio_encoder.eval()
            with torch.no_grad():
                audio = self.hear(batch, frames, first)
            losses = {"cross_entropy": self.prior_loss(vertices, audio, real)}
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(batch))
        return torch.stack(list(losses.values())).sum()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, with weight decay on the U-Net alone."""
        unet, readers = list(self.unet.parameters()), [self.expression_encoder.layers[0], self.unet.encoder[0]]
        wide = {id(parameter) for layer in readers for parameter in layer.parameters()}
        decayed = {id(parameter) for parameter in unet}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.stage_parameters(0) if id(p) not in wide | decayed]},
            {"params": [p for p in unet if id(p) not in wide], "weight_decay": self.weight_decay},
            {"params": list(readers[0].parameters()), "lr": self.vertex_lr},
            {"params": list(readers[1].parameters()), "lr": self.vertex_lr, "weight_decay": self.weight_decay},
            {"params": self.stage_parameters(1)},
        ]
        optimizer = torch.optim.Adam(groups, lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, self._decay)}

    def _decay(self, epoch: int) -> float:
        ends = [*self._borders, math.inf]
        firsts = self.decay_epochs or ends
        return 0.1 if any(first <= epoch < end for first, end in zip(firsts, ends, strict=True)) else 1.0

    @torch.no_grad()
    def animate(self, batch: SpeechBatch) -> Tensor:
        """Draws codes and decodes them; see :meth:`SpeechToMesh.animate`."""
        audio = self.hear(batch, batch.vertices.shape[1])
        shape = (self.heads, self.classes)
        draws = zip(batch.lengths.tolist(), self.generators(batch), strict=True)
        uniform = pad_sequence([torch.rand(n, *shape, generator=g) for n, g in draws], batch_first=True)
        labels = self.prior.sample(audio, self.temperature * gumbel(uniform).to(audio))
        vertices = self.decode(batch.template, one_hot(labels, self.classes).float())
        for mask in self.smooth_masks:
            vertices = smooth_over_time(vertices, mask, batch.lengths)
        return vertices

    def hear(self, batch: SpeechBatch, frames: int, first: Tensor | None = None) -> Tensor:
        """Codes of the sound around each of ``frames`` frames from frame ``first`` (B,): (B, frames, audio_dim)."""
        states, lengths = self.encode(batch)
        if isinstance(self.audio_encoder, WindowEncoder):
            return self.audio_encoder.at_frames(states, lengths, frames, self.fps, first)
        if first is not None:
            chosen = first[:, None] + torch.arange(frames, device=first.device)
            states = states.take_along_dim(chosen.clamp(max=states.shape[1] - 1)[..., None], dim=1)
        return self.audio_encoder(states)

    def see(self, vertices: Tensor) -> Tensor:
        """Codes of the expressions of meshes (B, T, V, 3): (B, T, expression_dim)."""
        return self.expression_encoder(((vertices - self.mean) / self.spread).flatten(2))

    def decode(self, template: Tensor, codes: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Meshes of codes.

        Args:
            template: (B, V, 3) metres.
            codes: (B, T, H, C), one-hot.
            chosen: indices of the vertices wanted; all where not given.

        Returns:
            (B, T, V, 3) metres, or of the chosen vertices.
        """
        standard = ((template - self.mean) / self.spread).flatten(1)
        chosen = torch.arange(self.num_vertices, device=template.device) if chosen is None else chosen
        decoded = self.unet(standard, codes.flatten(2), chosen)
        return decoded * self.spread[chosen] + self.mean[chosen]

    def autoencoder_losses(
        self,
        template: Tensor,
        vertices: Tensor,
        audio: Tensor,
        real: Tensor,
        uniform: Tensor | None = None,
        shifts: tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of the first stage, mean squares in :attr:`unit`.

        Args:
            template: (B, V, 3) metres.
            vertices: (B, T, V, 3) metres.
            audio: (B, T, audio_dim) codes of the sound.
            real: (B, T) bool.
            uniform: (3, B, T, H, C) draws in [0, 1) for the three reconstructions; drawn where not given.
            shifts: how many clips further the exchanged expression and the exchanged sound are; drawn where not given.

        Returns:
            ``reconstruction``, ``landmarks`` and, of more than one clip, ``modality_crossing``.
        """
        clips = len(vertices)
        shape = (3, *audio.shape[:2], self.heads, self.classes)
        uniform = torch.rand(shape, device=audio.device) if uniform is None else uniform
        expression = self.see(vertices)

        def error(expression: Tensor, audio: Tensor, draws: Tensor, chosen: Tensor) -> Tensor:
            codes, _ = quantise(self.fusion(expression, audio), draws)
            difference = (self.decode(template, codes, chosen) - vertices[:, :, chosen]) / self.unit
            return difference[real].square()

        every = torch.arange(self.num_vertices, device=audio.device)
        seen = every if self.sampled_vertices is None else torch.randperm(len(every))[: self.sampled_vertices].to(every)
        own = error(expression, audio, uniform[0], seen)
        losses = {"reconstruction": own.mean(), "landmarks": weighted_mean(own, self.get_buffer("landmarks")[seen])}
        if clips > 1:
            shifts = shifts or tuple(torch.randint(1, clips, (2,)).tolist())
            crossings = (
                (expression.roll(-shifts[0], dims=0), audio, uniform[1], self.get_buffer("mouth")),
                (expression, audio.roll(-shifts[1], dims=0), uniform[2], self.get_buffer("eyes")),
            )
            terms = []
            for crossed_expression, crossed_audio, draws, mask in crossings:
                (chosen,) = mask.nonzero(as_tuple=True)
                terms.append(weighted_mean(error(crossed_expression, crossed_audio, draws, chosen), mask[chosen]))
            losses["modality_crossing"] = terms[0] + terms[1]
        return losses

    def prior_loss(self, vertices: Tensor, audio: Tensor, real: Tensor) -> Tensor:
        """The loss of the second stage: cross-entropy of the likeliest codes of real clips.

        Args:
            vertices: (B, T, V, 3) metres.
            audio: (B, T, audio_dim) codes of the sound.
            real: (B, T) bool.
        """
        with torch.no_grad():
            codes, labels = quantise(self.fusion(self.see(vertices), audio))
        return nll_loss(self.prior(codes, audio)[real].flatten(0, 1), labels[real].flatten())

    @torch.no_grad()
    def measurements(self, data: SpeechDataModule) -> dict[str, dict[str, float]]:
        """How far (mm) a test clip's lips and upper face move when its expression or its sound is another clip's.

        The other is the next clip of the split, as long as both last.
        """
        series: dict[str, dict[str, float]] = {}
        clips = list(split_clips(data))
        codes = [(self.see(clip.vertices), self.hear(clip, clip.vertices.shape[1])) for clip in clips]
        for i, (clip, (expression, audio)) in enumerate(zip(clips, codes, strict=True)):
            other_expression, other_audio = codes[(i + 1) % len(clips)]
            frames = min(expression.shape[1], other_expression.shape[1])
            inputs = {
                "own": (expression, audio),
                "expression": (other_expression, audio),
                "audio": (expression, other_audio),
            }
            meshes = {}
            for name, (seen, heard) in inputs.items():
                chosen, _ = quantise(self.fusion(seen[:, :frames], heard[:, :frames]))
                meshes[name] = self.decode(clip.template, chosen)
            for region in ("lips", "upper_face"):
                vertices = data.region(region)
                for name in ("expression", "audio"):
                    moved = (meshes[name] - meshes["own"])[:, :, vertices].norm(dim=-1).mean() * 1e3
                    series.setdefault(f"{region}_by_{name}", {})[clip.key[0]] = moved.item()
        return series


class ExpressionEncoder(nn.Module):
    """Standardised meshes through two layers and an LSTM.

    Args:
        num_vertices: V.
        widths: of the layers; the last is the LSTM's.
        dim: of a code.
    """

    def __init__(self, num_vertices: int, widths: list[int], dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([num_vertices * 3, *widths]))
        self.lstm = nn.LSTM(widths[-1], widths[-1], batch_first=True)
        self.code = nn.Linear(widths[-1], dim)

    def forward(self, meshes: Tensor) -> Tensor:
        """(B, T, V·3) -> (B, T, dim)."""
        for layer in self.layers:
            meshes = leaky_relu(layer(meshes), SLOPE)
        return self.code(self.lstm(meshes)[0])


class FusionMLP(nn.Module):
    """Codes of expression and sound to log-probabilities of H heads with C classes.

    Args:
        dim: of both codes together.
        width: of the two hidden layers.
        heads: H.
        classes: C.
    """

    def __init__(self, dim: int, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.mlp = nn.Sequential(
            nn.Linear(dim, width),
            nn.LeakyReLU(SLOPE),
            nn.Linear(width, width),
            nn.LeakyReLU(SLOPE),
            nn.Linear(width, heads * classes),
        )
        with torch.no_grad():
            self.mlp[-1].get_parameter("weight").mul_(5)

    def forward(self, expression: Tensor, audio: Tensor) -> Tensor:
        """(B, T, expression_dim) and (B, T, audio_dim) -> (B, T, H, C)."""
        logits = self.mlp(torch.cat([expression, audio], dim=-1))
        return logits.unflatten(-1, (self.heads, -1)).log_softmax(dim=-1)


class VertexUNet(nn.Module):
    """A standardised template and codes to standardised meshes.

    Its skips add what entered each layer on the way down, also the template itself.

    Args:
        num_vertices: V.
        code_dim: H·C.
        widths: of the layers on the way down; the last is the LSTM's.
    """

    def __init__(self, num_vertices: int, code_dim: int, widths: list[int]) -> None:
        super().__init__()
        sizes = [num_vertices * 3, *widths]
        self.encoder = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.fusion = nn.Linear(code_dim + widths[-1], widths[-1])
        self.temporal = nn.LSTM(widths[-1], widths[-1], num_layers=2, batch_first=True)
        self.decoder = nn.ModuleList(nn.Linear(b, a) for a, b in list(pairwise(sizes))[::-1])
        self.vertex_bias = nn.Parameter(torch.zeros(num_vertices * 3))
        with torch.no_grad():
            for parameter in self.decoder[-1].parameters():
                parameter.mul_(0.01)
            for name, parameter in self.temporal.named_parameters():
                if name.startswith("weight"):
                    parameter.mul_(4)

    def forward(self, template: Tensor, codes: Tensor, chosen: Tensor) -> Tensor:
        """(B, V·3) and (B, T, H·C) -> (B, T, chosen, 3): the vertices whose indices are chosen."""
        x, skips = template[:, None], []
        for layer in self.encoder:
            skips.append(x)
            x = leaky_relu(layer(x), SLOPE)
        x = torch.cat([x.expand(-1, codes.shape[1], -1), codes], dim=-1)
        x, _ = self.temporal(leaky_relu(self.fusion(x), SLOPE))
        for layer in self.decoder[:-1]:
            x = skips.pop() + leaky_relu(layer(x), SLOPE)
        rows = (3 * chosen[:, None] + torch.arange(3, device=chosen.device)).flatten()
        weight, bias = (self.decoder[-1].get_parameter(name)[rows] for name in ("weight", "bias"))
        x = skips.pop()[..., rows] + leaky_relu(linear(x, weight, bias), SLOPE)
        return (x + self.vertex_bias[rows]).unflatten(-1, (-1, 3))


class Prior(nn.Module):
    """The codes of a frame from the sound, the frames before and the heads before.

    Args:
        heads: H.
        classes: C.
        audio_dim: of the codes of sound.
        width: of a layer, for each head.
    """

    DILATIONS = (1, 2, 4, 8)

    def __init__(self, heads: int, classes: int, audio_dim: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = MaskedLayer(heads, classes, width)
        self.context_layers = nn.ModuleList(
            MaskedLayer(heads, width, width, audio_dim, dilation) for dilation in self.DILATIONS
        )
        self.logits = MaskedLayer(heads, width, classes)

    def forward(self, codes: Tensor, audio: Tensor) -> Tensor:
        """Log-probabilities of every code, given those before it.

        Args:
            codes: (B, T, H, C), one-hot.
            audio: (B, T, audio_dim).

        Returns:
            (B, T, H, C).
        """
        x = self.embedding(codes.flatten(2))
        for layer in self.context_layers:
            x = leaky_relu(layer(x, audio), SLOPE)
        return self.logits(x).unflatten(-1, (self.heads, -1)).log_softmax(dim=-1)

    def sample(self, audio: Tensor, noise: Tensor) -> Tensor:
        """Draws codes head by head and frame by frame.

        As no layer mixes a head with itself, a head goes through all layers at once, each from the heads that its
        input already has; what the frames before and the sound add is computed once for a frame.

        Args:
            audio: (B, T, audio_dim).
            noise: (B, T, H, C), added to the log-probabilities: Gumbel noise to sample, zeros to take the likeliest.

        Returns:
            (B, T, H) int64 labels.
        """
        layers = [self.embedding, *self.context_layers, self.logits]
        slices = [layer.head_weights() for layer in layers]
        heard = [layer.audio(audio) if layer.dilation else None for layer in layers]
        clips, frames = audio.shape[:2]
        # A layer's past inputs, behind the zeros that stand for what was before the clip.
        inputs = [
            audio.new_zeros(clips, max(self.DILATIONS) + 1 + frames, layer.inputs * self.heads) for layer in layers
        ]
        labels = torch.zeros(clips, frames, self.heads, dtype=torch.int64, device=audio.device)
        for t in range(frames):
            now = t + max(self.DILATIONS) + 1
            bases = [
                layer.base(past, now, None if sound is None else sound[:, t]).unflatten(-1, (self.heads, -1))
                for layer, past, sound in zip(layers, inputs, heard, strict=True)
            ]
            for head in range(self.heads):
                for i, layer in enumerate(layers):
                    before = inputs[i][:, now, : head * layer.inputs]
                    y = torch.addmm(bases[i][:, head], before, slices[i][head])
                    if i == len(layers) - 1:
                        label = (y.log_softmax(-1) + noise[:, t, head]).argmax(-1)
                        labels[:, t, head] = label
                        inputs[0][:, now, head * y.shape[-1] : (head + 1) * y.shape[-1]] = one_hot(label, y.shape[-1])
                    else:
                        y = leaky_relu(y, SLOPE) if layer.dilation else y
                        inputs[i + 1][:, now, head * y.shape[-1] : (head + 1) * y.shape[-1]] = y
        return labels


class MaskedLayer(nn.Module):
    """A layer of the prior: a head's outputs see the heads before it in this frame, and all heads of earlier frames.

    Args:
        heads: H.
        inputs: of each head.
        outputs: of each head.
        audio_dim: of the codes of sound, which a layer with a past hears.
        dilation: how far apart the two earlier frames are that it sees, the nearer one the last; 0 for none.
    """

    mask: Tensor

    def __init__(self, heads: int, inputs: int, outputs: int, audio_dim: int = 0, dilation: int = 0) -> None:
        super().__init__()
        self.heads, self.inputs, self.outputs, self.dilation = heads, inputs, outputs, dilation
        self.masked_linear = nn.Linear(heads * inputs, heads * outputs)
        self.register_buffer("mask", head_mask(heads, inputs, outputs), persistent=False)
        if dilation:
            self.audio = nn.Linear(audio_dim, heads * outputs)
            self.historic = nn.Conv1d(heads * inputs, heads * outputs, kernel_size=2, dilation=dilation)

    def forward(self, x: Tensor, audio: Tensor | None = None) -> Tensor:
        """(B, T, H·inputs) and (B, T, audio_dim) -> (B, T, H·outputs)."""
        y = linear(x, self.masked_linear.weight * self.mask, self.masked_linear.bias)
        if self.dilation:
            y = y + self.audio(audio) + self.historic(pad(x[:, :-1].mT, (self.dilation + 1, 0))).mT
        return y

    def base(self, past: Tensor, now: int, heard: Tensor | None) -> Tensor:
        """What a frame's outputs are without the frame's own codes: (B, H·outputs).

        Args:
            past: (B, N, H·inputs), of all frames.
            now: number of the frame in it.
            heard: (B, H·outputs), what the sound adds.
        """
        if heard is None:
            return self.masked_linear.bias.expand(len(past), -1)
        far, near = self.historic.weight.unbind(-1)
        y = linear(past[:, now - 1], near, self.historic.bias) + linear(past[:, now - 1 - self.dilation], far)
        return self.masked_linear.bias + heard + y

    def head_weights(self) -> list[Tensor]:
        """For each head the weights of the heads before it, (head·inputs, outputs)."""
        rows = self.masked_linear.weight.split(self.outputs)
        return [row[:, : head * self.inputs].T for head, row in enumerate(rows)]


def head_mask(heads: int, inputs: int, outputs: int) -> Tensor:
    """1 where an output's head is after an input's head: (heads·outputs, heads·inputs)."""
    return torch.ones(heads, heads).tril(-1).repeat_interleave(outputs, dim=0).repeat_interleave(inputs, dim=1)


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise of uniform draws in [0, 1)."""
    return -(-uniform.clamp(min=1e-10).log()).log()


def quantise(logprobs: Tensor, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One-hot codes with the gradient of a softmax (straight-through; temperature 1).

    Args:
        logprobs: (..., C).
        uniform: (..., C) draws in [0, 1) that sample by Gumbel noise; the likeliest where not given.

    Returns:
        codes (..., C), one-hot up to rounding, and labels (...) int64.
    """
    soft = (logprobs if uniform is None else logprobs + gumbel(uniform)).softmax(dim=-1)
    labels = soft.argmax(dim=-1)
    return one_hot(labels, soft.shape[-1]) - soft.detach() + soft, labels


def weighted_mean(error: Tensor, weights: Tensor) -> Tensor:
    """Mean of errors (N, V, 3) with weights (V,); 0 where these are."""
    return (error.mean(dim=(0, 2)) * weights).sum() / weights.sum().clamp(min=1e-8)


def smooth_over_time(vertices: Tensor, mask: Tensor, lengths: Tensor, taps: int = 9, sigma: float = 2.0) -> Tensor:
    """Blends meshes with their Gaussian smoothing over time; a clip's first and last frame go on beyond it.

    Args:
        vertices: (B, T, V, 3).
        mask: (V,) in [0, 1], 1 where a vertex is smoothed.
        lengths: (B,) int64, frames.
        taps: of the filter, odd.
        sigma: of the filter, in frames.

    Returns:
        (B, T, V, 3).
    """
    (chosen,) = mask.nonzero(as_tuple=True)
    part, weights = vertices[:, :, chosen], mask[chosen, None]
    offsets = torch.arange(taps, device=mask.device) - taps // 2
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    frame = torch.arange(vertices.shape[1], device=mask.device)
    smoothed = torch.zeros_like(part)
    for offset, weight in zip(offsets, kernel / kernel.sum(), strict=True):
        neighbour = (frame + offset).clamp(min=0).minimum(lengths[:, None] - 1)
        smoothed += weight * part.take_along_dim(neighbour[..., None, None], dim=1)
    vertices = vertices.clone()
    vertices[:, :, chosen] = smoothed * weights + part * (1 - weights)
    return vertices


def vertex_mask(name: str, data: SpeechDataModule) -> Tensor:
    """Weights (V,) of a mask: a region of the data, or a text file of V numbers.

    Raises:
        UserError: it is neither.
    """
    if name in data.regions:
        return torch.zeros(data.num_vertices).index_fill(0, data.region(name).long(), 1.0)
    if not Path(name).is_file():
        raise UserError(
            f"model: mask '{name}' is neither a file nor a region of {data.root} ({', '.join(data.regions)})"
        )
    try:
        weights = torch.from_numpy(np.loadtxt(name, dtype=np.float32, delimiter=None).flatten())
    except ValueError as error:
        raise UserError(f"{name}: expected one number for each vertex ({error})") from error
    if len(weights) != data.num_vertices:
        raise UserError(f"{name}: {len(weights)} weights, but {data.root} has meshes of {data.num_vertices} vertices")
    return weights


def vertex_statistics(loader: Loader) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every coordinate over all frames, two of (V, 3).

    A coordinate that hardly varies gets a thousandth of the mean deviation.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in loader:
        frames = batch.vertices[batch.frame_mask].double()
        count += len(frames)
        total = total + frames.sum(0)
        squares = squares + frames.square().sum(0)
    mean = total / count
    spread = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.float(), spread.clamp(min=1e-3 * float(spread.mean())).float()


def from_official(
    encoder: Mapping[str, Tensor],
    geom_unet: Mapping[str, Tensor],
    context_model: Mapping[str, Tensor],
    smooth_masks: Tensor,
) -> dict[str, Tensor]:
    """Renames the official ``encoder.pkl``, ``vertex_unet.pkl`` and ``context_model.pkl`` to a :class:`MeshTalk`'s.

    ==================================================  ==================================
    official                                            here
    ==================================================  ==================================
    encoder: ``audio_encoder.*``                        ``audio_encoder.*``
    encoder: ``expression_encoder.mean, stddev``        ``mean, spread``
    encoder: ``expression_encoder.*``                   ``expression_encoder.*``
    encoder: ``fusion_model.*``                         ``fusion.*``
    geom_unet: ``*``                                    ``unet.*``
    context_model: ``*.masked_linear.weight`` (.., 1)   ``prior.*.masked_linear.weight``
    context_model: ``*.unmasked_linear.weight``         ``prior.*.audio.weight``
    context_model: ``*.historic.*``                     ``prior.*.historic.*``
    ==================================================  ==================================

    Left out: the mel front-end, the U-Net's mean and deviation (the encoder's again), the masks of heads (they follow
    from the sizes), and what the prior's outermost layers have for sound and never use.

    Args:
        encoder: state dict of the multimodal encoder.
        geom_unet: of the U-Net.
        context_model: of the prior.
        smooth_masks: (M, V) weights of forehead and neck, which official checkpoints do not hold.
    """
    state = {"smooth_masks": smooth_masks}
    for key, value in encoder.items():
        if key.endswith(("expression_encoder.mean", "expression_encoder.stddev")):
            state["mean" if key.endswith("mean") else "spread"] = value[0, 0]
        elif "melspec" not in key:
            state[key.replace("fusion_model.", "fusion.")] = value
    state |= {f"unet.{key}": value for key, value in geom_unet.items() if key not in ("mean", "stddev")}
    for key, value in context_model.items():
        outermost = key.startswith(("embedding.unmasked", "logits.unmasked"))
        if not key.endswith("mask") and not outermost:
            key = key.replace("unmasked_linear", "audio")
            state[f"prior.{key}"] = value if "historic" in key or value.dim() == 1 else value[..., 0]
    return state
