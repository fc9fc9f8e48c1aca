"""Training of a small CLIP on rendered faces: what the large one gives at the paper's scale.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021: an image and a text
transformer whose embeddings of an image and of its caption agree, and of others do not (symmetric cross-entropy over
the batch, with a learned temperature).

One part of a batch are faces with their captions, the other expressions, half of them with a photo caption and half
with a prompt. An expression's two texts are contrasted with each other too: two views of one sample, as in DeCLIP (Li
et al., ICLR 2022), since 2,400 small pictures teach a text transformer too little of what words mean.

Only the training split's prompts are seen. Words of val and test prompts for emotions, strengths and actions occur in
photo captions of training pictures, as a large CLIP has read them on the web; their templates do not.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from datamodules.batches import FaceBatch, PromptBatch
from datamodules.errors import UserError
from datamodules.prompts import PromptDataModule
from trainers import backbones
from trainers.backbone.attributes import one_cycle
from trainers.backbone.augmentation import change_colours, mirror, shift
from trainers.nets.contrastive import class_means, contrastive_loss, cosines
from trainers.nets.extractors import CLIPEncoder

ENDS = {"<|startoftext|>": 0, "<|endoftext|>": 1}


class ClipTraining(pl.LightningModule):
    """Trains a CLIP on faces (the data) and expressions.

    Args:
        config: arguments of transformers' ``CLIPConfig``; the vocabulary's size and ends are filled in.
        prompts: folder of expression prompts with pictures of the faces' size.
        expressions: of them in a batch.
        tokens: size of the vocabulary, at most; it is learned from the training texts.
        lr: peak learning rate of AdamW, which warms up and anneals once.
        weight_decay: of AdamW.
    """

    network: CLIPEncoder

    def __init__(
        self,
        config: dict[str, Any],
        prompts: str,
        expressions: int = 64,
        tokens: int = 1000,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Reads the prompts, learns the vocabulary and builds the network.

        Raises:
            UserError: prompts without pictures, or pictures of another size.
        """
        data, prompts = self.trainer.datamodule, PromptDataModule(self.hparams["prompts"], batch_size=1)  # type: ignore[attr-defined]
        size = self.hparams["config"]["vision_config"]["image_size"]
        for root, found in ((data.root, data.size), (prompts.root, prompts.size)):
            if found != size:
                raise UserError(
                    f"{root}: images of {found} pixels, but model.config.vision_config.image_size is {size}; "
                    "build the data at that size or change the config"
                )
        self.prompts = {split: prompts.whole(split) for split in ("train", "val")}
        self.prompts_sha256 = prompts.manifest.sha256
        known = self.prompts["train"]
        texts = [*known.text, *(text for captions in known.captions for text in captions)]
        texts += [text for batch in data.loader("train") for captions in batch.captions for text in captions]
        vocabulary, merges = learn_tokens(texts, self.hparams["tokens"])
        config = self.hparams["config"]
        ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(vocabulary)}
        config = {**config, "text_config": {**config["text_config"], **ends}}
        self.init: dict[str, Any] = {"config": config, "vocabulary": vocabulary, "merges": merges}
        self.network = CLIPEncoder.from_config(**self.init)

    def training_step(self, batch: FaceBatch, batch_idx: int) -> Tensor:
        """Contrastive losses of augmented images with their texts, and of the expressions' two texts."""
        expressions, faces = self.prompts["train"], len(batch)
        chosen = torch.randint(len(expressions), (self.hparams["expressions"],)).tolist()
        texts = [pick(captions) for captions in batch.captions]
        texts += [pick(expressions.captions[i]) for i in chosen] + [expressions.text[i] for i in chosen]
        face, caption, prompt = self.network.encode_text(texts).split([faces, len(chosen), len(chosen)])
        either = torch.where(torch.rand(len(chosen), 1, device=self.device) < 0.5, caption, prompt)
        image = torch.cat([batch.image, expressions.image[chosen].to(self.device)])
        # Pixels as they are: rounding to bytes, as the encoder does, teaches nothing. A blur would hide the brows.
        image = change_colours(shift(mirror(image))).clamp(-1, 1)
        seen = self.network.model.get_image_features(pixel_values=image).pooler_output
        scale = self.network.model.logit_scale.exp()
        losses = {
            "images": contrastive_loss(seen, torch.cat([face, either]), scale),
            "texts": contrastive_loss(caption, prompt, scale),
        }
        self.log_dict({f"train/{name}": loss for name, loss in losses.items()}, batch_size=len(image))
        return torch.stack(list(losses.values())).sum()

    def validation_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Share of faces whose own caption is nearest among those of the batch."""
        if not batch.real.any():
            return
        similarity = cosines(
            self.network.encode_image(batch.image[batch.real]),
            self.network.encode_text([c[0] for c, real in zip(batch.captions, batch.real, strict=True) if real]),
        )
        right = similarity.argmax(1) == torch.arange(len(similarity), device=self.device)
        self.log("val/caption_recall", right.float().mean(), batch_size=len(right))

    def on_validation_epoch_end(self) -> None:
        """Shares of val expressions whose emotion is recognised.

        ``val/prompt_emotion``: from the prompt, in wordings never seen, as the nearest of the emotions' mean images.
        ``val/image_emotion``: from the picture, as the nearest of the emotions' mean training prompts.
        """
        known, unseen = self.prompts["train"], self.prompts["val"]
        image, text = self._embed(unseen)
        truth = unseen.emotion.to(self.device)
        for name, embedding, others, emotion in (
            ("prompt", text, image, truth),
            ("image", image, self.network.encode_text(known.text), known.emotion.to(self.device)),
        ):
            means = class_means(others, emotion, int(known.emotion.max()) + 1)
            self.log(f"val/{name}_emotion", (cosines(embedding, means).argmax(1) == truth).float().mean())

    def _embed(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        return self.network.encode_image(prompts.image.to(self.device)), self.network.encode_text(prompts.text)

    def configure_optimizers(self) -> Any:
        """AdamW, the rate warmed up and annealed over the whole training."""
        return one_cycle(self, self.hparams["lr"], self.hparams["weight_decay"])

    def export(self, path: Path, card: dict[str, Any]) -> None:
        """Writes a backbone of kind ``clip``."""
        card = {**card, "prompts": {"sha256": self.prompts_sha256}}
        backbones.save(self.network, path, "clip", self.init, card)


def learn_tokens(texts: Iterable[str], size: int) -> tuple[dict[str, int], list[str]]:
    """Byte pairs of a corpus, in CLIP's way: the vocabulary and the merges, frequent ones first."""
    tokenizer = CLIPTokenizer(ENDS, []).train_new_from_iterator(texts, size, show_progress=False)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return model["vocab"], [" ".join(pair) for pair in model["merges"]]


def pick(choices: list[str]) -> str:
    """One at random, by torch's generator."""
    return choices[int(torch.randint(len(choices), ()))]
