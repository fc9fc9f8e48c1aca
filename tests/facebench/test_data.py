import inspect
import json

import numpy as np
import pytest
from PIL import Image

from datamodules.shards import Manifest
from facebench.__main__ import main
from facebench.data import SOURCES, source


def test_the_listing_has_a_line_for_each_data_set(capsys):
    assert main(["data"]) == 0
    listed = capsys.readouterr().out
    for name, what in SOURCES.items():
        assert f"  {name:<14} {what}\n" in listed


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "demo"])
def test_every_source_takes_the_same_options_and_shows_an_example(name):
    build = source(name)
    options = inspect.signature(build).parameters
    assert list(options)[:2] == ["root", "out"]
    assert list(options)[-2:] == ["limit", "processes"]
    assert f"facebench data {name} --root" in inspect.getdoc(build)


def test_an_unknown_name_is_refused(capsys):
    assert main(["data", "nothing"]) == 2
    assert "no data set 'nothing'; known: demo, ffhq" in capsys.readouterr().err


def test_a_folder_of_images_from_the_command_line(tmp_path, capsys):
    """In other processes, as users build; then again, which changes nothing; then with other settings."""
    rng = np.random.default_rng(0)
    for i in range(5):
        path = tmp_path / "photos" / ("train", "test")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 8, 3), dtype=np.uint8)).save(path)
    out = tmp_path / "out"
    args = ["data", "image-folder", "--root", str(tmp_path / "photos"), "--out", str(out), "--processes", "2"]
    assert main(args) == 2
    assert "8 x 10 pixels, expected a square" in capsys.readouterr().err
    assert main([*args, "--crop", "center", "--limit", "2"]) == 0
    manifest = Manifest.read(out, "faces")
    assert {split: manifest.split(split)[0].keys for split in ("train", "test")} == {
        "train": ["train-0", "train-2"],
        "test": ["test-1", "test-3"],
    }
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main([*args, "--crop", "center", "--limit", "2"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert main([*args, "--crop", "center", "--limit", "1"]) == 2
    assert "holds data of other settings" in capsys.readouterr().err


def test_the_same_bytes_on_any_number_of_processes_and_one_bad_file_named(tmp_path, capsys):
    rng = np.random.default_rng(1)
    for name, frames in (("a_1", 30), ("a_2", 40), ("b_1", 30)):
        for folder in ("vertices_npy", "wav", "templates"):
            (tmp_path / "mine" / folder).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "mine/vertices_npy" / f"{name}.npy", rng.normal(0, 1, (frames, 12)))
        np.save(tmp_path / "mine/templates" / f"{name[0]}.npy", rng.normal(0, 1, (4, 3)))
        write_wav(tmp_path / "mine/wav" / f"{name}.wav", frames / 30)
    (tmp_path / "lips.txt").write_text("0 3")
    (tmp_path / "clips.csv").write_text("name,split\na_1,train\na_2,val\nb_1,test\n")
    args = ["data", "mesh-folder", "--root", str(tmp_path / "mine"), "--fps", "30", "--unit", "metre"]
    args += ["--table", str(tmp_path / "clips.csv"), "--regions.lips", str(tmp_path / "lips.txt")]
    contents = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        assert main([*args, "--out", str(out), "--processes", processes]) == 0
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1]
    assert json.loads(contents[0]["manifest.json"])["fields"]["regions"]["lips"]["count"] == 2
    (tmp_path / "mine/wav/b_1.wav").write_bytes(b"noise")
    capsys.readouterr()
    assert main([*args, "--out", str(tmp_path / "3")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "b_1.wav: not a sound file" in error


def write_wav(path, seconds: float) -> None:
    import soundfile

    soundfile.write(path, np.zeros(round(16_000 * seconds)), 16_000)
