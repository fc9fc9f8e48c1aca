import math

import numpy as np
import pytest
import torch

from datamodules.errors import UserError
from trainers import backbones
from trainers.nets.audio_windows import WindowEncoder, WindowMel, frame_middles


def noise(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    clips = [torch.randn(length) for length in lengths]
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), torch.tensor(lengths)


def test_energies_are_the_power_of_a_windowed_transform_in_htk_bands() -> None:
    audio = noise(4000)[0][0].double().numpy()
    hann = 0.5 - 0.5 * np.cos(2 * math.pi * np.arange(800) / 800)
    column = 9  # sample 1440: its window, samples 1040 ... 1839, lies within the sound
    power = np.abs(np.fft.rfft(np.pad(hann * audio[1040:1840], (624, 624)))) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 8000 / 700), 82) / 2595) - 1)
    low, middle, high = (edges[50 + i] for i in range(3))
    frequency = np.arange(1025) * 16_000 / 2048
    triangle = np.minimum((frequency - low) / (middle - low), (high - frequency) / (high - middle)).clip(min=0)
    energies = WindowMel(80).energies(torch.from_numpy(audio).float())
    assert energies.shape == (26, 80)
    assert energies[column, 50].item() == pytest.approx(math.log(power @ triangle), rel=1e-4)


def test_a_clip_has_a_window_for_every_moment_and_any_level_gives_the_same() -> None:
    mel, (audio, lengths) = WindowMel(80), noise(16_000, 8_050)
    energies, counts = mel(audio, lengths)
    assert counts.tolist() == [201, 151]
    torch.testing.assert_close(mel(0.1 * audio, lengths)[0], energies)
    alone, _ = mel(audio[1:, :8_050], lengths[1:])
    assert torch.equal(alone[0], energies[1, :151])
    assert energies[0, :40].allclose(torch.tensor(1e-10).log())  # the silence before the sound
    assert mel(torch.zeros(1, 100), torch.tensor([100]))[0].isfinite().all()


def test_sliding_the_stack_equals_encoding_each_window_alone() -> None:
    torch.manual_seed(0)
    network, energies = WindowEncoder(bands=8, width=6, dim=4).eval(), torch.randn(2, 130, 8)
    codes = network(energies)
    assert codes.shape == (2, 30, 4)
    for j in (0, 17, 29):
        torch.testing.assert_close(network(energies[:, j : j + 101])[:, 0], codes[:, j])


def test_frames_get_the_window_around_their_middle_and_the_last_one_after_the_sound() -> None:
    torch.manual_seed(0)
    network, energies = WindowEncoder(bands=8, width=6, dim=4).eval(), torch.randn(2, 130, 8)
    assert frame_middles(3, 30).tolist() == pytest.approx([1 / 60, 1 / 20, 1 / 12])
    codes = network(energies)
    at_frames = network.at_frames(energies, torch.tensor([130, 106]), frames=5, fps=30)
    torch.testing.assert_close(at_frames[0], codes[0, [2, 5, 8, 12, 15]])  # 16.7, 50, 83.3, 116.7 and 150 ms
    torch.testing.assert_close(at_frames[1], codes[1, [2, 5, 5, 5, 5]])
    part = network.at_frames(energies, torch.tensor([130, 106]), frames=2, fps=30, first=torch.tensor([3, 0]))
    torch.testing.assert_close(part, torch.stack([codes[0, [12, 15]], codes[1, [2, 5]]]))


def test_the_official_size() -> None:
    assert (
        sum(parameter.numel() for parameter in WindowEncoder().parameters())
        == 80 * 5 * 128 + 128 + 6 * (128 * 128 * 5 + 128) + 128 * 128 + 128
    )


def test_it_is_a_backbone() -> None:
    network = backbones.load("mel100:40", "speech")
    assert isinstance(network, WindowMel)
    assert network.dim == 40
    with pytest.raises(UserError, match="mel100:80"):
        backbones.load("mel100:wide", "speech")
    with pytest.raises(UserError, match="train_encoder"):
        network.train_part("upper")
