"""After ExpCLIP: text and facial expressions bridged by semantic alignment (Zhong et al., AAAI 2024, arXiv 2308.14448).

The claim: a CLIP that also knows facial expressions lets a text or an image say how a talking head shall look, in words
it was never trained on; and augmenting speech data by expressions from prompts (EPA) teaches a speech-driven generator
more emotions than its corpus has. That the lips take no harm is what our suite checks.

There is no official code, and the paper's sizes, loss weights and generator are not known to us. What the paper tells
is here: an embedding that texts, images (through CLIP) and expressions share, learned on prompts with blendshapes (TEAD
there, which is not public), a generator whose style it is, and EPA. All else is a reconstruction:

- Stage 1 keeps CLIP frozen and trains small heads behind it and an expression encoder 52 -> 256 -> 512 -> d with a
  mirrored decoder: reconstruction from the expression's and from the text's embedding, symmetric InfoNCE (or cosine)
  between expression and text, and the same for images where the prompts have pictures.
- Stage 2 trains the generator on speech with everything else frozen: a transformer over the states of a speech encoder,
  each frame attending to its neighbourhood, with scale and shift of each normalisation from the style (FiLM). A clip's
  style is the embedding of one of its frames.
- EPA replaces a clip's style by a prompt's: its text's embedding, or that of its expression at a random strength. The
  speech's controls (jaw, mouth, tongue) keep the clip's motion, all others are blended into the prompt's expression.
- Without a prompt the style is that of the neutral expression.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, layer_norm, normalize, scaled_dot_product_attention
from torchvision.ops import MLP

from datamodules.batches import PromptBatch, SpeechBatch
from datamodules.errors import UserError
from datamodules.prompts import PromptDataModule
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.measuring import clip_errors, split_clips
from trainers.nets.contrastive import class_means, contrastive_loss, cosines
from trainers.nets.speech_encoder import TrainedPart
from trainers.stages import Staged
from trainers.tasks import Condition, SpeechToRig, SystemInfo


class ExpCLIP(Staged, SpeechToRig):
    """ExpCLIP as a trainable system.

    Args:
        rig: specification of the controls, see :func:`trainers.nets.rig.load_rig`.
        num_vertices: V of the mesh; 0 for data without meshes.
        subjects: training subjects; all are animated alike.
        encoder: backbone specification of the speech encoder.
        clip: backbone specification of the CLIP.
        prompts: folder of expression prompts to train on, with the rig's controls.
        alignment: how speech states meet frames, one for each.
        embedding: d, width of the space that text, images and expressions share.
        hidden: width of the heads' hidden layer.
        dim: width of the generator.
        layers: of the generator.
        heads: attention heads of the generator.
        reach: frames to either side that a frame attends to.
        dropout: in the generator, while training.
        train_encoder: which part of the speech encoder is trained in stage 2.
        contrast: the alignment loss, ``infonce`` or ``cosine`` (1 - cosine of each pair).
        temperature: of InfoNCE.
        image_weight: of the losses of images, where the prompts have pictures.
        augmentation: probability that a clip is augmented by a prompt (EPA).
        weakest: lower end of an augmenting expression's random strength.
        unprompted: share of augmentations by the neutral expression, which is the style of a clip without a prompt: the
            mouth then follows the voice alone.
        speech_controls: how names of controls begin that belong to the speech.
        velocity_weight: of the loss on steps from frame to frame.
        prompt_batch: prompts in a step of stage 1.
        stage_epochs: epochs of stage 1.
        lr: learning rates of the two stages, of AdamW.
    """

    info = SystemInfo(
        name="expclip",
        title="after ExpCLIP",
        task="speech-to-mesh",
        paper="Zhong et al., ExpCLIP: Bridging Text and Facial Expressions via Semantic Alignment, AAAI",
        year=2024,
        url="https://arxiv.org/abs/2308.14448",
        basis="reconstruction",
    )
    conditions: ClassVar[tuple[Condition, ...]] = ("prompt", "prompt image")
    spoken: Tensor  # (C,) bool, whether a control belongs to the speech

    def __init__(
        self,
        rig: str,
        num_vertices: int,
        subjects: list[str],
        encoder: str,
        clip: str,
        prompts: str,
        alignment: Literal["interpolate", "interpolate_states", "nearest"] = "interpolate_states",
        embedding: int = 512,
        hidden: int = 512,
        dim: int = 256,
        layers: int = 4,
        heads: int = 4,
        reach: int = 30,
        dropout: float = 0.1,
        train_encoder: TrainedPart = "none",
        contrast: Literal["infonce", "cosine"] = "infonce",
        temperature: float = 0.07,
        image_weight: float = 1.0,
        augmentation: float = 0.5,
        weakest: float = 0.5,
        unprompted: float = 0.25,
        speech_controls: Sequence[str] = ("jaw", "mouth", "tongue"),
        velocity_weight: float = 0.5,
        prompt_batch: int = 256,
        stage_epochs: Sequence[int] = (50,),
        lr: Sequence[float] = (1e-3, 1e-4),
    ) -> None:
        super().__init__(
            rig,
            num_vertices,
            subjects,
            encoder=encoder,
            alignment=alignment,
            train_encoder=train_encoder,
        )
        self.save_hyperparameters()
        self.contrast = contrast
        self.temperature = temperature
        self.image_weight = image_weight
        self.augmentation = augmentation
        self.weakest = weakest
        self.unprompted = unprompted
        self.velocity_weight = velocity_weight
        self.prompt_batch = prompt_batch
        self.lr = lr
        self.prompts = prompts
        self.encoder.classifier = None
        self.clip = backbones.load(clip, "clip")
        self.frozen = (*self.frozen, "clip")
        controls = self.rig.controls
        for prefix in speech_controls:
            if not any(name.startswith(prefix) for name in controls):
                raise UserError(f"model.speech_controls: no control of {rig} starts with '{prefix}'")
        spoken = [name.startswith(tuple(speech_controls)) for name in controls]
        self.register_buffer("spoken", torch.tensor(spoken), persistent=False)
        self.space = ExpressionSpace(len(controls), self.clip.model.config.projection_dim, embedding, hidden)
        self.generator = StyledGenerator(self.encoder.dim, len(controls), embedding, dim, layers, heads, reach, dropout)
        self.plan_stages(list(stage_epochs), [[self.space], [self.generator, self.encoder]])

    def setup(self, stage: str) -> None:
        """Also reads the prompts for training, and what CLIP says of them.

        Raises:
            UserError: prompts with other controls than the rig's.
        """
        super().setup(stage)
        if stage == "fit":
            self.known = self.read_prompts("train")
            self.text_features = self.read(self.known.text)
            self.image_features = self.look(self.known.image) if self.known.image.numel() else None
            self.known = replace(self.known, image=self.known.image[:0])  # their features are enough

    def read_prompts(self, split: str) -> PromptBatch:
        """All prompts of a split.

        Raises:
            UserError: they have other controls than the rig.
        """
        data = PromptDataModule(self.prompts, batch_size=1)
        if data.controls != self.rig.controls:
            raise UserError(
                f"model.prompts: {data.root} has other controls ({len(data.controls)}: {', '.join(data.controls[:3])} "
                f"...) than model.rig ({len(self.rig.controls)}: {', '.join(self.rig.controls[:3])} ...), or another "
                "order of them; name prompts made for this rig"
            )
        return data.whole(split)

    @torch.no_grad()
    def read(self, texts: list[str]) -> Tensor:
        """CLIP's embeddings of texts, (N, D)."""
        return torch.cat([self.clip.encode_text(texts[i : i + 256]) for i in range(0, len(texts), 256)])

    @torch.no_grad()
    def look(self, images: Tensor) -> Tensor:
        """CLIP's embeddings of images (N, 3, H, W) in [-1, 1], (N, D)."""
        return torch.cat([self.clip.encode_image(some.to(self.device)) for some in images.split(256)])

    def on_train_start(self) -> None:
        """Also lets each rank draw prompts of its own."""
        super().on_train_start()
        if self.trainer.world_size > 1:
            torch.manual_seed(int(torch.randint(2**31, [])) + self.trainer.global_rank)

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """Stage 1: alignment on random prompts. Stage 2: the generator on the clips, some of them augmented."""
        if self.stage == 0:
            losses = self.align(torch.randint(len(self.known), (self.prompt_batch,)))
        else:
            losses = self.generate(batch)
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, batch_size=len(batch))
        return torch.stack(list(losses.values())).sum()

    def align(self, chosen: Tensor) -> dict[str, Tensor]:
        """Losses of stage 1 on the training prompts ``chosen`` (N,)."""
        weights = self.known.weights[chosen].to(self.device)
        expression = self.space.of_expression(weights)
        views = {"text": self.space.of_text(self.text_features[chosen].to(self.device))}
        if self.image_features is not None:
            views["image"] = self.space.of_image(self.image_features[chosen].to(self.device))
        losses = {"reconstruction": reconstruction_loss(self.space.decode(expression), weights)}
        for name, view in views.items():
            weight = self.image_weight if name == "image" else 1.0
            losses[f"{name}_reconstruction"] = weight * reconstruction_loss(self.space.decode(view), weights)
            losses[f"{name}_alignment"] = weight * self.alignment_loss(expression, view)
        return losses

    def alignment_loss(self, expression: Tensor, view: Tensor) -> Tensor:
        """How far embeddings (N, d) of expressions are from those of their texts or images."""
        if self.contrast == "cosine":
            return (1 - cosine_similarity(expression, view)).mean()
        return contrastive_loss(expression, view, 1 / self.temperature)

    def generate(self, batch: SpeechBatch) -> dict[str, Tensor]:
        """Losses of stage 2: squared errors of controls and of their steps, mean over real frames."""
        states, _ = self.encode(batch)
        style, target = self.augment(batch)
        error = self.generator(states, batch.frame_mask, style) - target
        steps, both = error.diff(dim=1), batch.frame_mask[:, 1:]
        return {
            "controls": error[batch.frame_mask].square().sum(-1).mean(),
            "velocity": self.velocity_weight * steps[both].square().sum(-1).mean(),
        }

    @torch.no_grad()
    def augment(self, batch: SpeechBatch) -> tuple[Tensor, Tensor]:
        """Styles and targets for training: the clips' own, or a prompt's (EPA).

        Returns:
            (B, d) embeddings, and (B, T, C) controls to predict.
        """
        count, device = len(batch), self.device
        frame = (torch.rand(count, device=device) * batch.lengths).long()
        own = self.space.of_expression(batch.weights[torch.arange(count, device=device), frame])
        chosen = torch.randint(len(self.known), (count,))
        neutral = torch.rand(count, 1, device=device) < self.unprompted
        by_text = (torch.rand(count, 1, device=device) < 0.5) & ~neutral
        drawn = self.weakest + (1 - self.weakest) * torch.rand(count, 1, device=device)
        strength = torch.where(by_text | neutral, torch.ones_like(drawn), drawn)
        expression = strength * ~neutral * self.known.weights[chosen].to(device)
        text = self.space.of_text(self.text_features[chosen].to(device))
        prompted = torch.where(by_text, text, self.space.of_expression(expression))
        blended = (1 - strength)[:, None] * batch.weights + expression[:, None]
        augmented = torch.rand(count, 1, device=device) < self.augmentation
        style = torch.where(augmented, prompted, own)
        return style, torch.where(augmented[:, None] & ~self.spoken, blended, batch.weights)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, with a rate for each stage; the speech encoder has the second's."""
        groups = [{"params": self.stage_parameters(stage), "lr": lr} for stage, lr in enumerate(self.lr)]
        return torch.optim.AdamW(groups)

    @torch.no_grad()
    def control(self, batch: SpeechBatch) -> Tensor:
        """See :meth:`SpeechToRig.control`; the style is the prompt's."""
        states, _ = self.encode(batch)
        return self.generator(states, batch.frame_mask, self.prompted_style(batch))

    def prompted_style(self, batch: SpeechBatch) -> Tensor:
        """(B, d): the text prompt's embedding, else the image's, else that of the neutral expression."""
        if batch.prompt_image is not None:
            style = self.space.of_image(self.look(batch.prompt_image))
        else:
            style = self.space.of_expression(batch.audio.new_zeros(len(batch), len(self.rig.controls)))
        told = [i for i, prompt in enumerate(batch.prompt) if prompt]
        if told:
            style = style.index_copy(
                0, torch.tensor(told, device=style.device), self.embed([batch.prompt[i] for i in told])
            )
        return style

    def embed(self, texts: list[str]) -> Tensor:
        """Embeddings of prompts, (N, d)."""
        return self.space.of_text(self.read(texts))

    @torch.no_grad()
    def measurements(self, data: SpeechDataModule) -> dict[str, dict[str, float]]:
        """What unseen wordings do.

        ``retrieval`` and ``image_retrieval``: 1 for a test prompt (or its picture) whose nearest emotion, as the mean
        embedding of the training expressions, is its own, else 0; chance is one in the number of emotions.
        ``lip_error`` and ``prompted_lip_error``: mm, of test clips without a prompt and with a test prompt each.
        ``prompted_difference`` and ``unprompted_difference``: mean absolute difference between the controls that do not
        belong to the speech and those of the clip's test prompt, with that prompt and without.
        """
        known, unseen = self.read_prompts("train"), self.read_prompts("test")
        means = class_means(self.space.of_expression(known.weights), known.emotion, int(known.emotion.max()) + 1)
        series = {"retrieval": nearest_is_own(self.embed(unseen.text), means, unseen)}
        if unseen.image.numel():
            series["image_retrieval"] = nearest_is_own(self.space.of_image(self.look(unseen.image)), means, unseen)
        names = ("lip_error", "prompted_lip_error", "unprompted_difference", "prompted_difference")
        series |= {name: {} for name in names}
        lips = data.region("lips")
        for number, clip in enumerate(split_clips(data)):
            which = number % len(unseen)
            for prompt, error, difference in (("", *names[::2]), (unseen.text[which], *names[1::2])):
                clip.prompt = [prompt]
                controls = self.control(clip)
                series[error] |= clip_errors(self.rig(clip.template, controls), clip, lips)
                off = (controls[0] - unseen.weights[which])[:, ~self.spoken].abs().mean()
                series[difference][clip.key[0]] = off.item()
        return series


