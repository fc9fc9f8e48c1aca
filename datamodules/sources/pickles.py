"""Reading the pickles of old releases: numpy arrays, plain containers and plain values, and nothing that runs code."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.errors import UserError


def read_pickle(path: Path) -> Any:
    """Reads a pickle, also of Python 2 (its strings as latin-1), whose contents are data alone.

    Args:
        path: the pickle.

    Returns:
        dicts, lists, tuples, sets, strings, bytes, numbers and numpy arrays, as they were pickled.

    Raises:
        UserError: no such file, not a pickle, or one that names any other class or function.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a pickle of the official release")
    try:
        with path.open("rb") as file:
            return _DataUnpickler(file, encoding="latin1").load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # damaged pickles raise almost anything
        raise UserError(f"{path}: not a readable pickle ({type(error).__name__}: {error}); copy it again") from error


class _ArrayType:
    """Stands for ``numpy.ndarray`` in a pickle, which names the class without calling it."""


def _empty_array(subtype: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What ``numpy``'s ``_reconstruct`` gives: an empty array, whose state follows in the pickle."""
    if subtype is not _ArrayType or tuple(shape) != (0,):
        raise UserError(f"holds an array of shape {shape} before its state, expected (0,); not a pickle of data alone")
    return np.empty(shape, np.int8)


def _array_of_bytes(data: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _scalar(dtype: np.dtype, data: bytes | str) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype, count=1)[0]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise UserError(f"encodes text as '{encoding}', expected latin1; not a pickle of data alone")
    return text.encode("latin1")


# Where NumPy 1 and NumPy 2, Python 2 and Python 3 keep the same things.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "multiarray._reconstruct": _empty_array,
    "multiarray.scalar": _scalar,
    "numeric._frombuffer": _array_of_bytes,
}
for _core in ("numpy.core", "numpy._core"):
    for _name, _function in _FUNCTIONS.items():
        _module, _attribute = _name.split(".")
        _ADMITTED[f"{_core}.{_module}", _attribute] = _function
for _builtins in ("builtins", "__builtin__"):
    for _type in (set, frozenset, complex, bytearray):
        _ADMITTED[_builtins, _type.__name__] = _type


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise UserError(f"names '{module}.{name}', expected arrays and plain containers only; it is not opened")
        return _ADMITTED[module, name]
