import pytest
import pytorch_lightning as pl
import torch
from torch.nn.functional import cross_entropy

from datamodules.demo.sentences import draw_sentences
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.backbone.text import TextTraining, word_tokenizer

ENCODER = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}


def training(**changes) -> TextTraining:
    torch.manual_seed(0)
    return TextTraining(**{"encoder": ENCODER, "sentences": 50, "drawn": 8, "lr": 0.01, **changes})


def test_tokens_are_words_in_lower_case_and_marks() -> None:
    tokenizer = word_tokenizer(["Did Pam move?", "Pam did."])
    assert tokenizer.encode("pam DID move .").tokens == ["pam", "did", "move", "."]
    assert tokenizer.encode("Who moved?").tokens == ["<unk>", "<unk>", "?"]


def test_the_stream_has_a_mark_before_every_sentence() -> None:
    model = training()
    tokenizer = model.network.tokenizer
    first, second = (tokenizer.encode(text).ids for text in model.sentences[:2])
    assert model.tokens(model.sentences[:2]).tolist() == [0, *first, 0, *second]


def test_scores_are_of_the_next_token_and_see_no_later_one() -> None:
    model = training().eval()
    tokens = model.tokens(model.sentences[:1])[None]
    logits = model.logits(tokens)
    changed = tokens.clone()
    changed[0, 4] = 3
    torch.testing.assert_close(model.logits(changed)[:, :4], logits[:, :4])
    assert not torch.allclose(model.logits(changed)[:, 4:], logits[:, 4:])
    assert logits.shape == (1, tokens.shape[1], model.network.tokenizer.get_vocab_size())


def trainer(folder, epochs: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, log_every_n_steps=1, use_distributed_sampler=False, enable_checkpointing=False,
    )  # fmt: skip


def test_it_learns_and_exports(talking_root, tmp_path) -> None:
    model = training()
    data = SpeechDataModule(str(talking_root), batch_size=3)
    fitting = trainer(tmp_path, 40)
    fitting.fit(model, datamodule=data)
    model.eval()
    sentences = [sentence.text for sentence in draw_sentences({"other": 20}, seed=77)["other"]]
    tokens = [model.tokens([text]) for text in sentences]
    surprise = torch.stack([cross_entropy(model.logits(t[None])[0], t.roll(-1)) for t in tokens]).mean()
    guess = torch.tensor(float(model.network.tokenizer.get_vocab_size())).log()
    assert surprise < 0.85 * guess

    # All validation clips of this data say the same.
    hum = model.tokens(["a hum"])
    expected = cross_entropy(model.logits(hum[None])[0], hum.roll(-1)).exp()
    assert fitting.callback_metrics["val/perplexity"].item() == pytest.approx(expected.item(), rel=1e-4)

    model.export(tmp_path / "text.safetensors", {"scores": {}})
    loaded = backbones.load(f"path:{tmp_path}/text.safetensors", "text")
    assert torch.equal(loaded([["who", "moved"]])[0], model.network([["who", "moved"]])[0])


def test_it_never_trains_on_what_the_data_holds_out(talking_root, tmp_path) -> None:
    model = training()
    model.sentences = [*model.sentences[:7], "a hum", *model.sentences[8:]]
    trainer(tmp_path, 1).fit(model, datamodule=SpeechDataModule(str(talking_root), batch_size=3))
    assert "a hum" not in model.sentences
    assert len(model.sentences) == 49
