import pytest
import torch
from torch import nn

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers.nets.speech_encoder import SpeechEncoder
from trainers.speech.voca import VOCA
from trainers.tasks import System, SystemInfo, load_system, registry


class Toy(System):
    info = SystemInfo("toy", "Toy", "speech-to-mesh", "nobody", 2026, "", "reconstruction")
    frozen = ("borrowed",)

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.borrowed = nn.Dropout()
        self.borrowed_norm = nn.Linear(width, width)
        self.own = nn.Linear(width, width)


class ToyWithWeights(Toy):
    def __init__(self, width: int = 2) -> None:
        super().__init__(width)
        self.borrowed = nn.BatchNorm1d(width)


class ToyOfAFile(ToyWithWeights):
    def __init__(self, file: str, trained: bool = False, width: int = 2) -> None:
        super().__init__(width)
        self.save_hyperparameters()
        if trained:
            self.frozen = ()


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.tasks.registry", lambda: {"toy": ToyWithWeights})
    system = ToyWithWeights(3)
    stored = {"state_dict": system.state_dict()}
    system.on_save_checkpoint(stored)
    path = tmp_path / "toy.ckpt"
    torch.save(stored, path)
    return path, system, stored


def test_every_registered_system_says_what_it_is():
    for name, system in registry().items():
        assert system.info.name == name
        assert system.info.url.startswith("https://")
        assert system.__module__.endswith(name.partition("-")[0])  # variants of a system share its file


def test_frozen_parts_are_not_stored_and_stay_in_evaluation_mode():
    system = ToyWithWeights()
    assert not any(key.startswith("borrowed.") for key in system.state_dict())
    assert {"own.weight", "borrowed_norm.weight"} <= set(system.state_dict()), "a prefix of a name is another name"
    assert not system.train().borrowed.training
    assert system.own.training


def test_a_checkpoint_rebuilds_its_system(checkpoint):
    path, system, _ = checkpoint
    loaded = load_system(path)
    assert not loaded.training
    torch.testing.assert_close(loaded.own.weight, system.own.weight)


def test_checkpoints_that_are_none_or_of_others_are_refused(checkpoint, tmp_path):
    path, _, stored = checkpoint
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(UserError, match=r"text\.ckpt: not a readable facebench checkpoint"):
        load_system(tmp_path / "text.ckpt")
    torch.save({**stored, "facebench": {"system": "strange", "init": {}}}, path)
    with pytest.raises(UserError, match="system 'strange' is not installed; known: toy"):
        load_system(path)


def test_missing_weights_are_an_error_and_never_random(checkpoint):
    path, _, stored = checkpoint
    del stored["state_dict"]["own.weight"]
    torch.save(stored, path)
    with pytest.raises(UserError, match=r"weights do not fit Toy \(1 missing, 0 unexpected, first 'own.weight'\)"):
        load_system(path)


def test_a_checkpoint_cannot_run_code(checkpoint, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))

    path, _, stored = checkpoint
    torch.save({**stored, "extra": Trap()}, path)
    with pytest.raises(UserError, match="not a readable facebench checkpoint"):
        load_system(path)
    assert not (tmp_path / "trapped").exists()


@pytest.fixture
def voca_in_style(talking_root, speech_backbone):
    """VOCA whose output depends on the style, and a batch of a speaker never seen."""

    def build(unseen: str) -> tuple[VOCA, SpeechBatch]:
        torch.manual_seed(0)
        system = VOCA(12, ["anna", "bert"], speech_backbone, components=3, unseen=unseen)
        torch.nn.init.normal_(system.network.expression.weight)
        batch = next(iter(SpeechDataModule(str(talking_root), batch_size=3).loader("test")))
        assert batch.subject_index.tolist() == [-1] * 3
        return system.eval(), batch

    return build


@pytest.mark.parametrize("policy", ["all-mean", "best"])
def test_a_policy_for_all_styles_predicts_each(voca_in_style, policy: str) -> None:
    system, batch = voca_in_style(policy)
    predicted = system.predict_step(batch, 0)
    for k in range(2):
        alone, _ = voca_in_style(f"fixed:{k}")
        for key, vertices in alone.predict_step(batch, 0).items():
            torch.testing.assert_close(predicted[key][k], vertices)
    key = batch.key[0]
    assert predicted[key].shape == (2, int(batch.lengths[0]), 12, 3)
    assert not torch.allclose(predicted[key][0], predicted[key][1])


