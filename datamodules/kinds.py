"""The data module of each kind of data, for tools that take any folder of shards."""

from pathlib import Path
from typing import Any

from datamodules.datamodule import ShardDataModule
from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.shards import Manifest
from datamodules.speech import SpeechDataModule

MODULES: dict[str, type[ShardDataModule]] = {module.kind: module for module in (FaceDataModule, SpeechDataModule)}


def open_data(root: str | Path, batch_size: int | None = 1, **settings: Any) -> ShardDataModule:
    """The data module that fits a folder; further arguments are the module's.

    Raises:
        UserError: no finished folder of shards, or a kind that facebench does not know.
    """
    kind = Manifest.read(root).kind
    if kind not in MODULES:
        raise UserError(f"{root}: manifest field 'kind' is '{kind}', expected one of {', '.join(MODULES)}")
    return MODULES[kind](root=str(root), batch_size=batch_size, **settings)
