import torch
from torchmetrics.functional.classification import multiclass_accuracy

from metrics.emotion import EmotionAccuracy, emotion_accuracy


def test_accuracy_and_its_ceiling_by_hand():
    asked = torch.tensor([0, 1, 1, 0])
    predicted = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])  # right, wrong, right, wrong
    of_truth = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1]])  # the judge fails on the last
    accuracy, relative = EmotionAccuracy(), EmotionAccuracy(relative=True)
    for metric in (accuracy, relative):
        metric.update(predicted[:3], of_truth[:3], asked[:3])
        metric.update(predicted[3:], of_truth[3:], asked[3:])
    assert accuracy.compute() == 2 / 4
    assert accuracy.ceiling == 3 / 4
    assert relative.compute() == 2 / 3


def test_equals_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    logits, asked = torch.randn(50, 8, generator=generator), torch.randint(0, 8, (50,), generator=generator)
    expected = multiclass_accuracy(logits, asked, 8, average="micro")
    assert abs(emotion_accuracy(logits, asked) - expected) < 1e-6
