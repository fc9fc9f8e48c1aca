import numpy as np
import pytest
import soundfile

from datamodules.audio import read_audio
from datamodules.errors import UserError


@pytest.mark.parametrize(("suffix", "rate"), [("wav", 44_100), ("flac", 48_000), ("mp3", 44_100), ("wav", 16_000)])
def test_a_stereo_tone_keeps_its_pitch_and_length(tmp_path, suffix, rate):
    seconds, pitch = 1.5, 440
    tone = 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, np.stack([tone, tone], 1), rate)
    samples = read_audio(path)
    assert samples.dtype == np.float32
    assert abs(len(samples) / 16_000 - seconds) < 0.1  # mp3 pads
    spectrum = np.abs(np.fft.rfft(samples))
    assert abs(spectrum.argmax() * 16_000 / len(samples) - pitch) < 2
    assert abs(np.abs(samples).max() - 0.5) < 0.05


def test_channels_are_averaged(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.array([[0.5, -0.5], [0.25, 0.75]]), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), [0.0, 0.5])


def test_what_is_no_sound_is_named(tmp_path):
    with pytest.raises(UserError, match="no such sound file"):
        read_audio(tmp_path / "a.wav")
    (tmp_path / "b.wav").write_bytes(b"not sound")
    with pytest.raises(UserError, match=r"b\.wav: not a sound file"):
        read_audio(tmp_path / "b.wav")
    soundfile.write(tmp_path / "c.wav", np.zeros((0, 1)), 16_000)
    with pytest.raises(UserError, match="holds no samples"):
        read_audio(tmp_path / "c.wav")
    soundfile.write(tmp_path / "d.wav", np.array([0.0, np.nan]), 16_000, subtype="FLOAT")
    with pytest.raises(UserError, match="not finite"):
        read_audio(tmp_path / "d.wav")
