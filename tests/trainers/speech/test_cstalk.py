from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.head import Head
from datamodules.speech import SpeechDataModule
from trainers.speech.cstalk import CorrelationNetwork, CSTalk, LinearCorrelation, control_regions

EMOTIONS = ["neutral", "happy", "sad", "surprised", "fear", "disgusted", "angry", "contempt"]
SUBJECTS = ["F1", "M1", "F2", "M2", "F3", "M3", "F4", "M4"]


def system(encoder: str, **changes) -> CSTalk:
    torch.manual_seed(0)
    settings = {
        "rig": "demo", "num_vertices": 3689, "subjects": SUBJECTS, "emotions": EMOTIONS, "encoder": encoder,
        "correlation_dim": 8, "correlation_layers": 1, "correlation_heads": 2, "dim": 8, "levels": 2,
        "stage_epochs": [1],
    }  # fmt: skip
    return CSTalk(**{**settings, **changes})


def batch_of(root, size: int = 4) -> SpeechBatch:
    batch = next(iter(SpeechDataModule(str(root), batch_size=size).loader("test")))
    assert size == 1 or len(set(batch.lengths.tolist())) > 1
    return batch


def test_arkit_controls_fall_into_five_regions() -> None:
    names = Head.load().units
    regions = control_regions(names)
    assert {name: len(indices) for name, indices in regions.items()} == {
        "brow": 5, "eye": 14, "cheek-nose": 5, "mouth": 23, "jaw-tongue": 5,
    }  # fmt: skip
    assert [names[i] for i in regions["jaw-tongue"]] == ["jawForward", "jawLeft", "jawOpen", "jawRight", "tongueOut"]
    assert sorted(i for indices in regions.values() for i in indices) == list(range(52))


def test_metahuman_controls_are_known_by_their_prefixes() -> None:
    raw = ["browDownL", "eyeBlinkR", "eyelashesUpINL", "noseWrinkleL", "earUpL", "mouthFunnelUL", "jawOpen", "teethUpU",
           "tongueOut", "neckSwallowPh1"]  # fmt: skip
    expected = {"brow": [0], "eye": [1, 2], "cheek-nose": [3, 4], "mouth": [5], "jaw-tongue": [6, 7, 8, 9]}
    assert control_regions([f"CTRL_expressions_{name}" for name in raw]) == expected
    board = ["CTRL_L_brow_down.ty", "CTRL_C_eye_parallelLook.ty", "CTRL_R_nose.tx", "CTRL_C_mouth.tx", "CTRL_C_jaw.ty",
             "CTRL_neck_throatUpDown.ty"]  # fmt: skip
    expected = {"brow": [0], "eye": [1], "cheek-nose": [2], "mouth": [3], "jaw-tongue": [4, 5]}
    assert control_regions(board) == expected


def test_unknown_controls_are_named() -> None:
    with pytest.raises(UserError, match="control 'CTRL_expressions_skullUnified' is of no known region"):
        control_regions(["jawOpen", "CTRL_expressions_skullUnified"])
    with pytest.raises(UserError, match="controls of mouth alone"):
        control_regions(["mouthLeft", "mouthRight"])


def test_a_region_is_predicted_from_the_others_and_the_emotion_alone() -> None:
    torch.manual_seed(0)
    regions = [[0, 3], [1], [2, 4]]
    network = CorrelationNetwork(regions, emotions=2, dim=8, layers=1, heads=2, dropout=0.0)
    controls, emotion = torch.randn(1, 5, requires_grad=True), torch.eye(2)[:1].requires_grad_()
    predicted = network(controls, emotion)
    for region in regions:
        seen, felt = torch.autograd.grad(predicted[0, region].sum(), [controls, emotion], retain_graph=True)
        others = [i for i in range(5) if i not in region]
        assert (seen[0, region] == 0).all()
        assert (seen[0, others] != 0).all()
        assert (felt != 0).all()


