"""Does a motion show the emotion it was asked for? A judge's opinion, and what the judge is worth.

There is no standard classifier of three-dimensional expressions, so a protocol names its judge and the hash of its
weights, and a value stands beside its ceiling: the judge's accuracy on true motion.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def emotion_accuracy(logits: Tensor, emotions: Tensor) -> Tensor:
    """Share of clips whose largest logit is that of the emotion asked for.

    Args:
        logits: (N, E) of a judge.
        emotions: (N,) int64, the emotion asked for.

    Returns:
        () float64 in [0, 1].

    Example:
        >>> emotion_accuracy(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.tensor([1, 1])).item()
        0.5
    """
    return (logits.argmax(1) == emotions).double().mean()


class EmotionAccuracy(Metric):
    """:func:`emotion_accuracy` over a test set, with its ceiling.

    Args:
        relative: True divides by the ceiling.

    Example:
        >>> metric = EmotionAccuracy()
        >>> metric.update(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
        >>> metric.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        >>> metric.compute().item(), metric.ceiling.item()
        (0.5, 0.5)
    """

    higher_is_better = True
    full_state_update = False
    count: Tensor
    right: Tensor
    right_on_truth: Tensor

    def __init__(self, relative: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.relative = relative
        for state in ("count", "right", "right_on_truth"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, logits_of_truth: Tensor, emotions: Tensor) -> None:
        """Adds clips: the judge's logits (N, E) of predicted and of true motion, and the emotions (N,) asked for."""
        self.count += len(emotions)
        self.right += emotion_accuracy(logits, emotions) * len(emotions)
        self.right_on_truth += emotion_accuracy(logits_of_truth, emotions) * len(emotions)

    @property
    def ceiling(self) -> Tensor:
        """The judge's accuracy on true motion: what the clips added on this process can reach at most, about."""
        return self.right_on_truth / self.count

    def compute(self) -> Tensor:
        """The accuracy, or with ``relative`` its share of the ceiling, () float64."""
        return self.right / (self.right_on_truth if self.relative else self.count)
