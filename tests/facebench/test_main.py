import contextlib
import subprocess
import sys

import pytest

from facebench.__main__ import VERBS, main


def test_help_names_every_verb_and_loads_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "facebench", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(verb in done.stdout for verb in VERBS)
    assert "| torch" not in done.stderr, "importing torch takes seconds"


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("fit", "validate", "test", "predict")])
def test_every_verb_explains_itself(verb, capsys):
    with contextlib.suppress(SystemExit):
        main([verb, "--help"])
    assert f"facebench {verb}" in capsys.readouterr().out


def test_an_unknown_verb_is_refused(capsys):
    assert main(["trian"]) == 2
    assert "no verb 'trian'" in capsys.readouterr().err


def test_a_mistake_is_one_line_without_a_traceback(capsys, tmp_path):
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "results.jsonl: no such file" in error


def test_debug_shows_where_it_happened(tmp_path):
    from datamodules.errors import UserError

    with pytest.raises(UserError):
        main(["--debug", "report", str(tmp_path)])


def test_systems_are_listed(capsys):
    assert main(["systems"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("adatrans", "faceformer", "interfacegan", "voca"))
