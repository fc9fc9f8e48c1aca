import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pygltflib
import pytest
import soundfile
import torch
import trimesh

from facebench.__main__ import main
from trainers.cli import LAST, RunCLI
from trainers.nets.rig import load_rig


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
        (["--emotion", "happy"], "--emotion: VOCA (wav2vec 2.0 for DeepSpeech) does not take it; it takes --style"),
        (["--prompt", "with a smile"], "--prompt: VOCA (wav2vec 2.0 for DeepSpeech) does not take it"),
        (["--reference", "[anna-000]"], "--reference: VOCA (wav2vec 2.0 for DeepSpeech) does not take it"),
        (["--transcript", "hum"], "--transcript: VOCA (wav2vec 2.0 for DeepSpeech) does not take it"),
        (["--words", "none.csv"], "none.csv: no such file of word times"),
        (["--template", "none.obj"], "--template none.obj: not a readable mesh"),
        (["--controls", "a.csv"], "moves vertices, not a rig's controls"),
        (["--chunk", "1"], "--chunk 1: expected at least 5 seconds"),
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


def test_the_moving_mesh_as_glb_and_as_objs(checkpoint, talking_root, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(8000) / 9) * 0.3, 16_000)
    for mesh in ("talk.glb", "frames"):
        done = animate(
            checkpoint, talking_root, tmp_path / "a.wav", tmp_path / "out.mp4", "--mesh", str(tmp_path / mesh)
        )
        assert done == 0
    vertices = np.load(tmp_path / "out.npy")
    frame = trimesh.load(tmp_path / "frames" / f"frame-{len(vertices) - 1:05d}.obj", process=False)
    np.testing.assert_allclose(frame.vertices, vertices[-1], atol=1e-6)
    assert trimesh.load(tmp_path / "talk.glb", force="mesh", process=False).vertices.shape == (12, 3)


@pytest.fixture(scope="module")
def rig_checkpoint(head_root, tmp_path_factory):
    """CSTalk's demo config after a step in each stage."""
    run = tmp_path_factory.mktemp("rig")
    config = Path(__file__).parents[2] / "configs" / "demo" / "cstalk.yaml"
    short = ["--trainer.max_epochs", "2", "--model.init_args.stage_epochs", "[1]", "--trainer.limit_train_batches", "1"]
    quiet = ["--trainer.enable_progress_bar", "false", "--data.init_args.root", str(head_root)]
    RunCLI(["fit", "--config", str(config), "--run", str(run), *short, *quiet, "--trainer.limit_val_batches", "0"])
    return run / LAST


def test_a_rig_gives_arkit_curves_and_its_own_morph_targets(rig_checkpoint, head_root, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(4800) / 9) * 0.3, 16_000)
    files = ["--controls", str(tmp_path / "a.csv"), "--mesh", str(tmp_path / "a.glb")]
    sad = ["--emotion", "sad", "--intensity", "2"]
    assert animate(rig_checkpoint, head_root, tmp_path / "a.wav", tmp_path / "out.mp4", *files, *sad[:2]) == 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + 9
    gltf = pygltflib.GLTF2().load(str(tmp_path / "a.glb"))
    assert "jawOpen" in gltf.meshes[0].extras["targetNames"]
    assert animate(rig_checkpoint, head_root, tmp_path / "a.wav", tmp_path / "out.mp4", *sad) == 2, "no intensity"


def test_an_unknown_emotion_is_one_line(rig_checkpoint, head_root, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", np.zeros(4800), 16_000)
    assert animate(rig_checkpoint, head_root, tmp_path / "a.wav", tmp_path / "out.mp4", "--emotion", "bored") == 2
    assert "--emotion bored: unknown; this after CSTalk knows neutral, happy" in capsys.readouterr().err


def test_a_rig_without_a_mesh_writes_its_controls_alone(rig_checkpoint, head_root, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("\n".join(load_rig("demo").controls))
    state = torch.load(rig_checkpoint, weights_only=True)
    state["facebench"]["init"] |= {"rig": f"names:{tmp_path / 'names.txt'}", "num_vertices": 0}
    torch.save(state, tmp_path / "meshless.ckpt")
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(4800) / 9) * 0.3, 16_000)
    for name, more in (("with.mp4", []), ("without.mp4", ["--checkpoint", str(tmp_path / "meshless.ckpt")])):
        curves = ["--controls", str(tmp_path / f"{name}.npy"), *more]
        assert animate(rig_checkpoint, head_root, tmp_path / "a.wav", tmp_path / name, *curves) == 0
    assert not (tmp_path / "without.mp4").exists()
    np.testing.assert_array_equal(np.load(tmp_path / "without.mp4.npy"), np.load(tmp_path / "with.mp4.npy"))
    assert animate(tmp_path / "meshless.ckpt", head_root, tmp_path / "a.wav", tmp_path / "out.mp4") == 2
    assert "knows no mesh; give --controls" in capsys.readouterr().err
