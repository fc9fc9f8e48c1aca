"""Normalisations that change units: one centre and one scale per axis, written down so that they can be undone."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Affine:
    """x -> (x - centre) / scale. A negative scale mirrors an axis; a rotation by pi mirrors two.

    Attributes:
        centre, scale: broadcast against the values, for instance (3,) for vertices (T, V, 3), or (T, 1, 3) where
            every frame has its own.
    """

    centre: NDArray[np.float64]
    scale: NDArray[np.float64]

    def apply(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Official unit -> normalised."""
        return (np.asarray(values, np.float64) - self.centre) / self.scale

    def invert(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Normalised -> official unit."""
        return np.asarray(values, np.float64) * self.scale + self.centre

    def describe(self) -> dict[str, list[float]]:
        """For a manifest; :meth:`described` reads it."""
        return {"centre": self.centre.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def described(cls, raw: dict[str, Any]) -> "Affine":
        """From what :meth:`describe` gave."""
        return cls(np.array(raw["centre"], np.float64), np.array(raw["scale"], np.float64))

    @classmethod
    def min_max(cls, low: Any, high: Any, to: tuple[float, float]) -> "Affine":
        """Maps [low, high] to the interval ``to``."""
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        scale = (high - low) / (to[1] - to[0])
        return cls(low - to[0] * scale, scale)
