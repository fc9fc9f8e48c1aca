import json
import shutil

from facebench.__main__ import main


def test_check_exits_with_0_for_ready_data_and_writes_its_findings(faces_root, tmp_path, capsys):
    out = tmp_path / "check.json"
    assert main(["data", "check", str(faces_root), "--world-size", "2", "--workers=1", "--json", str(out)]) == 0
    assert capsys.readouterr().out.rstrip().endswith("ready")
    found = json.loads(out.read_text())
    assert (found["ready"], found["world_size"], found["workers"]) == (True, 2, 1)
    assert [(plan["split"], plan["batches"]) for plan in found["splits"]] == [("train", 1), ("val", 1), ("test", 1)]


def test_check_exits_with_2_and_a_line_for_each_problem(faces_root, tmp_path, capsys):
    root = shutil.copytree(faces_root, tmp_path / "faces")
    (root / "val-000000.tar").unlink()
    assert main(["data", "check", str(root), "--world-size", "9", "--json", str(tmp_path / "check.json")]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines() if line.startswith("problem")]
    assert len(lines) == len(json.loads((tmp_path / "check.json").read_text())["problems"]) == 2
    assert "not ready, 2 problems" in captured.err
    assert captured.err.count("\n") == 1


def test_a_kind_that_nothing_reads_is_said_to_be_one(faces_root, tmp_path, capsys):
    root = shutil.copytree(faces_root, tmp_path / "meshes")
    manifest = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(manifest.replace('"kind": "faces"', '"kind": "expression-meshes"'))
    for tool in ("check", "show"):
        assert main(["data", tool, str(root)]) == 2
        message = capsys.readouterr().err
        assert "'kind' is 'expression-meshes', which nothing here reads yet" in message
        assert message.count("\n") == 1


def test_show_prints_and_draws(talking_root, tmp_path, capsys):
    for name in ("sheet.png", "sheet.html"):
        out = tmp_path / name
        assert main(["data", "show", str(talking_root), "--split", "test", "--samples", "2", "--out", str(out)]) == 0
        assert out.stat().st_size > 1000
    assert "dora-060" in capsys.readouterr().out
    assert main(["data", "show", str(talking_root), "--out", str(tmp_path / "sheet.gif")]) == 2
    assert ".png or .html" in capsys.readouterr().err


def test_features_adds_a_column(faces_root, tiny, tmp_path, capsys):
    root = shutil.copytree(faces_root, tmp_path / "faces")
    command = ["data", "features", str(root), "--backbone", tiny["identity"], "--processes", "1"]
    assert main(command) == 0
    assert "column 'identity': 8 float16" in capsys.readouterr().out
    assert main(["data", "check", str(root)]) == 0
    assert "columns: identity" in capsys.readouterr().out


def test_help_names_the_tools(capsys):
    assert main(["data", "--help"]) == 0
    assert "check, show, features" in capsys.readouterr().out
