"""AdaTrans: a nonlinear walk through W+ whose steps adapt to the face.

Paper: Huang et al., "Adaptive Nonlinear Latent Transformation for Conditional Face Editing", ICCV 2023
(https://arxiv.org/abs/2307.07790). It claims that T small steps, each with a direction and a size predicted from
the codes so far and the target attributes, kept on the manifold by the density of real codes, edit large
attribute changes with better disentanglement than linear or one-shot transformations.

From the official code: the transformer and its conditional blocks, the RealNVP density with its own batch and
weight normalisation, all losses and weights, optimiser, batch and schedule. The strength knob is the number of
steps. Official checkpoints load through :func:`from_official`.

Differences:

* One run trains the density first and then one independent transformer for each attribute group, and one
  checkpoint edits all attributes (officially: one run for the density and one for each group).
* Codes and attribute probabilities of the training images are computed at their first use and kept (officially:
  files made beforehand).
* In evaluation mode the LSTM's state is carried from step to step instead of encoding all codes so far again; the
  result is the same. In training mode batch normalisation sees all codes so far, so nothing can be carried.
* Initial values of the density are PyTorch's defaults and a weight-norm gain that leaves them as they are.
* Age is an attribute like the others (``Young``); the six ordinal bits of FFHQ-Aging are not offered.
"""