class ExpressionSpace(nn.Module):
    """The space that texts, images and expressions share; embeddings are unit vectors.

    Args:
        controls: C of an expression.
        clip_dim: width of CLIP's embeddings.
        embedding: d.
        hidden: width of the heads' hidden layer.
    """

    def __init__(self, controls: int, clip_dim: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.text_head = MLP(clip_dim, [hidden, embedding], activation_layer=nn.GELU)
        self.image_head = MLP(clip_dim, [hidden, embedding], activation_layer=nn.GELU)
        self.expression_encoder = MLP(controls, [256, 512, embedding], activation_layer=nn.GELU)
        self.expression_decoder = MLP(embedding, [512, 256, controls], activation_layer=nn.GELU)

    def of_text(self, features: Tensor) -> Tensor:
        """CLIP's text embeddings (N, D) -> (N, d)."""
        return normalize(self.text_head(normalize(features, dim=-1)), dim=-1)

    def of_image(self, features: Tensor) -> Tensor:
        """CLIP's image embeddings (N, D) -> (N, d)."""
        return normalize(self.image_head(normalize(features, dim=-1)), dim=-1)

    def of_expression(self, weights: Tensor) -> Tensor:
        """Controls (N, C) -> (N, d)."""
        return normalize(self.expression_encoder(weights), dim=-1)

    def decode(self, embedding: Tensor) -> Tensor:
        """(N, d) -> controls (N, C) in [0, 1]."""
        return self.expression_decoder(embedding).sigmoid()


class StyledGenerator(nn.Module):
    """Speech states and a style in, controls out, all frames at once and of any length.

    Args:
        speech_dim: width of the speech states.
        controls: C.
        style_dim: width of the style.
        dim: of the transformer.
        layers: of it.
        heads: of it.
        reach: frames to either side that a frame attends to.
        dropout: while training.
    """

    def __init__(
        self,
        speech_dim: int,
        controls: int,
        style_dim: int,
        dim: int,
        layers: int,
        heads: int,
        reach: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.reach = reach
        self.project = nn.Linear(speech_dim, dim)
        self.nearness = nn.Parameter(torch.zeros(layers, heads, 2 * reach + 1))
        self.layers = nn.ModuleList(StyledLayer(dim, heads, style_dim, dropout) for _ in range(layers))
        self.modulate = nn.Linear(style_dim, 2 * dim)
        self.out = nn.Linear(dim, controls)
        nn.init.constant_(self.out.bias, -3.0)  # a face at rest

    def forward(self, speech: Tensor, real: Tensor, style: Tensor) -> Tensor:
        """Animates.

        Args:
            speech: (B, T, speech_dim).
            real: (B, T) bool, False where padded.
            style: (B, style_dim).

        Returns:
            (B, T, C) in [0, 1], undefined where padded.
        """
        frame = torch.arange(speech.shape[1], device=speech.device)
        distance = frame - frame[:, None]
        # A frame beyond a clip's end may see itself, lest its attention be empty.
        seen = (distance.abs() <= self.reach) & real[:, None, None] | (distance == 0)
        place = distance.clamp(-self.reach, self.reach) + self.reach
        x = self.project(speech)
        for layer, nearness in zip(self.layers, self.nearness, strict=True):
            x = layer(x, nearness[:, place].masked_fill(~seen, float("-inf")), style)
        return self.out(film(x, self.modulate(style))).sigmoid()


class StyledLayer(nn.Module):
    """A pre-norm transformer layer whose normalisations take scale and shift from a style (FiLM)."""

    def __init__(self, dim: int, heads: int, style_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulate = nn.Linear(style_dim, 4 * dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attended = nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor, style: Tensor) -> Tensor:
        """(B, T, dim), with (B, heads, T, T) added to the attention's scores."""
        first, second = self.modulate(style).chunk(2, dim=-1)
        query, key, value = self.qkv(film(x, first)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = x + self.dropout(self.attended(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed_forward(film(x, second)))


def film(x: Tensor, modulation: Tensor) -> Tensor:
    """Normalises frames (B, T, dim), then scales and shifts them by (B, 2·dim) (Perez et al. 2018)."""
    scale, shift = modulation[:, None].chunk(2, dim=-1)
    return layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def reconstruction_loss(predicted: Tensor, weights: Tensor) -> Tensor:
    """Squared error of controls (N, C), summed over them, mean over prompts."""
    return (predicted - weights).square().sum(-1).mean()


def nearest_is_own(embedding: Tensor, means: Tensor, prompts: PromptBatch) -> dict[str, float]:
    """Prompt -> 1 if the emotion whose mean (E, d) is nearest to its embedding (N, d) is its own, else 0."""
    right = cosines(embedding, means).argmax(1) == prompts.emotion
    return dict(zip(prompts.key, right.float().tolist(), strict=True))
