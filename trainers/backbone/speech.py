"""Training of a small speech encoder: which phoneme is spoken in each 50 Hz frame.

It gives the demo what wav2vec 2.0 gives at the paper's scale: states that say what is spoken whoever speaks it. Trained
with its labels from the start, on speech with phoneme times, instead of pretrained on unlabelled speech.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
from torchmetrics.classification import MulticlassAccuracy

from datamodules.batches import SpeechBatch
from datamodules.errors import UserError
from trainers import backbones
from trainers.backbone.attributes import one_cycle
from trainers.nets.speech_encoder import FEATURE_RATE, SAMPLE_RATE, SpeechEncoder

SILENCE = "sil"
IGNORED = -100


class SpeechTraining(pl.LightningModule):
    """Trains a speech encoder as a frame-wise phoneme classifier.

    Args:
        encoder: arguments of transformers' ``Wav2Vec2Config``.
        phonemes: the classes, in order; ``sil`` must be among them and stands where nothing is spoken.
        merge: phoneme of the data -> class, for phonemes that have none of their own. Others are not trained on.
        speed: clips are played faster or slower by up to this share, and with that higher or lower.
        noise: standard deviation of the white noise added to a clip of unit variance, at most.
        lr: peak learning rate of AdamW, which warms up and anneals once.
        weight_decay: of AdamW.

    Raises:
        UserError: ``phonemes`` lacks silence, or ``merge`` leads to no class.
    """

    def __init__(
        self,
        encoder: dict[str, Any],
        phonemes: list[str],
        merge: dict[str, str],
        speed: float = 0.1,
        noise: float = 0.1,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        unknown = {SILENCE, *merge.values()} - set(phonemes)
        if unknown:
            raise UserError(f"model.phonemes: '{min(unknown)}' is missing; add it to the list")
        self.init = {"config": encoder, "classes": phonemes}
        self.network = SpeechEncoder(**self.init)  # type: ignore[arg-type]
        self.index = {name: i for i, name in enumerate(phonemes)}
        self.index |= {name: self.index[target] for name, target in merge.items()}
        self.accuracy = MulticlassAccuracy(len(phonemes), average="micro", ignore_index=IGNORED)

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """Cross-entropy over all real frames of clips at random speed and with noise."""
        factor = 1 + self.hparams["speed"] * (2 * torch.rand(()).item() - 1)
        audio = interpolate(batch.audio[:, None], scale_factor=1 / factor, mode="linear")[:, 0]
        level = self.hparams["noise"] * torch.rand(len(batch), 1, device=audio.device)
        audio = audio + level * audio.std(1, keepdim=True) * torch.randn_like(audio)
        audio_lengths = (batch.audio_lengths / factor).long().clamp(max=audio.shape[1])
        logits, lengths = self.network.logits(audio, audio_lengths)
        loss = cross_entropy(logits.mT, self.targets(batch, lengths, factor), ignore_index=IGNORED)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        """Share of frames whose phoneme is right."""
        self._measure(batch, "val")

    def test_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        """As validation, on the test split."""
        self._measure(batch, "test")

    def _measure(self, batch: SpeechBatch, split: str) -> None:
        logits, lengths = self.network.logits(batch.audio, batch.audio_lengths)
        if batch.real.any():
            self.accuracy.update(logits.mT[batch.real], self.targets(batch, lengths)[batch.real])
        self.log(f"{split}/phoneme_accuracy", self.accuracy, prog_bar=True, batch_size=len(batch))

    def targets(self, batch: SpeechBatch, lengths: Tensor, speed: float = 1.0) -> Tensor:
        """The class of each frame, (B, N) int64; padding and unknown phonemes are ignored.

        Args:
            batch: the clips; phoneme times are of normal speed.
            lengths: (B,) int64, frames of each clip at 50 Hz.
            speed: how much faster the clips were played.
        """
        # A feature sees 400 samples and stands for their middle.
        centre = (torch.arange(int(lengths.max())) + 200 / SAMPLE_RATE * FEATURE_RATE) * speed / FEATURE_RATE
        targets = torch.full((len(batch), len(centre)), self.index[SILENCE])
        for row, phonemes in zip(targets, batch.phonemes, strict=True):
            for phoneme, start, end in phonemes:
                row[(centre >= start) & (centre < end)] = self.index.get(phoneme, IGNORED)
        targets = targets.to(lengths.device)
        return targets.masked_fill(torch.arange(len(centre), device=lengths.device) >= lengths[:, None], IGNORED)

    def configure_optimizers(self) -> Any:
        """AdamW, the rate warmed up and annealed over the whole training."""
        return one_cycle(self, self.hparams["lr"], self.hparams["weight_decay"])

    def export(self, path: Path, card: dict[str, Any]) -> None:
        """Writes a backbone of kind ``speech``."""
        backbones.save(self.network, path, "speech", self.init, card)
