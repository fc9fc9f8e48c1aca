"""InterFaceGAN: a face attribute is a linear direction of StyleGAN's latent space.

Paper: Shen et al., "Interpreting the Latent Space of GANs for Semantic Face Editing", CVPR 2020
(https://arxiv.org/abs/1907.10786). It claims that a hyperplane separates the codes of faces with and without an
attribute, that moving along its unit normal edits the attribute, and that projecting a normal onto the
complement of others ("conditional manipulation") edits one attribute without the others.

From the official code (MIT): codes sorted by attribute score, the top and bottom 2 % kept, 70 % of them for
training, a linear support vector classifier with C = 1, its normal scaled to unit length and its intercept
dropped; the conditional projection; the distance in Z or W, the plain offset in W+.

Differences: codes are drawn in W from the generator's own mapping network and scored by the guide classifier on
the rendered images within the same run (officially: files of scored codes made beforehand). The projection solves
one least-squares problem for any number of conditions; the official closed form for two adds 1e-8 to a
denominator.
"""

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor

from datamodules.batches import FaceBatch
from datamodules.errors import UserError
from trainers import backbones
from trainers.tasks import FaceEditing, SystemInfo


def choose_extremes(
    codes: np.ndarray,
    scores: np.ndarray,
    chosen: float,
    train_share: float,
    rng: np.random.RandomState,
    invalid: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Picks the codes with the highest and lowest scores and splits them for training and validation.

    Args:
        codes: (N, D) latent codes.
        scores: (N,) attribute scores.
        chosen: how many of each end: a share of all in (0, 1], or a count above 1; at most half of all.
        train_share: share of each end to train on, in (0, 1).
        rng: shuffles each end, the highest first.
        invalid: scores of this value are left out.

    Returns:
        train codes, train labels (int64, 1 for the high end, which comes first), validation codes and labels.
    """
    if invalid is not None:
        codes, scores = codes[scores != invalid], scores[scores != invalid]
    codes = codes[np.argsort(scores)[::-1]]
    count = min(int(len(codes) * chosen if chosen <= 1 else chosen), len(codes) // 2)
    high = codes[:count][rng.permutation(count)]
    low = codes[len(codes) - count :][rng.permutation(count)]
    num_train = int(count * train_share)

    def labelled(part: slice) -> tuple[np.ndarray, np.ndarray]:
        labels = np.concatenate([np.ones(len(high[part]), np.int64), np.zeros(len(low[part]), np.int64)])
        return np.concatenate([high[part], low[part]]), labels

    return *labelled(slice(num_train)), *labelled(slice(num_train, None))


def train_boundary(
    codes: np.ndarray,
    scores: np.ndarray,
    rng: np.random.RandomState,
    chosen: float = 0.02,
    train_share: float = 0.7,
    invalid: float | None = None,
) -> tuple[np.ndarray, float]:
    """Fits the hyperplane between the codes with the highest and the lowest scores.

    Args:
        codes: (N, D) latent codes.
        scores: (N,) attribute scores.
        rng: see :func:`choose_extremes`, as the other arguments.

    Returns:
        the unit normal (D,) float32, pointing to high scores, and the accuracy on the validation codes.
    """
    train_x, train_y, val_x, val_y = choose_extremes(codes, scores, chosen, train_share, rng, invalid)
    classifier = SVC(kernel="linear").fit(train_x, train_y)
    normal = classifier.coef_[0].astype(np.float32)
    accuracy = classifier.score(val_x, val_y) if len(val_y) else float("nan")
    return normal / np.linalg.norm(normal), accuracy


def project_boundary(normal: np.ndarray, conditions: np.ndarray) -> np.ndarray:
    """The unit vector closest to ``normal`` along which no condition changes (paper, section 3.2).

    Args:
        normal: (D,) unit normal to edit along.
        conditions: (K, D) unit normals of the attributes to keep.
    """
    coefficients = np.linalg.lstsq(conditions.T, normal, rcond=None)[0]
    projected = normal - conditions.T @ coefficients
    return projected / np.linalg.norm(projected)


def move(codes: Tensor, normal: Tensor, distance: Tensor) -> Tensor:
    """Moves codes along a normal.

    Args:
        codes: (B, D) in Z or W, or (B, L, D) in W+.
        normal: (D,) unit normal.
        distance: (B,): of a Z or W code, the distance from the hyperplane through the origin where it ends
            up; of a W+ code, the offset of every layer from where it is.

    Returns:
        codes of the same shape.
    """
    if codes.ndim == 2:
        return codes + (distance - codes @ normal)[:, None] * normal
    return codes + distance[:, None, None] * normal


class InterFaceGAN(FaceEditing):
    """Linear editing directions, fitted on sampled codes without a gradient.

    Every training step draws as many codes as the batch has images; the boundaries are fitted at the end of the
    epoch on all codes drawn so far. The images of the batch are not looked at.

    Args:
        attributes: the attributes to edit, CelebA names.
        strengths: offsets along the unit normal in W+, weakest first.
        generator: backbone specification of the StyleGAN2 generator.
        inverter: backbone specification of the encoder image -> W+.
        guide: backbone specification of the attribute classifier that scores the sampled faces.
        conditional: edit each attribute with all other attributes of the list kept (conditional manipulation).
        chosen: share (or count, above 1) of all codes that trains a boundary, from each end of the scores.
        train_share: share of the chosen codes to train on; the others give the validation accuracy.
        seed: shuffles the chosen codes.
    """

    info = SystemInfo(
        name="interfacegan",
        title="InterFaceGAN",
        task="face-editing",
        paper="Shen et al., Interpreting the Latent Space of GANs for Semantic Face Editing, CVPR 2020",
        year=2020,
        url="https://arxiv.org/abs/1907.10786",
        basis="official code",
    )
    frozen = ("generator", "inverter", "guide")
    boundaries: Tensor

    def __init__(
        self,
        attributes: list[str],
        strengths: list[float],
        generator: str,
        inverter: str,
        guide: str,
        conditional: bool = True,
        chosen: float = 0.02,
        train_share: float = 0.7,
        seed: int = 0,
    ) -> None:
        super().__init__(attributes, strengths, generator, inverter)
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.guide = backbones.load(guide, "attributes")
        unknown = [name for name in attributes if name not in self.guide.attributes]
        if unknown:
            raise UserError(f"model.attributes: the guide '{guide}' does not know {', '.join(unknown)}")
        self.columns = [self.guide.attributes.index(name) for name in attributes]
        self.conditional = conditional
        self.chosen = chosen
        self.train_share = train_share
        self.seed = seed
        self.codes: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.register_buffer("boundaries", torch.zeros(len(attributes), self.generator.w_dim))

    def edit(self, w_plus: Tensor, attribute: str, target: Tensor, strength: float) -> Tensor:
        """Moves every layer of the code by ``strength`` along the attribute's normal."""
        self.check_attribute(attribute)
        return move(w_plus, self.boundaries[self.attributes.index(attribute)], strength * target)

    def configure_optimizers(self) -> None:
        """Nothing is trained by gradients."""

    @torch.no_grad()
    def training_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Draws as many codes as the batch has images and scores their faces."""
        w_plus = self.generator.mapping(torch.randn(len(batch), self.generator.z_dim, device=self.device))
        self.codes.append(w_plus[:, 0].float().cpu())
        self.scores.append(self.guide(self.synthesise(w_plus))[:, self.columns].float().cpu())

    def on_train_epoch_end(self) -> None:
        """Fits the boundaries on all codes drawn so far.

        Raises:
            UserError: too few of them.
        """
        codes, scores = torch.cat(self.codes).numpy(), torch.cat(self.scores).numpy()
        share = self.chosen if self.chosen <= 1 else self.chosen / len(codes)
        if int(len(codes) * share * self.train_share) < 1:
            raise UserError(
                f"model.chosen: {self.chosen:g} of {len(codes)} codes leaves none to train on; raise it, or draw "
                "more codes by a higher trainer.max_epochs"
            )
        rng = np.random.RandomState(self.seed)
        normals = []
        for name, score in zip(self.attributes, scores.T, strict=True):
            normal, accuracy = train_boundary(codes, score, rng, self.chosen, self.train_share)
            normals.append(normal)
            self.log(f"val/boundary_accuracy_{name}", accuracy)
        if self.conditional and len(normals) > 1:
            normals = [
                project_boundary(normal, np.stack(normals[:i] + normals[i + 1 :])) for i, normal in enumerate(normals)
            ]
        self.boundaries.copy_(torch.from_numpy(np.stack(normals)))
