"""``facebench convert``: a paper's official weights to a run that predicts, is scored and animates like one of ours."""

from pathlib import Path

from facebench.command import run_command


def convert(config: Path, weights: Path, run: Path) -> None:
    """Turns an official checkpoint into a run folder, as if it had been trained here.

    The docstring of a system's from_official tells what each official weight is called here. The config must have the
    sizes of the checkpoint: those of configs/systems are the papers'.

    Example:
        facebench convert --config configs/systems/faceformer.yaml --weights vocaset.pth --run runs/official
        facebench predict --config runs/official/config.yaml --run runs/official
        facebench animate --checkpoint runs/official/checkpoints/last.ckpt --audio speech.wav --out talk.mp4

    Args:
        config: of the system.
        weights: the official file: safetensors, or a PyTorch file of tensors and plain containers.
        run: folder to write; must not be there yet.
    """
    import inspect

    import pytorch_lightning as pl
    import yaml
    from jsonargparse import ArgumentError, ArgumentParser

    from datamodules.errors import UserError, parsing_error
    from datamodules.shards import write_atomic
    from trainers.cli import LAST
    from trainers.tasks import System

    if run.exists():
        raise UserError(f"--run {run}: is there already; give a new folder")
    if not config.is_file():
        raise UserError(f"--config {config}: no such file")
    state = read_state(weights)
    try:
        text = config.read_text()
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(System, "model")
        parsed = parser.parse_object({"model": yaml.safe_load(text)["model"]})
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{config}: expected a YAML file with a section 'model' ({type(error).__name__})") from error
    except ArgumentError as error:
        raise parsing_error(error) from error
    system = parser.instantiate_classes(parsed).model
    renamed = getattr(inspect.getmodule(type(system)), "from_official", None)
    if renamed is None or len(inspect.signature(renamed).parameters) > 1:
        raise UserError(f"{config}: {system.info.title} has no official weights in one file; see its docstring")
    try:
        system.load_state_dict(renamed(state))
    except (UserError, KeyError, StopIteration, ValueError, RuntimeError) as error:
        raise UserError(f"{weights}: not the official weights of {config}'s {system.info.title} ({error})") from error
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.strategy.connect(system)
    (run / LAST).parent.mkdir(parents=True)
    trainer.save_checkpoint(run / LAST)
    write_atomic(run / "config.yaml", text.encode())
    print(f"written: {run}")


def read_state(path: Path) -> dict:
    """The state dict in an official file; wrappings like ``state_dict`` and ``module.`` are taken off.

    Raises:
        UserError: no such file, or one that holds more than tensors and plain containers.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from datamodules.errors import UserError

    if not path.is_file():
        raise UserError(f"--weights {path}: no such file")
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, OSError) as error:
        raise UserError(f"--weights {path}: not a readable safetensors file ({error})") from error
    except Exception as error:
        raise UserError(
            f"--weights {path}: not a PyTorch file of tensors and plain containers ({type(error).__name__}), and "
            "others could run code; save its state dict alone, with the official code that wrote it"
        ) from error
    for wrapping in ("state_dict", "model"):
        state = state.get(wrapping, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"--weights {path}: expected a state dict, names with tensors")
    for prefix in ("module.", "nn_model."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def main(args: list[str]) -> None:
    """Parses the arguments and runs the verb."""
    run_command(convert, "facebench convert", args)
