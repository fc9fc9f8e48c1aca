"""Audio as MeshTalk hears it (Richard et al., ICCV 2021): one second of log-mel energies around every frame.

Officially (facebookresearch/meshtalk, commit 0904602) each frame's second of sound is cut out, turned into 101 columns
of energies and encoded on its own by a stack of unpadded dilated convolutions, whose receptive field is just these 101
columns. Here the energies of a clip are computed once and the same stack slides over them, which costs a sixteenth and
makes the code of every window at once. What differs: a window starts on a multiple of 10 ms, and its first and last
three columns see the sound beyond it instead of its own reflection.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pad
from torch.nn.utils.rnn import pad_sequence
from transformers.audio_utils import mel_filter_bank

from datamodules.errors import UserError
from trainers.nets.speech_encoder import SAMPLE_RATE, Alignment, TrainedPart

COLUMN_RATE = 100
HOP = SAMPLE_RATE // COLUMN_RATE
WINDOW = 101  # columns of one second


class WindowMel(nn.Module):
    """Log-mel energies at 100 Hz in the form of a speech encoder: ``mel100:80``.

    Hann windows of 50 ms in transforms of 2048 samples, HTK's mel scale, the natural logarithm of the power from 1e-10.
    A clip is brought to a mean absolute level of 0.01 and has half a second of silence before and after it, so that
    column j + 50 lies at j / 100 seconds and every moment of the clip has a whole window.

    Args:
        bands: number of mel bands.
    """

    classes: tuple[str, ...] = ()
    classifier = None
    TRANSFORM, HANN = 2048, 800
    filters: Tensor

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.dim = bands
        filters = mel_filter_bank(
            self.TRANSFORM // 2 + 1, bands, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm=None, mel_scale="htk"
        )
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)

    @classmethod
    def from_name(cls, name: str) -> "WindowMel":
        """``80`` -> 80 bands.

        Raises:
            UserError: not a number above 0.
        """
        if not name.isdigit() or not int(name):
            raise UserError(f"backbone 'mel100:{name}': expected mel100:<number of bands>, such as mel100:80")
        return cls(int(name))

    def train_part(self, part: TrainedPart) -> None:
        """There is nothing to train.

        Raises:
            UserError: a part is to be trained.
        """
        if part != "none":
            raise UserError(f"model.train_encoder: '{part}', but mel energies have no weights; set it to none")

    def forward(
        self,
        audio: Tensor,
        audio_lengths: Tensor,
        alignment: Alignment = "native",
        frames: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`trainers.nets.speech_encoder.SpeechEncoder.forward`, at 100 Hz; ``native`` is the one alignment.

        Returns:
            (B, N, bands), N = S // 160 + 101 of the longest clip, and how many of each clip are real, (B,) int64.
        """
        if alignment != "native":
            raise ValueError(f"alignment '{alignment}': windows of mel energies meet frames in WindowEncoder.at_frames")
        half = SAMPLE_RATE // 2
        clips = []
        for waveform, length in zip(audio, audio_lengths.tolist(), strict=True):
            clip = waveform[:length]
            level = 0.01 * clip / clip.abs().mean().clamp(min=1e-7)
            clips.append(self.energies(pad(level, (half, half))))
        lengths = torch.tensor([len(clip) for clip in clips], device=audio.device)
        return pad_sequence(clips, batch_first=True), lengths

    def energies(self, waveform: Tensor) -> Tensor:
        """(S,) or (B, S) -> (..., S // 160 + 1, bands): column j around sample 160·j, reflected at both ends."""
        with torch.autocast(waveform.device.type, enabled=False):  # half precision holds neither end of their range
            window = torch.hann_window(self.HANN, device=waveform.device)
            spectrum = torch.stft(
                waveform, self.TRANSFORM, HOP, win_length=self.HANN, window=window, center=True, return_complex=True
            )
            return (spectrum.abs().square().mT @ self.filters).clamp(min=1e-10).log()


class WindowEncoder(nn.Module):
    """Codes of one-second windows by dilated convolutions with averaged skips.

    Args:
        bands: of the mel energies.
        width: of the convolutions.
        dim: of a code.
        dropout: after each dilated convolution, while training.
    """

    DILATIONS = (2, 4, 6, 2, 4, 6)

    def __init__(self, bands: int = 80, width: int = 128, dim: int = 128, dropout: float = 0.2) -> None:
        super().__init__()
        self.convert_dimensions = nn.Conv1d(bands, width, kernel_size=5)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 5, dilation=dilation) for dilation in self.DILATIONS)
        self.dropout = nn.Dropout(dropout)
        self.code = nn.Linear(width, dim)
        for convolution in (self.convert_dimensions, *self.convs):
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.constant_(convolution.bias, 0.01)

    def forward(self, energies: Tensor) -> Tensor:
        """Codes of all windows, one every 10 ms.

        Args:
            energies: (B, N, bands) at 100 Hz, N at least 101.

        Returns:
            (B, N - 100, dim): code j is of the columns j ... j + 100.
        """
        x = leaky_relu(self.convert_dimensions(energies.mT), 0.2)
        for convolution, dilation in zip(self.convs, self.DILATIONS, strict=True):
            cut = 2 * dilation
            x = (x[..., cut:-cut] + self.dropout(leaky_relu(convolution(x), 0.2))) / 2
        return self.code(x.mT)

    def at_frames(
        self, energies: Tensor, lengths: Tensor, frames: int, fps: float, first: Tensor | None = None
    ) -> Tensor:
        """Codes of the windows nearest to the middle of each frame.

        Args:
            energies: (B, N, bands) of :class:`WindowMel`.
            lengths: (B,) int64, how many of N are real.
            frames: T.
            fps: frames per second.
            first: (B,) int64, the frame to begin with, where only a part of a clip is wanted; 0 where not given.

        Returns:
            (B, T, dim). Frames after the end of the sound get its last window.
        """
        middles = frame_middles(frames, fps).to(energies.device)
        if first is not None:
            middles = middles + first[:, None] / fps
        nearest = (middles * COLUMN_RATE).round().long().minimum((lengths - WINDOW)[:, None])
        start = nearest[:, :1]
        columns = start + torch.arange(int((nearest - start).max()) + WINDOW, device=energies.device)
        codes = self(energies.take_along_dim(columns.clamp(max=energies.shape[1] - 1)[..., None], dim=1))
        return codes.take_along_dim((nearest - start)[..., None], dim=1)


def frame_middles(frames: int, fps: float) -> Tensor:
    """When the middle of each frame is, in seconds: (frames,) float64."""
    return (torch.arange(frames, dtype=torch.float64) + 0.5) / fps
