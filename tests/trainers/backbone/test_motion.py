import pytest
import pytorch_lightning as pl
import torch

from datamodules.demo.visemes import EMOTIONS
from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers import backbones
from trainers.backbone.motion import MotionTraining


def fit(root, **changes) -> MotionTraining:
    torch.manual_seed(0)
    model = MotionTraining(
        **{"emotions": list(EMOTIONS), "every": 40, "dropout": 0.0, "lr": 1e-2, "noise": 0.0, "louder": 0.0, **changes}
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=40,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=SpeechDataModule(str(root), batch_size=4))
    return model


def test_it_learns_its_clips_and_exports_a_judge(head_root, tmp_path) -> None:
    model = fit(head_root).eval()
    model.export(tmp_path / "judge.safetensors", {"scores": {}})
    judge = backbones.load(f"path:{tmp_path}/judge.safetensors", "motion")
    batch = next(iter(SpeechDataModule(str(head_root), batch_size=16).loader("train")))
    with torch.inference_mode():
        logits = torch.stack(
            [judge(batch.vertices[i, :n], batch.template[i]) for i, n in enumerate(batch.lengths.tolist())]
        )
        torch.testing.assert_close(logits, model.logits(batch))
    assert (logits.argmax(1) == batch.emotion).float().mean() > 0.7  # chance: 1 / 8


def test_other_data_is_refused(head_root, talking_root) -> None:
    with pytest.raises(UserError, match=r"model\.region: .* has no region 'tail'; it has"):
        fit(head_root, region="tail")
    with pytest.raises(UserError, match=r"model\.emotions: .* list the same"):
        fit(head_root, emotions=["neutral"])
