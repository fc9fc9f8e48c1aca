import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile

from facebench.__main__ import main
from trainers.cli import LAST, RunCLI


@pytest.fixture(scope="module")
def checkpoint(voca_config, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    RunCLI(["fit", "--config", str(voca_config), "--run", str(run), "--trainer.max_epochs", "1"])
    return run / LAST


def animate(checkpoint, talking_root, audio, out, *more):
    command = ["animate", "--checkpoint", str(checkpoint), "--audio", str(audio), "--out", str(out)]
    return main([*command, "--data", str(talking_root), "--size", "64", *more])


def streams(path) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize(
    ("name", "rate", "seconds", "channels", "level"),
    [("talk.wav", 44_100, 2.0, 2, 0.3), ("talk.mp3", 44_100, 1.0, 1, 0.3), ("silence.flac", 16_000, 1.0, 1, 0.0)],
)
def test_any_recording_gives_a_video_with_sound(
    checkpoint, talking_root, tmp_path, name, rate, seconds, channels, level
):
    time = np.arange(int(rate * seconds)) / rate
    soundfile.write(tmp_path / name, np.stack([level * np.sin(900 * time)] * channels, 1), rate)
    assert animate(checkpoint, talking_root, tmp_path / name, tmp_path / "out.mp4") == 0
    vertices = np.load(tmp_path / "out.npy")
    assert abs(len(vertices) - 30 * seconds) <= 3  # mp3 pads
    assert vertices.shape[1:] == (12, 3)
    assert np.isfinite(vertices).all()
    found = streams(tmp_path / "out.mp4")
    assert "Video: h264" in found
    assert "Audio: aac" in found


def test_a_tenth_of_a_second_gives_three_frames(checkpoint, talking_root, tmp_path):
    soundfile.write(tmp_path / "short.wav", np.full(1600, 0.1), 16_000)
    assert animate(checkpoint, talking_root, tmp_path / "short.wav", tmp_path / "out.mp4") == 0
    assert np.load(tmp_path / "out.npy").shape == (3, 12, 3)


def test_a_mesh_file_can_be_animated(checkpoint, talking_root, tmp_path):
    import trimesh

    sphere = trimesh.creation.icosphere(subdivisions=0, radius=0.1)
    assert len(sphere.vertices) == 12
    sphere.export(tmp_path / "mesh.obj")
    soundfile.write(tmp_path / "a.wav", np.full(3200, 0.1), 16_000)
    done = animate(
        checkpoint, talking_root, tmp_path / "a.wav", tmp_path / "out.mp4", "--template", str(tmp_path / "mesh.obj")
    )
    assert done == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--subject", "nobody"], "--subject nobody: unknown"),
        (["--style", "dora"], "--style dora: unknown"),
        (["--audio", "no.wav"], "no.wav: no such sound file"),
        (["--out", "x.avi"], "ends in .mp4"),
        (["--checkpoint", "no.ckpt"], "no.ckpt: no such checkpoint"),
    ],
)
def test_mistakes_are_one_line(checkpoint, talking_root, tmp_path, capsys, more, says):
    soundfile.write(tmp_path / "a.wav", np.full(3200, 0.1), 16_000)
    assert animate(checkpoint, talking_root, tmp_path / "a.wav", tmp_path / "out.mp4", *more) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_mesh_of_another_topology_is_refused(checkpoint, talking_root, tmp_path, capsys):
    import trimesh

    trimesh.creation.icosphere(subdivisions=1).export(tmp_path / "mesh.obj")
    soundfile.write(tmp_path / "a.wav", np.full(3200, 0.1), 16_000)
    more = ["--template", str(tmp_path / "mesh.obj")]
    assert animate(checkpoint, talking_root, tmp_path / "a.wav", tmp_path / "out.mp4", *more) == 2
    assert "a mesh of 42 vertices" in capsys.readouterr().err
