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


@pytest.mark.parametrize("function", [editing.value_at_accuracy, editing.area_under_curve])
def test_what_is_drawn_varies_as_the_value_of_new_images_does(function):
    """Edits that succeed on harder photos at greater strengths, which change the value more the harder the photo."""

    def photos(number: int, seed: int):
        noise = torch.rand(2, number, generator=torch.Generator().manual_seed(seed)).double()
        needed = noise[0]
        strengths = torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0, 1.3]).double()[:, None]
        return (strengths > needed).double(), 1 - 0.6 * strengths + 0.2 * noise[1] - 0.3 * needed

    def value(accuracies, values):
        return function(accuracies.mean(1).tolist(), values, 0.7, accuracies)

    accuracies, values = photos(400, 0)
    drawn = value(accuracies, values)
    plain = function(accuracies.mean(1).tolist(), values, 0.7)
    assert drawn.mean().item() == pytest.approx(plain.mean().item())
    of_new_sets = torch.stack([value(*photos(400, seed)).mean() for seed in range(1, 1001)]).std().item()
    assert drawn.std().item() / 20 == pytest.approx(of_new_sets, rel=0.1)
    assert abs(plain.std().item() / 20 / of_new_sets - 1) > 0.15, "which the values alone do not"


def test_classes_average_over_images():
    accuracy, preservation = editing.EditingAccuracy(0), editing.AttributePreservation([1, 2])
    for metric in (accuracy, preservation):
        metric.update(SOURCE, EDITED)
        metric.update(SOURCE[:1], EDITED[:1])
    assert accuracy.compute().item() == pytest.approx(2 / 3)
    assert preservation.compute().item() == pytest.approx((0.5 + 1 + 0.5) / 3)


def test_area_by_hand():
    values = torch.tensor([1.0, 0.8, 0.2])
    # Accuracy 0.1 at strength 0: up to there the value is 1; then straight to 0.8 at 0.5 and to 0.2 at 0.9.
    expected = (0.1 * 1 + 0.4 * 0.9 + 0.4 * 0.5) / 0.9
    assert editing.area_under_curve([0.1, 0.5, 0.9], values, 0.9).item() == pytest.approx(expected)
    # Up to 0.7, half of the last stretch, where the value is 0.5.
    expected = (0.1 * 1 + 0.4 * 0.9 + 0.2 * 0.65) / 0.7
    assert editing.area_under_curve([0.1, 0.5, 0.9], values, 0.7).item() == pytest.approx(expected)
    assert editing.area_under_curve([0.1, 0.5, 0.8], values, 0.9) is None
    # Nothing behind the target counts, nor does it matter whether the accuracy rises there.
    assert editing.area_under_curve([0.9, 1.0, 1.0], values, 0.9).item() == 1


@pytest.mark.parametrize("accuracy", [[0.0, 0.3, 0.7, 1.0], [0.2, 0.6, 0.4, 0.95], [0.95, 0.2, 0.1, 0.0]])
def test_area_is_the_mean_of_values_at_matched_accuracy(accuracy):
    values = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    levels = (torch.arange(20_000) + 0.5) / 20_000 * 0.9
    at_levels = torch.stack([editing.value_at_accuracy(accuracy, values, level) for level in levels.tolist()])
    area = editing.area_under_curve(accuracy, values, 0.9)
    torch.testing.assert_close(area, at_levels.mean(0), rtol=0, atol=1e-4)


def test_landmarks_are_measured_in_eye_distances():
    truth = torch.rand(2, 68, 2, generator=torch.Generator().manual_seed(1)) * 100
    truth[:, 36], truth[:, 45] = torch.tensor([20.0, 50.0]), torch.tensor([80.0, 50.0])
    moved = truth + torch.tensor([[[6.0, 0.0]], [[0.0, 15.0]]])
    assert editing.landmark_error(moved, truth).tolist() == pytest.approx([0.1, 0.25])
    assert editing.landmark_error(10 * moved, 10 * truth).tolist() == pytest.approx([0.1, 0.25])


def test_recognition_rates_sum_to_one():
    similarity = torch.randint(0, 3, (4, 50), generator=torch.Generator().manual_seed(2)).float()
    metric = editing.RelativeRecognition(4)
    metric.update(similarity[:, :20])
    metric.update(similarity[:, 20:])
    rates = [0.0] * 4
    for column in similarity.T.tolist():
        winners = [i for i, value in enumerate(column) if value == max(column)]
        for i in winners:
            rates[i] += 1 / len(winners) / 50
    assert metric.compute().tolist() == pytest.approx(rates)
    assert metric.compute().sum().item() == pytest.approx(1)
