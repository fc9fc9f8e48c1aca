"""SyncNet, the network behind LSE-D and LSE-C: does a mouth move with what is heard?

Chung & Zisserman, "Out of Time: Automated Lip Sync in the Wild", ACCV Workshops 2016. Layers, names and inputs are
those of the authors' PyTorch release (github.com/joonson/syncnet_python, MIT), so that its ``syncnet_v2.model`` fits.
The weights are not ours to ship: facebench was tested with random ones in the published layout, never run with the
published ones. They were trained on television; on a rendered face read every value beside the ground truth's.
"""

import pickle
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dct
from torch import Tensor, nn

from datamodules.audio import SAMPLE_RATE
from datamodules.errors import UserError

FPS = 25
SIZE = 224  # pixels
WINDOW = 5  # frames seen at a time
HEARD = 20  # MFCC frames heard at a time, as long as WINDOW
STEP = HEARD // WINDOW  # MFCC frames in a frame of the video
BATCH = 20  # windows at a time, for memory's sake

# Of :func:`mfcc`, the defaults of python_speech_features.
FRAME, HOP, POINTS = 400, 160, 512  # samples
FILTERS, CEPSTRA, LIFTER, EMPHASIS = 26, 13, 22, 0.97


class SyncNet(nn.Module):
    """Embeds what is seen and what is heard in 0.2 s, close together if they belong together.

    The published file's names of the layers stay. Only the first layer of the lip stream mixes frames, and nothing
    pads the time: a run of frames gives what its windows of five give one by one.
    """

    DIMENSIONS = 1024

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_layer(nn.Conv2d(1, 64, 3, padding=1)),
            nn.Identity(),
            *_layer(nn.Conv2d(64, 192, 3, padding=1)),
            nn.MaxPool2d(3, (1, 2)),
            *_layer(nn.Conv2d(192, 384, 3, padding=1)),
            *_layer(nn.Conv2d(384, 256, 3, padding=1)),
            *_layer(nn.Conv2d(256, 256, 3, padding=1)),
            nn.MaxPool2d(3, 2),
            *_layer(nn.Conv2d(256, 512, (5, 4))),
        )
        self.netcnnlip = nn.Sequential(
            *_layer(nn.Conv3d(3, 96, (WINDOW, 7, 7), (1, 2, 2))),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_layer(nn.Conv3d(96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1))),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *_layer(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1))),
            *_layer(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1))),
            *_layer(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1))),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_layer(nn.Conv3d(256, 512, (1, 6, 6))),
        )
        self.netfcaud = _head(self.DIMENSIONS)
        self.netfclip = _head(self.DIMENSIONS)

    @classmethod
    def from_file(cls, path: Path) -> "SyncNet":
        """The published ``syncnet_v2.model``: a state dict as ``torch.save`` writes it, of any version of PyTorch.

        Raises:
            UserError: a pickled module, which could run code; another network; or no such file at all.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: not a state dict but other pickled objects, which could run code; where you trust the file, "
                "convert it: torch.save(model.state_dict(), 'syncnet_v2.model')"
            ) from error
        except (RuntimeError, EOFError, ValueError, KeyError) as error:
            raise UserError(f"{path}: not a file of torch.save; download syncnet_v2.model again") from error
        network = cls()
        try:
            # As a plain dict: old files have no counters of batches, which their version would else ask for.
            network.load_state_dict(dict(state))
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: not SyncNet's layers (netcnnaud, netfcaud, netcnnlip, netfclip); download syncnet_v2.model"
            ) from error
        return network

    def see(self, frames: Tensor) -> Tensor:
        """(T, 224, 224, 3) uint8 RGB of a face at 25 fps -> (T - 4, 1024), one for each window of five frames."""
        # Blue first and 0 ... 255, as OpenCV gave them to the authors.
        video = frames.flip(-1).permute(3, 0, 1, 2).float()
        seen = self.netcnnlip(video[None])
        return self.netfclip(seen[0, :, :, 0, 0].T)

    def hear(self, sound: Tensor) -> Tensor:
        """(N, 13, 20) MFCC, twenty frames of 10 ms -> (N, 1024)."""
        return self.netfcaud(self.netcnnaud(sound[:, None]).flatten(1))

    def forward(self, frames: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings for :func:`metrics.timing.lip_sync_error`, moment by moment as the authors' script takes them.

        Args:
            frames: (T, 224, 224, 3) uint8, RGB of a face that fills the picture, at 25 fps.
            audio: (S,) float32 in [-1, 1] at 16 kHz.

        Returns:
            (N, 1024) of what is seen and of what is heard; the authors' N: five less than the frames that both have.

        Raises:
            ValueError: picture and sound have fewer than six frames in common.
        """
        number = min(len(frames), len(audio) * FPS // SAMPLE_RATE) - WINDOW
        if number < 1:
            raise ValueError(f"needs at least {WINDOW + 1} frames of picture and sound at {FPS} fps")
        device = next(self.parameters()).device
        sound = torch.from_numpy(mfcc(audio.cpu().numpy())).float().unfold(0, HEARD, STEP)
        seen, heard = [], []
        for start in range(0, number, BATCH):
            stop = min(start + BATCH, number)
            seen.append(self.see(frames[start : stop + WINDOW - 1].to(device)))
            heard.append(self.hear(sound[start:stop].to(device)))
        return torch.cat(seen), torch.cat(heard)


def mfcc(audio: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mel cepstra as ``python_speech_features.mfcc`` gives them by default, of 16-bit samples at 16 kHz.

    Pre-emphasis of the whole sound, rectangular frames of 25 ms every 10 ms (the last filled with zeros), power by a
    transform of 512 points, 26 triangular filters up to 8 kHz, 13 cepstra of their logarithms, liftered; the frame's
    log energy stands in the place of the first.

    Args:
        audio: (S,) in [-1, 1].

    Returns:
        (T, 13), T = 1 + ⌈(S − 400) / 160⌉, at least 1.
    """
    samples = np.clip(np.round(audio.astype(np.float64) * 32768), -32768, 32767)
    emphasised = np.append(samples[:1], samples[1:] - EMPHASIS * samples[:-1])
    number = 1 + max(0, -(-(len(samples) - FRAME) // HOP))
    padded = np.pad(emphasised, (0, FRAME + (number - 1) * HOP - len(samples)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::HOP]
    power = np.abs(np.fft.rfft(frames, POINTS)) ** 2 / POINTS
    smallest = np.finfo(np.float64).eps
    energies, total = power @ _filters().T, power.sum(1)
    # Only an exact zero is replaced.
    logs = np.log(np.where(energies == 0, smallest, energies))
    cepstra = dct(logs, type=2, axis=1, norm="ortho")[:, :CEPSTRA]
    cepstra *= 1 + LIFTER / 2 * np.sin(np.pi * np.arange(CEPSTRA) / LIFTER)
    cepstra[:, 0] = np.log(np.where(total == 0, smallest, total))
    return cepstra


def _filters() -> NDArray[np.float64]:
    """(26, 257) triangles that are evenly spaced on the mel scale; their corners are whole points of the transform."""
    mels = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), FILTERS + 2)
    corners = np.floor((POINTS + 1) * 700 * (10 ** (mels / 2595) - 1) / SAMPLE_RATE)
    points = np.arange(POINTS // 2 + 1)
    left, middle, right = (corners[i : i + FILTERS, None] for i in range(3))
    rising, falling = (points - left) / (middle - left), (right - points) / (right - middle)
    return np.clip(np.minimum(rising, falling), 0, None)


def _layer(convolution: nn.Conv2d | nn.Conv3d) -> tuple[nn.Module, nn.Module, nn.Module]:
    norm = nn.BatchNorm2d if isinstance(convolution, nn.Conv2d) else nn.BatchNorm3d
    return convolution, norm(convolution.out_channels), nn.ReLU(inplace=True)


def _head(dimensions: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, dimensions))