import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.batches import FaceBatch
from datamodules.errors import UserError
from trainers import backbones
from trainers.tasks import FaceEditing, SystemInfo


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear-BatchNorm-ReLU-Linear on (N, inputs)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class ConditionalBlock(nn.Module):
    """An MLP whose output is scaled and shifted by functions of the condition.

    Args:
        width: of input, hidden layer and output.
        condition_dim: C.
    """

    def __init__(self, width: int, condition_dim: int) -> None:
        super().__init__()
        self.layer = mlp(width, width, width)
        self.scale = mlp(condition_dim, width, width)
        self.bias = mlp(condition_dim, width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, width) and (B, C) to (B, width)."""
        return self.layer(x) * self.scale(condition).exp() + self.bias(condition)


class LatentTransformer(nn.Module):
    """Walks a code towards target attributes.

    Args:
        num_layers: L of a W+ code.
        dim: D of a W+ code.
        condition_dim: C, the number of attributes it is told.
        width: of all hidden layers.
        blocks: conditional blocks.
    """

    def __init__(self, num_layers: int, dim: int, condition_dim: int, width: int = 512, blocks: int = 10) -> None:
        super().__init__()
        self.input_layer = mlp(num_layers * dim, width, width)
        self.rnn = nn.LSTM(width, width, num_layers=2)
        self.blocks = nn.ModuleList(ConditionalBlock(width, condition_dim) for _ in range(blocks))
        self.direction_layer = mlp(width, width, dim)
        self.step_layer = mlp(width, width, 1)

    def forward(self, w_plus: Tensor, condition: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Walks.

        Args:
            w_plus: (B, L, D) codes to start from.
            condition: (B, C), +1 for an attribute that the face shall have, -1 for one that it shall not.
            steps: T.

        Returns:
            trajectory: (T + 1, B, L, D), from the start to the end.
            step_sizes: (B, T) in (0, 1).
        """
        trajectory, sizes = [w_plus], []
        state = None
        for _ in range(steps):
            if self.training:
                history, _ = self.encode(torch.stack(trajectory))
            else:
                history, state = self.encode(trajectory[-1][None], state)
            direction, size = self.step(history[-1], condition)
            trajectory.append(trajectory[-1] + (size * direction)[:, None])
            sizes.append(size)
        return torch.stack(trajectory), torch.cat(sizes, dim=1)

    def encode(self, codes: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Codes (t, B, L, D) of t steps to features (t, B, width) and the LSTM's state after them."""
        features = self.input_layer(codes.flatten(2).flatten(0, 1))
        return self.rnn(features.view(*codes.shape[:2], -1), state)

    def step(self, features: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, width) of the codes so far to a unit direction (B, D) and a step size (B, 1)."""
        for block in self.blocks:
            features = block(features, condition)
        return F.normalize(self.direction_layer(features), dim=1), self.step_layer(features).sigmoid()


class WeightNormLinear(nn.Module):
    """Linear layer with one gain for each *input* feature: weight = v * g / (|v| + 1e-5), |v| over the outputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        linear = nn.Linear(inputs, outputs)
        self.weight_v, self.bias = linear.weight, linear.bias
        self.weight_g = nn.Parameter(linear.weight.detach().norm(dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) to (N, outputs)."""
        return F.linear(x, self.weight_v * (self.weight_g / (self.weight_v.norm(dim=0) + 1e-5)), self.bias)


class FlowBatchNorm(nn.Module):
    """Invertible standardisation without gain and shift.

    Unlike :class:`torch.nn.BatchNorm1d` the variance is the biased one, the epsilon becomes part of the running
    variance, and no gradient flows through the statistics.

    Args:
        dim: D.
        momentum: weight of the newest batch in the running statistics.
        eps: added to a batch's variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(1, dim))
        self.register_buffer("running_var", torch.ones(1, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) to (N, D) and the log-determinant, (1,)."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            batch = x.detach()
            mean, var = batch.mean(0, keepdim=True), batch.var(0, correction=0, keepdim=True) + self.eps
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return (x - mean) / var.sqrt(), -0.5 * var.log().sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        """(N, D) to (N, D), with the running statistics."""
        return z * self.running_var.sqrt() + self.running_mean


class CouplingNet(nn.Module):
    """Two pre-activation residual blocks between weight-normed linear layers."""

    def __init__(self, inputs: int, outputs: int, width: int = 32) -> None:
        super().__init__()
        self.first = WeightNormLinear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(*self._activated(width, width), *self._activated(width, width)) for _ in range(2)
        )
        self.last = nn.Sequential(*self._activated(width, outputs))

    @staticmethod
    def _activated(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.BatchNorm1d(inputs), nn.ReLU(), WeightNormLinear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) to (N, outputs)."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class AffineCoupling(nn.Module):
    """Scales and shifts every other entry of a vector by functions of the entries between.

    Args:
        dim: D, even.
        odd: change the odd entries instead of the even ones.
    """

    def __init__(self, dim: int, odd: bool) -> None:
        super().__init__()
        self.odd = odd
        self.net = CouplingNet(dim // 2, dim)
        self.s_log_scale = nn.Parameter(0.01 * torch.randn(1))
        self.s_bias = nn.Parameter(0.01 * torch.randn(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) to (N, D) and the log-determinant, (N,)."""
        changed, kept = self._split(x)
        shift, log_scale = self._affine(kept)
        return self._join(changed * log_scale.exp() + shift, kept), log_scale.sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        changed, kept = self._split(z)
        shift, log_scale = self._affine(kept)
        return self._join((changed - shift) * (-log_scale).exp(), kept)

    def _affine(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.net(kept).chunk(2, dim=1)
        return shift, log_scale.tanh() * self.s_log_scale + self.s_bias

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        even, odd = x[:, 0::2], x[:, 1::2]
        return (odd, even) if self.odd else (even, odd)

    def _join(self, changed: Tensor, kept: Tensor) -> Tensor:
        pair = (kept, changed) if self.odd else (changed, kept)
        return torch.stack(pair, dim=2).flatten(1)


class Density(NamedTuple):
    """What :class:`RealNVP` says of N vectors."""

    nll: Tensor
    """(), mean negative log-likelihood per dimension, nats."""
    log_prior: Tensor
    """(N,), log N(z; 0, I) per dimension, without the determinant, nats."""
    log_det: Tensor
    """(N,), log-determinant of the Jacobian."""
    z: Tensor
    """(N, D)."""


class RealNVP(nn.Module):
    """Density of single latent vectors: pairs of standardisation and affine coupling.

    Args:
        dim: D, even.
        pairs: how many.
    """

    def __init__(self, dim: int, pairs: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(pairs):
            layers += [FlowBatchNorm(dim), AffineCoupling(dim, odd=i % 2 == 1)]
        self.layers = nn.ModuleList(layers)

    def forward(self, w: Tensor) -> Density:
        """Evaluates vectors (N, D), or W+ codes (..., D) of which every layer counts as a vector."""
        z = w.reshape(-1, w.shape[-1])
        log_det = torch.zeros(len(z), device=w.device)
        for layer in self.layers:
            z, change = layer(z)
            log_det = log_det + change
        dim = z.shape[1]
        log_prior = -0.5 * (z.square().sum(1) + dim * math.log(2 * math.pi))
        return Density(-(log_prior + log_det).mean() / dim, log_prior / dim, log_det, z)

    def inverse(self, z: Tensor) -> Tensor:
        """(N, D) to vectors (N, D), with the running statistics."""
        for layer in reversed(self.layers):
            assert isinstance(layer, FlowBatchNorm | AffineCoupling)
            z = layer.inverse(z)
        return z


# Official name -> ours, applied in this order. What has no counterpart here are constants and leftovers of the
# last batch in the flow's batch normalisation.
_OFFICIAL_NAMES = [
    (r"^func\.main\.(\d+)\.affine\.", r"blocks.\1."),
    (r"^func\.main\.", "blocks."),
    (r"^func\.output_layer\.", "direction_layer."),
    (r"^func\.", ""),
    (r"^flow\.net\.layers\.", "layers."),
    (r"\.net\.in_block\.0\.", ".net.first."),
    (r"\.net\.mid_block\.(\d+)\.net\.", r".net.blocks.\1."),
    (r"\.net\.out_block\.", ".net.last."),
    (r"\.module\.", "."),
]
_OFFICIAL_EXTRAS = ("log_gamma", "beta", "batch_mean", "batch_var")


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights of the official ``AdaTrans`` or ``FLOW`` class for our transformer or RealNVP.

    Args:
        state: the official state dict, with keys such as ``func.rnn.weight_ih_l0`` or
            ``flow.net.layers.1.s_bias``.
    """
    renamed = {}
    for key, value in state.items():
        if key.rsplit(".", 1)[-1] in _OFFICIAL_EXTRAS and key.startswith("flow."):
            continue
        for pattern, replacement in _OFFICIAL_NAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


class AdaTrans(FaceEditing):
    """One latent transformer for each attribute group, guided by the images that it makes.

    The first ``density_epochs`` epochs train the density of the training images' codes, which then stays as it
    is; the other epochs train the transformers.

    Args:
        groups: what each transformer edits and what it keeps: ``{change: [...], keep: [...]}``, CelebA names.
        strengths: numbers of steps, whole numbers, weakest first.
        generator: backbone specification of the StyleGAN2 generator.
        inverter: backbone specification of the encoder image -> W+.
        guide: backbone specification of the attribute classifier.
        identity: backbone specification of the identity encoder.
        perceptual: backbone specification of the perceptual distance.
        steps: T in training.
        width: of the transformers' hidden layers.
        blocks: conditional blocks of a transformer.
        density_pairs: pairs of standardisation and coupling in the density.
        density_epochs: epochs that train the density.
        render_batch: how many codes of a batch are rendered for the losses on images.
        learning_rate: of the transformers (AdamW without decay).
        density_learning_rate: of the density (AdamW without decay).
        recon_weight: of the squared distance between the last and the first code.
        attribute_weight: of the cross-entropy on changed and kept attributes.
        density_weight: of the negative log-likelihood of all codes on the way.
        identity_weight: of the negative cosine of identity embeddings.
        perceptual_weight: of the perceptual distance.
    """

    info = SystemInfo(
        name="adatrans",
        title="AdaTrans",
        task="face-editing",
        paper="Huang et al., Adaptive Nonlinear Latent Transformation for Conditional Face Editing, ICCV 2023",
        year=2023,
        url="https://arxiv.org/abs/2307.07790",
        basis="official code",
    )
    frozen = ("generator", "inverter", "guide", "identity", "perceptual")

    def __init__(
        self,
        groups: list[dict[str, list[str]]],
        strengths: list[float],
        generator: str,
        inverter: str,
        guide: str,
        identity: str,
        perceptual: str,
        steps: int = 10,
        width: int = 512,
        blocks: int = 10,
        density_pairs: int = 10,
        density_epochs: int = 48,
        render_batch: int = 16,
        learning_rate: float = 1e-4,
        density_learning_rate: float = 1e-4,
        recon_weight: float = 1.0,
        attribute_weight: float = 1.0,
        density_weight: float = 1.0,
        identity_weight: float = 0.1,
        perceptual_weight: float = 0.1,
    ) -> None:
        _check_groups(groups)
        if any(strength < 1 or strength % 1 for strength in strengths):
            raise UserError(f"model.strengths: {strengths}, expected numbers of steps: 1, 2, ...")
        super().__init__([name for group in groups for name in group["change"]], strengths, generator, inverter)
        self.save_hyperparameters()
        self.guide = backbones.load(guide, "attributes")
        self.identity = backbones.load(identity, "identity")
        self.perceptual = backbones.load(perceptual, "perceptual")
        known = self.guide.attributes
        for name in (name for group in groups for names in group.values() for name in names):
            if name not in known:
                raise UserError(f"model.groups: the guide '{guide}' does not know '{name}'")
        self.groups = groups
        self.changed = [[known.index(name) for name in group["change"]] for group in groups]
        self.kept = [[known.index(name) for name in group["keep"]] for group in groups]
        num_layers, dim = self.generator.num_ws, self.generator.w_dim
        self.transformers = nn.ModuleList(
            LatentTransformer(num_layers, dim, len(group["change"]), width, blocks) for group in groups
        )
        self.density = RealNVP(dim, density_pairs)
        self.steps = steps
        self.density_epochs = density_epochs
        self.render_batch = render_batch
        self.learning_rate = learning_rate
        self.density_learning_rate = density_learning_rate
        self.weights = {
            "recon": recon_weight,
            "attribute": attribute_weight,
            "nll": density_weight,
            "identity": identity_weight,
            "perceptual": perceptual_weight,
        }
        self.encoded: dict[str, tuple[Tensor, Tensor]] = {}

    def edit(self, w_plus: Tensor, attribute: str, target: Tensor, strength: float) -> Tensor:
        """Walks ``strength`` steps; the group's other attributes are told as the guide sees them now."""
        self.check_attribute(attribute)
        index = next(i for i, group in enumerate(self.groups) if attribute in group["change"])
        condition = target[:, None].float()
        if len(self.groups[index]["change"]) > 1:
            condition = self.guide(self.synthesise(w_plus))[:, self.changed[index]].sign()
            condition[:, self.groups[index]["change"].index(attribute)] = target
        trajectory, _ = self.transformers[index](w_plus, condition, int(strength))
        return trajectory[-1]

    def setup(self, stage: str) -> None:
        """As for every editing system; also refuses a training that would end with the density.

        Raises:
            UserError: data and network do not fit, or too few epochs.
        """
        super().setup(stage)
        epochs = self.trainer.max_epochs
        if stage == "fit" and epochs is not None and 0 <= epochs <= self.density_epochs:
            raise UserError(
                f"trainer.max_epochs: {epochs}, but the first {self.density_epochs} epochs only train the "
                "density; allow more epochs or set model.density_epochs lower"
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW without decay at constant rates."""
        parts = [
            {"params": self.transformers.parameters(), "lr": self.learning_rate},
            {"params": self.density.parameters(), "lr": self.density_learning_rate},
        ]
        return torch.optim.AdamW(parts, weight_decay=0.0)

    def on_train_epoch_start(self) -> None:
        """After its epochs the density is fixed."""
        trains_density = self.current_epoch < self.density_epochs
        self.density.train(trains_density).requires_grad_(trains_density)

    def training_step(self, batch: FaceBatch, batch_idx: int) -> Tensor | None:
        """Density, or the sum of the groups' independent losses."""
        if len(batch) == 1:
            return None  # the last batch of an epoch; batch normalisation needs two
        codes, probabilities = self.encode(batch)
        if self.current_epoch < self.density_epochs:
            loss = self.density(codes).nll
            self.log("train/density_nll", loss, prog_bar=True)
            return loss
        with torch.no_grad():
            source = self.synthesise(codes[: self.render_batch])
            source_identity = self.identity(source)
        losses = [
            self.group_loss(index, codes, probabilities, source, source_identity) for index in range(len(self.groups))
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def encode(self, batch: FaceBatch) -> tuple[Tensor, Tensor]:
        """W+ codes (B, L, D) and attribute probabilities (B, A) of a batch, computed at their first use."""
        if any(key not in self.encoded for key in batch.key):
            # Always the whole batch: in a smaller one a sample's result can differ in the last bit, and a resumed
            # run, which starts without codes, shall repeat the one that was not interrupted.
            codes, probabilities = self.invert(batch.image).float(), self.guide(batch.image).float().sigmoid()
            for key, code, probability in zip(batch.key, codes.cpu(), probabilities.cpu(), strict=True):
                self.encoded.setdefault(key, (code, probability))
        found = [self.encoded[key] for key in batch.key]
        return (
            torch.stack([code for code, _ in found]).to(self.device),
            torch.stack([probability for _, probability in found]).to(self.device),
        )

    def group_loss(
        self, index: int, codes: Tensor, probabilities: Tensor, source: Tensor, source_identity: Tensor
    ) -> Tensor:
        """Flips one attribute of each face and weighs the outcome.

        Args:
            index: of the group.
            codes: (B, L, D) of the training images.
            probabilities: (B, A) the guide's, of the training images.
            source: (R, 3, H, W) the first R codes rendered.
            source_identity: (R, d) their identity embeddings.

        Returns:
            (), the weighted sum of the losses.
        """
        changed, kept = probabilities[:, self.changed[index]], probabilities[:, self.kept[index]]
        flipped = F.one_hot(torch.randint(changed.shape[1], (len(changed),), device=self.device), changed.shape[1])
        wanted = (changed > 0.5) ^ flipped.bool()

        with torch.autocast(self.device.type, enabled=False):
            trajectory, _ = self.transformers[index](codes, 2.0 * wanted - 1, self.steps)
            recon = F.mse_loss(trajectory[-1], codes)
            nll = self.density(trajectory[1:]).nll

        image = self.synthesise(trajectory[-1, : len(source)])
        logits = self.guide(image)[:, self.changed[index] + self.kept[index]].float()
        # The changed attributes are asked for outright; the kept ones as uncertain as they are in the source.
        asked = torch.cat([wanted.float(), kept], dim=1)[: len(source)]
        losses = {
            "recon": recon,
            "attribute": F.binary_cross_entropy_with_logits(logits, asked),
            "nll": nll,
            "identity": -F.cosine_similarity(self.identity(image), source_identity).mean(),
            "perceptual": self.perceptual(source, image).mean(),
        }

        name = "_".join(self.groups[index]["change"])
        reached = (logits[:, : changed.shape[1]] > 0) == wanted[: len(source)]
        self.log(f"train/reached_{name}", reached.float().mean(), prog_bar=True)
        self.log_dict({f"train/{loss}_{name}": value for loss, value in losses.items()})
        return torch.stack([self.weights[loss] * value for loss, value in losses.items()]).sum()


def _check_groups(groups: list[dict[str, list[str]]]) -> None:
    """Raises:
    UserError: a group of another form, or an attribute that two groups change.
    """
    seen: set[str] = set()
    for group in groups:
        if set(group) != {"change", "keep"} or not group["change"]:
            raise UserError(f"model.groups: {group}, expected {{change: [names], keep: [names]}}")
        for name in group["change"]:
            if name in seen or name in group["keep"]:
                raise UserError(f"model.groups: '{name}' appears twice; one group changes it, and does not keep it")
            seen.add(name)
