import pytest
import pytorch_lightning as pl
import torch

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from trainers import backbones
from trainers.backbone.clip import ClipTraining, learn_tokens, pick
from trainers.nets.extractors import CLIPEncoder

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = {
    "projection_dim": 8,
    "text_config": {**TOWER, "max_position_embeddings": 12},
    "vision_config": {**TOWER, "image_size": 32, "patch_size": 16},
}


def train(prompts_root, faces_root, folder, epochs: int = 1, **changes) -> ClipTraining:
    torch.manual_seed(0)
    settings = {"config": CONFIG, "prompts": str(prompts_root), "expressions": 8, "lr": 3e-3}
    model = ClipTraining(**{**settings, **changes})
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, log_every_n_steps=1, use_distributed_sampler=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=FaceDataModule(str(faces_root), batch_size=8))
    return model


def test_tokens_are_whole_frequent_words_and_pieces_of_others():
    vocabulary, merges = learn_tokens(["a happy face", "a sad face"] * 5, size=600)
    encoder = CLIPEncoder.from_config(
        {**CONFIG, "text_config": {**CONFIG["text_config"], **ends(vocabulary)}}, vocabulary, merges
    )
    tokenizer = encoder.processor.tokenizer
    assert tokenizer.tokenize("A happy face") == ["a</w>", "happy</w>", "face</w>"]
    assert len(tokenizer.tokenize("surface")) > 1
    assert tokenizer("a sad face").input_ids[0] == vocabulary["<|startoftext|>"] == 0
    assert tokenizer("a sad face").input_ids[-1] == vocabulary["<|endoftext|>"] == 1


def ends(vocabulary) -> dict:
    return {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": len(vocabulary)}


def test_it_tells_expressions_apart_and_exports(prompts_root, faces_root, tmp_path):
    model = train(prompts_root, faces_root, tmp_path, epochs=60)
    known = model.prompts["train"]
    with torch.no_grad():
        image, text = model.network.encode_image(known.image), model.network.encode_text(known.text)
    unit = torch.nn.functional.normalize
    nearest = (unit(image, dim=1) @ unit(text, dim=1).T).argmax(1)
    assert (nearest == torch.arange(8)).float().mean() > 0.5  # chance is 1/8

    path = tmp_path / "clip.safetensors"
    model.export(path, {"scores": {}})
    loaded = backbones.load(f"path:{path}", "clip")
    torch.testing.assert_close(loaded.encode_text(known.text), text)
    torch.testing.assert_close(loaded.encode_image(known.image), image)
    assert set(backbones.card(f"path:{path}")) == {"scores", "prompts"}


def test_pixels_reach_the_network_as_in_training(prompts_root, faces_root, tmp_path):
    model = train(prompts_root, faces_root, tmp_path).network
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        direct = model.model.get_image_features(pixel_values=((image + 1) * 127.5).round() / 127.5 - 1).pooler_output
        torch.testing.assert_close(model.encode_image(image), direct, rtol=1e-4, atol=1e-4)


def test_pictures_of_another_size_are_refused(prompts_root, faces_root, tmp_path):
    config = {**CONFIG, "vision_config": {**CONFIG["vision_config"], "image_size": 64}}
    with pytest.raises(UserError, match=r"images of 32 pixels, but model\.config.vision_config.image_size is 64"):
        train(prompts_root, faces_root, tmp_path, config=config)


def test_picks_are_uniform_and_seeded():
    torch.manual_seed(0)
    drawn = [pick(["a", "b", "c"]) for _ in range(300)]
    assert all(80 < drawn.count(letter) < 120 for letter in "abc")
