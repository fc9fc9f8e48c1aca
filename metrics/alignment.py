"""Does a generated image show what its caption says? CLIP score and R-precision, on embeddings of any encoder.

The encoder is the caller's: its name and weight hash belong to the protocol, and it must not be the one that guided
the training. Embeddings need not have unit length.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from datamodules.errors import UserError

Variant = Literal["x100-clipped", "raw"]


def clip_score(image: Tensor, text: Tensor, variant: Variant = "x100-clipped") -> Tensor:
    """How well each image fits its caption.

    Args:
        image: (N, D) image embeddings.
        text: (N, D) embeddings of the captions.
        variant: ``raw``: the cosine; ``x100-clipped``: 100 max(cosine, 0), in percent. Hessel et al., "CLIPScore",
            EMNLP 2021, has 2.5 in place of 100. torchmetrics clips the mean instead of each image; the two differ
            only where a cosine is negative.

    Returns:
        (N,) float64.

    Example:
        >>> image, text = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> [round(value, 4) for value in clip_score(image, text).tolist()]
        [60.0, 0.0]
        >>> [round(value, 4) for value in clip_score(image, text, "raw").tolist()]
        [0.6, -1.0]
    """
    cosine = F.cosine_similarity(image.double(), text.double())
    return 100 * cosine.clamp(min=0) if variant == "x100-clipped" else cosine


def chosen_caption(captions: Sequence[str], key: str, rule: str) -> str:
    """The caption of a sample that an image is generated from and judged by.

    Args:
        captions: all of the sample.
        key: of the sample.
        rule: ``fixed:k``: the k-th of each; ``random:seed``: one at random, the same on every machine.

    Raises:
        UserError: another rule, or a sample without that caption.

    Example:
        >>> chosen_caption(["a man", "a young man"], "00001", "fixed:1")
        'a young man'
    """
    kind, _, number = rule.partition(":")
    if kind not in ("fixed", "random") or not number.isdigit():
        raise UserError(f"caption: '{rule}', expected fixed:k or random:seed")
    digest = hashlib.sha256(f"{number}:{key}".encode()).digest()
    index = int(number) if kind == "fixed" else int.from_bytes(digest[:8], "big") % max(len(captions), 1)
    if index >= len(captions):
        raise UserError(f"caption: sample '{key}' has {len(captions)} captions, the rule is '{rule}'")
    return captions[index]


def caption_numbers(captions: Sequence[str]) -> Tensor:
    """A number for each caption, equal for captions that differ only in case or spaces; (N,) int64.

    It tells apart what R-precision may use as a distractor.

    Example:
        >>> a, b, c = caption_numbers(["A young man.", "a  young man. ", "A young woman."]).tolist()
        >>> a == b, a == c
        (True, False)
    """
    digests = [hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()[:8] for text in captions]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)


def r_precision(image: Tensor, text: Tensor, caption: Tensor, candidates: int = 100, seed: int = 0) -> Tensor:
    """Whether an image finds its caption among its own and random other ones (top 1 of 1 true + 99).

    The other captions are drawn without replacement from all different captions of the test set, so that a
    distractor is neither the true caption again nor there twice. A tie with a distractor is a miss.

    Args:
        image: (N, D) image embeddings.
        text: (N, D) embeddings of their captions.
        caption: (N,) int64, see :func:`caption_numbers`.
        candidates: captions to choose from, the true one among them.
        seed: of the draws.

    Returns:
        (N,) float64, 1 where the true caption has the largest cosine.

    Raises:
        UserError: fewer than ``candidates`` different captions.
    """
    different, first = np.unique(caption.numpy(), return_index=True)
    if len(different) < candidates:
        raise UserError(f"R-precision: {len(different)} different captions, but {candidates} candidates are asked for")
    image, text = F.normalize(image.double(), dim=1), F.normalize(text.double(), dim=1)
    own = np.searchsorted(different, caption.numpy())
    generator = np.random.default_rng(seed)
    found = torch.zeros(len(image), dtype=torch.float64)
    for i, mine in enumerate(own):
        others = generator.choice(len(different) - 1, candidates - 1, replace=False)
        others += others >= mine
        best = (text[first[others]] @ image[i]).max() if candidates > 1 else torch.tensor(-torch.inf)
        found[i] = image[i] @ text[i] > best
    return found


def batch_r_precision(image: Tensor, text: Tensor, caption: Tensor, batch: int = 100) -> Tensor:
    """Whether an image finds its caption among those of its batch (the DAMSM style of AttnGAN and its followers).

    Consecutive images make a batch, and what is left after the last full batch is not scored. A caption that equals
    the true one is no distractor. A tie with a distractor is a miss.

    Args:
        image: (N, D) image embeddings, in the order of the test set.
        text: (N, D) embeddings of their captions.
        caption: (N,) int64, see :func:`caption_numbers`.
        batch: images and captions in a batch.

    Returns:
        (N // batch * batch,) float64, 1 where the true caption has the largest cosine of its batch.

    Raises:
        UserError: fewer than ``batch`` images.
    """
    if len(image) < batch:
        raise UserError(f"R-precision: {len(image)} images, but a batch has {batch}; generate more images")
    image, text = F.normalize(image.double(), dim=1), F.normalize(text.double(), dim=1)
    found = []
    for start in range(0, len(image) - batch + 1, batch):
        rows = slice(start, start + batch)
        cosine = image[rows] @ text[rows].T
        same = caption[rows, None] == caption[None, rows]
        found.append(cosine.diagonal() > cosine.masked_fill(same, -torch.inf).amax(1))
    return torch.cat(found).double()


class CLIPScore(Metric):
    """Mean :func:`clip_score` over a test set; the state is a float64 sum and a count.

    Args:
        variant: see :func:`clip_score`.

    Example:
        >>> metric = CLIPScore("raw")
        >>> metric.update(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
        >>> round(metric.compute().item(), 4)
        0.6
    """

    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, variant: Variant = "x100-clipped", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.variant = variant
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, image: Tensor, text: Tensor) -> None:
        """Adds embeddings (N, D) of images and their captions."""
        self.total += clip_score(image, text, self.variant).sum()
        self.count += len(image)

    def compute(self) -> Tensor:
        """The mean, () float64; NaN before the first image."""
        return self.total / self.count


class RPrecision(Metric):
    """Mean :func:`r_precision` or :func:`batch_r_precision` over a test set.

    Candidates come from the whole test set, so embeddings are the state, (N, D) twice, with each image's position in
    the test set: the value does not depend on how images were dealt to processes, and an image that came twice
    counts once.

    Args:
        style: ``drawn``: one true and ``candidates`` - 1 random captions; ``batches``: full batches of ``candidates``.
        candidates: captions to choose from.
        seed: of the draws.

    Example:
        >>> metric = RPrecision("batches", candidates=2)
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> metric.update(embeddings, embeddings, ["a man", "a woman"], torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = True
    full_state_update = False
    image: list[Tensor]
    text: list[Tensor]
    caption: list[Tensor]
    position: list[Tensor]

    def __init__(self, style: Literal["drawn", "batches"], candidates: int = 100, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.style, self.candidates, self.seed = style, candidates, seed
        for name in ("image", "text", "caption", "position"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, image: Tensor, text: Tensor, captions: Sequence[str], position: Tensor) -> None:
        """Adds embeddings (N, D) of images and of their N captions, and each image's place (N,) in the test set."""
        self.image.append(image)
        self.text.append(text)
        self.caption.append(caption_numbers(captions))
        self.position.append(position)

    def compute(self) -> Tensor:
        """The share of images that find their caption, () float64.

        Raises:
            UserError: too few images or captions.
        """
        position = dim_zero_cat(self.position).cpu().numpy()
        once = torch.from_numpy(np.unique(position, return_index=True)[1])
        image, text, caption = (dim_zero_cat(state).cpu()[once] for state in (self.image, self.text, self.caption))
        if self.style == "batches":
            return batch_r_precision(image, text, caption, self.candidates).mean()
        return r_precision(image, text, caption, self.candidates, self.seed).mean()
