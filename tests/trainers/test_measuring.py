import pytest
import torch

from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers.measuring import adaptation, clip_errors, joined, reference_clips, split_clips


def test_clip_errors_are_the_hand_computed_means(talking_root) -> None:
    batch = next(iter(SpeechDataModule(str(talking_root), batch_size=3).loader("test")))
    predicted = batch.vertices.clone()
    predicted[:, :, 1, 0] += 0.002
    predicted[0, :, 1, 0] += 0.001
    region = torch.tensor([0, 1])
    assert list(clip_errors(predicted, batch, region).values()) == pytest.approx([3, 2, 2], rel=1e-4)
    assert list(clip_errors(predicted, batch, region, "mean").values()) == pytest.approx([1.5, 1, 1], rel=1e-4)


def test_joined_clips_are_the_batch_they_came_from(talking_root) -> None:
    data = SpeechDataModule(str(talking_root), batch_size=3)
    batch = next(iter(data.loader("test")))
    again = joined([batch.clip(i) for i in range(len(batch))])
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(again, name), value), name
        else:
            assert getattr(again, name) == value, name


def test_references_last_long_enough_and_are_not_measured(talking_root) -> None:
    data = SpeechDataModule(str(talking_root), batch_size=2)
    keys = [clip.key[0] for clip in split_clips(data)]
    ((reference, others),) = reference_clips(data, 0.6)  # 15 and 19 frames of 30 a second
    assert reference.key == keys[:2]
    assert others.key == keys[2:]
    assert int(reference.lengths.sum()) >= 0.6 * data.fps > int(reference.lengths[0])
    with pytest.raises(UserError, match="to be a reference"):
        list(reference_clips(data, 60))


def test_adaptation_measures_the_same_clips_with_both_systems(talking_root) -> None:
    class Still:
        def __init__(self, shift: float = 0.003) -> None:
            self.shift = shift

        def adapt(self, reference) -> "Still":
            assert int(reference.lengths.sum()) >= 15
            return Still(0.001)

        def animate(self, batch) -> torch.Tensor:
            return batch.vertices + torch.tensor([self.shift, 0, 0])

    series = adaptation(Still(), SpeechDataModule(str(talking_root), batch_size=2), seconds=0.5)
    assert series["adapted"].keys() == series["unadapted"].keys()
    assert len(series["adapted"]) == 2
    assert list(series["adapted"].values()) == pytest.approx([1, 1], rel=1e-3)
    assert list(series["unadapted"].values()) == pytest.approx([3, 3], rel=1e-3)
