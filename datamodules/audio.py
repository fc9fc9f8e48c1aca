"""Reading the sound files that users have."""

from math import gcd
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from datamodules.errors import UserError

SAMPLE_RATE = 16_000


def read_audio(path: str | Path) -> np.ndarray:
    """Reads wav, flac, mp3, ogg and what else libsndfile knows, at any rate and with any channels.

    Returns:
        (S,) float32 in [-1, 1], mono (the mean of the channels), 16 kHz.

    Raises:
        UserError: no such file, not sound, no samples, or samples that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such sound file")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path}: not a sound file that can be read ({error}); convert it to wav") from error
    if not len(samples):
        raise UserError(f"{path}: holds no samples")
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: holds samples that are not finite; export it again")
    return mono_16khz(samples, rate)


def mono_16khz(samples: np.ndarray, rate: int) -> np.ndarray:
    """(S, channels) samples in [-1, 1] at any rate -> (S',) float32 in [-1, 1], the mean of the channels, 16 kHz."""
    mono = samples.mean(axis=1)
    if rate != SAMPLE_RATE:
        common = gcd(rate, SAMPLE_RATE)
        mono = resample_poly(mono, SAMPLE_RATE // common, rate // common)
    return np.clip(mono, -1, 1).astype(np.float32)
