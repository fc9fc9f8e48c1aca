"""The data module of each kind of data, for tools that take any folder of shards."""

from pathlib import Path
from typing import Any

from datamodules.datamodule import ShardDataModule
from datamodules.errors import BadSample, UserError
from datamodules.faces import FaceDataModule
from datamodules.prompts import PromptDataModule
from datamodules.shards import Manifest
from datamodules.speech import SpeechDataModule
from datamodules.stream import ShardReader

MODULES: dict[str, type[ShardDataModule]] = {
    module.kind: module for module in (FaceDataModule, SpeechDataModule, PromptDataModule)
}


def open_data(root: str | Path, batch_size: int | None = 1, **settings: Any) -> ShardDataModule:
    """The data module that fits a folder; further arguments are the module's.

    Raises:
        UserError: no finished folder of shards, or a kind that facebench does not know.
    """
    kind = Manifest.read(root).kind
    if kind not in MODULES:
        raise UserError(
            f"{root}: manifest field 'kind' is '{kind}', which nothing here reads yet, expected one of "
            f"{', '.join(MODULES)}; its shards are plain WebDataset"
        )
    return MODULES[kind](root=str(root), batch_size=batch_size, **settings)


def read_sample(data: ShardDataModule, reader: ShardReader, number: int) -> dict[str, Any]:
    """One decoded sample of a shard.

    Raises:
        UserError: it cannot be used.
    """
    key = reader.shard.keys[number]
    try:
        return data.decode(key, reader.read(number))
    except UserError:
        raise
    except Exception as error:
        what = str(error) if isinstance(error, BadSample) else f"not decodable ({type(error).__name__}: {error})"
        raise UserError(f"{reader.place}: sample '{key}': {what}; copy the shard again or rebuild it") from error
