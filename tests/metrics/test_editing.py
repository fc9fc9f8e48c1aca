import pytest
import torch

from metrics import editing

SOURCE = torch.tensor([[0.9, 0.1, 0.7], [0.2, 0.6, 0.6]])
EDITED = torch.tensor([[0.4, 0.2, 0.3], [0.3, 0.7, 0.9]])


def test_accuracy_and_preservation_by_hand():
    assert editing.editing_accuracy(SOURCE, EDITED, 0).tolist() == [1, 0]
    assert editing.attribute_preservation(SOURCE, EDITED, [1, 2]).tolist() == [0.5, 1]
    # At a threshold of 0.25 only the second image changes its first attribute: 0.2 against 0.3.
    assert editing.editing_accuracy(SOURCE, EDITED, 0, threshold=0.25).tolist() == [0, 1]


def test_identity_by_hand():
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    b = torch.tensor([[0.0, 3.0], [2.0, 2.0], [-1.0, 0.0]])
    assert editing.identity_similarity(a, b).tolist() == pytest.approx([0, 1, -1])


@pytest.mark.parametrize(
    ("accuracy", "target", "expected"),
    [
        ([0.0, 0.5, 1.0], 0.75, 0.5),
        ([0.0, 0.5, 1.0], 0.5, 0.75),
        ([0.0, 0.9, 0.2], 0.3, 0.75 + 0.25 * 2 / 3),  # first crossing, though it is crossed again later
        ([0.95, 0.97, 0.99], 0.9, 1.0),  # reached before the weakest strength
        ([0.0, 0.5, 0.8], 0.9, None),
    ],
)
def test_value_at_accuracy(accuracy, target, expected):
    value = editing.value_at_accuracy(accuracy, torch.tensor([1.0, 0.75, 0.25]), target)
    assert (value is None) if expected is None else value.item() == pytest.approx(expected)


def test_value_at_accuracy_per_image_has_the_same_mean():
    values = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    per_image = editing.value_at_accuracy([0.1, 0.4, 0.8], values, 0.5)
    of_means = editing.value_at_accuracy([0.1, 0.4, 0.8], values.double().mean(1), 0.5)
    assert per_image.mean().item() == pytest.approx(of_means.item())


def test_classes_average_over_images():
    accuracy, preservation = editing.EditingAccuracy(0), editing.AttributePreservation([1, 2])
    for metric in (accuracy, preservation):
        metric.update(SOURCE, EDITED)
        metric.update(SOURCE[:1], EDITED[:1])
    assert accuracy.compute().item() == pytest.approx(2 / 3)
    assert preservation.compute().item() == pytest.approx((0.5 + 1 + 0.5) / 3)