@pytest.fixture
def heard(monkeypatch) -> list[int]:
    """Sizes of the batches that a speech encoder hears."""
    sizes: list[int] = []
    forward = SpeechEncoder.forward

    def counting(self, audio, *args):
        sizes.append(len(audio))
        return forward(self, audio, *args)

    monkeypatch.setattr(SpeechEncoder, "forward", counting)
    return sizes


def test_all_predictions_of_a_clip_hear_it_once(voca_in_style, heard) -> None:
    system, batch = voca_in_style("best")
    system.predict_step(batch, 0)
    assert heard == [len(batch)]


def test_states_of_a_frozen_encoder_are_kept_up_to_a_limit(voca_in_style, heard, monkeypatch) -> None:
    system, batch = voca_in_style("fixed:0")
    system.train()
    first = system.encode(batch)
    torch.testing.assert_close(system.encode(batch), first)
    assert heard == [3]
    monkeypatch.setattr("trainers.tasks.KEPT_STATES", system._kept_bytes)
    one, two = batch.clip(0), batch.clip(1)
    one.key, two.key = ["new"], ["newer"]
    with pytest.warns(UserWarning, match="facebench data features"):
        system.encode(one)
    for _ in range(2):
        states, lengths = system.encode(two)
        torch.testing.assert_close(states[0, : lengths[0]], first[0][1, : lengths[0]])
    assert heard == [3, 1, 1, 1]


def test_strange_policies_are_refused(speech_backbone) -> None:
    for unseen in ("fixed:2", "fixed", "median"):
        with pytest.raises(UserError, match=r"model\.unseen: .* expected fixed:k with k below 2, all-mean or best"):
            VOCA(12, ["anna", "bert"], speech_backbone, unseen=unseen)


def test_a_clip_draws_the_same_numbers_in_any_batch_and_others_in_the_next_sample(voca_in_style) -> None:
    system, batch = voca_in_style("fixed:0")

    def numbers(of: SpeechBatch) -> list[float]:
        return [torch.rand((), generator=generator).item() for generator in system.generators(of)]

    first = numbers(batch)
    assert numbers(batch.clip(1)) == first[1:2]
    assert len(set(first)) == 3
    system.draw = 1
    assert set(first).isdisjoint(numbers(batch))


def test_a_clip_without_emotion_is_named(voca_in_style) -> None:
    system, batch = voca_in_style("fixed:0")
    system.emotions = ["neutral", "happy"]
    batch.emotion = torch.tensor([1, -1, 0])
    with pytest.raises(UserError, match=rf"clip '{batch.key[1]}': no emotion, but VOCA .* one of neutral, happy"):
        system.emotion(batch)
    batch.real[1] = False
    assert system.emotion(batch)[0].tolist() == [0, 1]


def test_a_system_without_references_says_so(voca_in_style) -> None:
    system, batch = voca_in_style("fixed:0")
    with pytest.raises(UserError, match="takes no reference clip; it takes subject"):
        system.adapt(batch)


@pytest.mark.parametrize("trained", [False, True])
def test_a_checkpoint_goes_with_the_weights_that_it_was_trained_with(tmp_path, monkeypatch, trained):
    monkeypatch.setattr("trainers.tasks.registry", lambda: {"toy": ToyOfAFile})
    weights, path = tmp_path / "borrowed.safetensors", tmp_path / "toy.ckpt"
    weights.write_bytes(b"old")
    system, stored = ToyOfAFile(f"path:{weights}", trained), {}
    system.on_save_checkpoint(stored)
    torch.save({"state_dict": system.state_dict(), **stored}, path)
    load_system(path)
    weights.write_bytes(b"new")
    if trained:  # they are in the checkpoint
        load_system(path)
        return
    with pytest.raises(UserError, match=r"other weights than 'path:.*borrowed.safetensors' has now \(SHA-256"):
        load_system(path)
    with pytest.raises(UserError, match="or train again"):
        ToyOfAFile(f"path:{weights}").on_load_checkpoint(stored)