def test_correlation_network_learns_how_regions_move_together() -> None:
    torch.manual_seed(0)
    network = CorrelationNetwork([[0], [1], [2]], emotions=2, dim=16, layers=1, heads=2, dropout=0.0)
    # In the first emotion the second control follows the first one, in the second it opposes it; the third is free.
    free, emotion = torch.rand(64, 2), torch.eye(2)[torch.arange(64) % 2]
    sign = emotion @ torch.tensor([1.0, -1.0])
    controls = torch.stack([free[:, 0], sign * free[:, 0], free[:, 1]], dim=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(160):
        optimizer.zero_grad()
        loss = (network(controls, emotion) - controls).square().mean()
        loss.backward()
        optimizer.step()
    errors = (network(controls, emotion) - controls).square().mean(0)
    assert errors[0] < 0.01
    assert errors[1] < 0.01
    assert errors[2] > 0.04  # the variance of what nothing tells is 1/12


def test_each_emotion_has_its_network(speech_backbone) -> None:
    model = system(speech_backbone, correlation="per-emotion").eval()
    assert len(model.correlation) == 8
    assert len(system(speech_backbone, correlation="shared").correlation) == 1
    controls, emotion = torch.rand(3, 52), torch.eye(8)[[2, 5, 2]]
    expected = model.correlated(controls, emotion)
    for i, felt in enumerate([2, 5, 2]):
        torch.testing.assert_close(expected[i], model.correlation[felt](controls[i : i + 1], torch.ones(1, 1))[0])


@pytest.mark.parametrize("correlation", ["shared", "per-emotion"])
def test_batch_gives_what_its_clips_give_alone(head_root, speech_backbone, correlation: str) -> None:
    model, batch = system(speech_backbone, correlation=correlation).eval(), batch_of(head_root)
    together, terms = model.control(batch), model.losses(model.generate(batch), batch)
    sums = dict.fromkeys(("reconstruction", "velocity", "correlation"), 0.0)
    for i in range(len(batch)):
        clip = batch.clip(i)
        torch.testing.assert_close(together[i, : batch.lengths[i]], model.control(clip)[0], rtol=0, atol=1e-6)
        for name, value in model.losses(model.generate(clip), clip).items():
            sums[name] = sums[name] + value * (batch.lengths[i] - int(name == "velocity"))
    assert terms.keys() == sums.keys()
    for name, value in terms.items():
        frames = batch.lengths.sum() - len(batch) * int(name == "velocity")
        torch.testing.assert_close(value, sums[name] / frames)


def test_losses_by_hand(head_root, speech_backbone) -> None:
    model, batch = system(speech_backbone, correlation_stride=2).eval(), batch_of(head_root, size=1)
    model.correlated = lambda controls, emotion: controls - 3.0
    generated = batch.weights.clone()
    generated[0, 10] += 2.0
    terms, frames = model.losses(generated, batch), int(batch.lengths[0])
    torch.testing.assert_close(terms["reconstruction"], torch.tensor(4.0 / frames))
    torch.testing.assert_close(terms["velocity"], torch.tensor(0.5 * 2 * 4.0 / (frames - 1)))
    torch.testing.assert_close(terms["correlation"], torch.tensor(0.1 * 9.0))
    assert system(speech_backbone, correlation_weight=0.0).losses(generated, batch).keys() == {
        "reconstruction",
        "velocity",
    }


def test_emotion_moves_the_face_and_must_be_known(head_root, speech_backbone) -> None:
    model, batch = system(speech_backbone).eval(), batch_of(head_root, size=1)
    before = model.control(batch)
    assert not torch.equal(model.control(replace(batch, emotion=(batch.emotion + 1) % 8)), before)
    assert torch.equal(model.control(replace(batch, subject_index=torch.tensor([3]))), before)
    with pytest.raises(UserError, match="no emotion, but after CSTalk takes one of neutral"):
        model.control(replace(batch, emotion=torch.tensor([-1])))


def test_each_stage_trains_its_network_alone(head_root, speech_backbone, tmp_path) -> None:
    model = system(speech_backbone, train_encoder="upper")
    snapshots = []

    class Snapshots(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            snapshots.append({name: value.clone() for name, value in model.named_parameters()})

    snapshots.append({name: value.clone() for name, value in model.named_parameters()})
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, limit_val_batches=0, limit_train_batches=1, enable_checkpointing=False,
        callbacks=[Snapshots()],
    )  # fmt: skip
    trainer.fit(model, datamodule=SpeechDataModule(str(head_root), batch_size=4))
    changed = [
        {name for name in after if not torch.equal(after[name], before[name])} for before, after in pairwise(snapshots)
    ]
    assert {name.split(".")[0] for name in changed[0]} == {"correlation"}
    assert {name.split(".")[0] for name in changed[1]} >= {"generator"}
    assert not any(name.startswith("correlation") or "feature_" in name for name in changed[1])


def test_185_controls_without_a_mesh(speech_backbone, tmp_path) -> None:
    counts = {"brow": 8, "eye": 25, "nose": 8, "mouth": 104, "jaw": 22, "tongue": 18}
    names = [f"CTRL_expressions_{part}{i}" for part, count in counts.items() for i in range(count)]
    (tmp_path / "controls.txt").write_text("\n".join(names))
    model = system(speech_backbone, rig=f"names:{tmp_path / 'controls.txt'}", num_vertices=0, emotions=EMOTIONS[:5])
    batch = SpeechBatch(
        key=["clip"], audio=torch.randn(1, 16_000), audio_lengths=torch.tensor([16_000]),
        vertices=torch.zeros(1, 30, 0, 3), lengths=torch.tensor([30]), template=torch.zeros(1, 0, 3),
        subject=["actor"], subject_index=torch.tensor([0]), emotion=torch.tensor([4]), intensity=torch.tensor([-1]),
        weights=torch.rand(1, 30, 185), transcript=[""], words=[[]], phonemes=[[]],
    )  # fmt: skip
    assert model.control(batch).shape == (1, 30, 185)
    assert model.animate(batch).shape == (1, 30, 0, 3)
    torch.stack(list(model.losses(model.generate(batch), batch).values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.generator.parameters())


def test_linear_judge_explains_linear_motion_and_measures_the_rest() -> None:
    rng = np.random.default_rng(0)
    first = rng.random((5000, 2)).astype(np.float32)
    second = first @ np.array([[0.5, 1.0], [2.0, -1.0]], np.float32) + 0.25
    controls = np.concatenate([second[:, :1], first, second[:, 1:]], axis=1)
    judge = LinearCorrelation([[0, 3], [1, 2]])
    judge.fit(controls)
    assert judge.residual(controls) < 2e-3
    still = np.tile(controls.mean(0), (10, 1))
    assert judge.residual(still) < 1e-3
    # Moved by 1 in both controls of the second region: the regression of the first expects (2.5, 0) more of it.
    moved = controls[:100].copy()
    moved[:, [1, 2]] += 1.0
    expected = np.sqrt((2.5**2 + 0.0**2 + 1.0**2 + 1.0**2) / 4)
    assert judge.residual(moved) == pytest.approx(expected, rel=1e-2)


def test_measured_residual_of_every_test_clip(head_root, speech_backbone) -> None:
    model, data = system(speech_backbone).eval(), SpeechDataModule(str(head_root), batch_size=4)
    residual = model.measurements(data)["residual"]
    assert set(residual) == {key for batch in data.loader("test") for key in batch.key}
    assert all(value > 0 for value in residual.values())
