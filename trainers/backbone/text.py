"""Training of a small language model: which word comes next in a sentence of the demo corpus' grammar.

It gives the demo what GPT-2 gives at the paper's scale: states that say what a word means where it stands. It is
GPT-2's network on whole words, trained on sentences drawn from the grammar that made the corpus, never on one that the
corpus holds out.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.text import Perplexity

from datamodules.batches import SpeechBatch
from datamodules.demo.sentences import draw_sentences
from trainers import backbones
from trainers.backbone.attributes import one_cycle
from trainers.nets.text_encoder import TextEncoder

UNKNOWN = "<unk>"


class TextTraining(pl.LightningModule):
    """Trains a text encoder as a language model, on the transcripts of a batch and on sentences of the grammar.

    Args:
        encoder: arguments of transformers' ``GPT2Config``; the vocabulary follows from the sentences.
        sentences: how many to draw from the grammar.
        drawn: how many of them join the transcripts in a training step.
        seed: of the sentences.
        unknown: share of the words that are replaced by the mark of an unknown one while training.
        lr: peak learning rate of AdamW, which warms up and anneals once.
        weight_decay: of AdamW.
    """

    def __init__(
        self,
        encoder: dict[str, Any],
        sentences: int = 20_000,
        drawn: int = 120,
        seed: int = 1,
        unknown: float = 0.05,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.sentences = [sentence.text for sentence in draw_sentences({"train": sentences}, seed)["train"]]
        tokenizer = word_tokenizer(self.sentences)
        start = tokenizer.token_to_id(TextEncoder.START)
        config = {**encoder, "vocab_size": tokenizer.get_vocab_size(), "bos_token_id": start, "eos_token_id": start}
        self.init: dict[str, Any] = {"config": config, "tokenizer": tokenizer.to_str()}
        self.network = TextEncoder(**self.init)
        self.unknown_token = tokenizer.get_vocab()[UNKNOWN]
        self.perplexity = Perplexity()

    def setup(self, stage: str) -> None:
        """Takes the sentences that the data holds out from those to train on."""
        if stage == "fit":
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            held_out = {text for split in ("val", "test") for batch in data.loader(split) for text in batch.transcript}
            self.sentences = [text for text in self.sentences if text not in held_out]

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """Cross-entropy of the next token in one stream of sentences, cut into rows of the network's length."""
        chosen = torch.randint(len(self.sentences), (self.hparams["drawn"],)).tolist()
        stream = self.tokens([*batch.transcript, *(self.sentences[i] for i in chosen)])
        size = self.network.config.n_positions
        count = (len(stream) - 1) // size
        inputs, targets = (stream[first : first + count * size].view(count, size) for first in (0, 1))
        hidden = torch.rand(inputs.shape, device=inputs.device) < self.hparams["unknown"]
        logits = self.logits(inputs.masked_fill(hidden & (inputs != self.network.start), self.unknown_token))
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        """Perplexity: the exponential of the mean cross-entropy of a sentence's tokens and its end."""
        self._measure(batch, "val")

    def test_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        """As validation, on the test split."""
        self._measure(batch, "test")

    def _measure(self, batch: SpeechBatch, split: str) -> None:
        for i in batch.real.nonzero()[:, 0].tolist():
            tokens = self.tokens([batch.transcript[i]])
            self.perplexity.update(self.logits(tokens[None]), tokens.roll(-1)[None])
        self.log(f"{split}/perplexity", self.perplexity, prog_bar=True, batch_size=len(batch))

    def tokens(self, texts: list[str]) -> Tensor:
        """One stream of token numbers, (N,) int64, with the mark of a beginning before each text."""
        encodings = self.network.tokenizer.encode_batch(texts)
        return torch.tensor([i for e in encodings for i in (self.network.start, *e.ids)], device=self.device)

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores of the next token, (B, N, vocabulary), by the embeddings of the words themselves as in GPT-2."""
        return self.network.network(tokens).last_hidden_state @ self.network.network.wte.weight.T

    def configure_optimizers(self) -> Any:
        """AdamW, the rate warmed up and annealed over the whole training."""
        return one_cycle(self, self.hparams["lr"], self.hparams["weight_decay"])

    def export(self, path: Path, card: dict[str, Any]) -> None:
        """Writes a backbone of kind ``text``."""
        backbones.save(self.network, path, "text", self.init, card)


def word_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Whole words in lower case and single marks; those of ``texts`` are known."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [TextEncoder.START, UNKNOWN]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    return tokenizer
