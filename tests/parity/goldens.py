"""A golden: a folder of inputs, weights and outputs recorded from a system's official implementation."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class Golden:
    """One golden folder: ``config.json``, ``io.safetensors`` and, mostly, ``weights.safetensors``.

    Attributes:
        folder: where it lies.
        config: the sizes to build the system with, plus ``system`` and ``variant``.
        compared: names of the tensors compared so far, in that order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        for field in ("system", "variant"):
            assert field in self.config, f"{self.folder / 'config.json'}: no field '{field}'"
        self.compared: list[str] = []

    @property
    def system(self) -> str:
        """Whose golden it is: the check is ``check_<system>.py``."""
        return self.config["system"]

    @property
    def variant(self) -> str:
        """Which of the system's variants was recorded."""
        return self.config["variant"]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Weights by official state-dict key."""
        return load_file(self.folder / "weights.safetensors")

    @cached_property
    def io(self) -> dict[str, Tensor]:
        """Recorded inputs and outputs by name."""
        return load_file(self.folder / "io.safetensors")

    def weights_under(self, prefix: str) -> dict[str, Tensor]:
        """The weights whose key starts with ``prefix``, without it: ``weights_under("flow.")``."""
        found = {key[len(prefix) :]: value for key, value in self.weights.items() if key.startswith(prefix)}
        assert found, f"{self.folder.name}: no weight starts with '{prefix}'"
        return found

    def close(self, name: str, actual: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        """Compares with the recorded tensor ``name``; integers and booleans exactly.

        Raises:
            AssertionError: shape or values differ; says the tensor and by how much.
        """
        expected, actual = self._pair(name, actual)
        if not expected.is_floating_point():
            wrong = int((actual != expected).sum())
            assert wrong == 0, f"{self._label(name)}: {wrong} of {expected.numel()} values differ"
            return
        ok = torch.isclose(actual.to(expected.dtype), expected, rtol=rtol, atol=atol, equal_nan=True)
        assert ok.all(), self._differ(name, actual, expected, ~ok, f"rtol {rtol:g}, atol {atol:g}")

    def close_gradient(self, name: str, actual: Any, rtol: float = 1e-3, atol: float = 1e-9) -> None:
        """Compares a gradient: the largest difference against the largest recorded value.

        Raises:
            AssertionError: it is above ``rtol * max|expected| + atol``.
        """
        expected, actual = self._pair(name, actual)
        bound = rtol * expected.abs().max() + atol
        ok = (actual - expected).abs() <= bound
        assert ok.all(), self._differ(name, actual, expected, ~ok, f"{rtol:g} of the largest, {bound:.3g}")

    def _pair(self, name: str, actual: Any) -> tuple[Tensor, Tensor]:
        assert name in self.io, f"{self._label(name)}: not recorded; there are {', '.join(sorted(self.io))}"
        assert actual is not None, f"{self._label(name)}: nothing was computed (None)"
        expected, actual = self.io[name], torch.as_tensor(actual).detach().cpu()
        self.compared.append(name)
        assert actual.shape == expected.shape, (
            f"{self._label(name)}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        )
        return expected, actual

    def _label(self, name: str) -> str:
        return f"{self.folder.name}/{name}"

    def _differ(self, name: str, actual: Tensor, expected: Tensor, wrong: Tensor, tolerance: str) -> str:
        difference = (actual.double() - expected.double()).abs()[wrong]
        relative = difference / expected.double().abs()[wrong].clamp_min(1e-12)
        return (
            f"{self._label(name)}: {len(difference)} of {expected.numel()} values differ by more than "
            f"{tolerance}; by up to {difference.max():.3g} absolute, {relative.max():.3g} relative "
            f"(recorded values up to {expected.abs().max():.3g})"
        )
