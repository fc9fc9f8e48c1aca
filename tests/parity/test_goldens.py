"""Every golden folder under ``$FACEBENCH_GOLDENS`` (default ``../shared/parity``) is reproduced.

A folder's ``config.json`` names its ``system``; ``check(golden)`` of ``check_<system>.py`` here builds our
implementation at the sizes of the config, loads the official weights and compares every recorded output.
"""

import importlib
import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from goldens import Golden
from safetensors.torch import save_file

HERE = Path(__file__).parent
ROOT = Path(os.environ.get("FACEBENCH_GOLDENS", HERE.parents[1] / ".." / "shared" / "parity")).resolve()


def golden_folders() -> list:
    found = sorted(path.parent for path in ROOT.rglob("config.json"))
    if not found:
        skip = pytest.mark.skip(reason=f"{ROOT}: no goldens there; set FACEBENCH_GOLDENS to their folder")
        return [pytest.param(None, marks=skip, id="none")]
    return [pytest.param(folder, id=str(folder.relative_to(ROOT))) for folder in found]


def check(golden: Golden) -> None:
    if not (HERE / f"check_{golden.system}.py").is_file():
        pytest.skip(f"{golden.folder.name}: facebench does not have '{golden.system}' yet")
    importlib.import_module(f"check_{golden.system}").check(golden)
    assert golden.compared, f"check_{golden.system}.py compared nothing of {golden.folder}"


@cache
def reproduce(folder: Path) -> tuple[str, ...]:
    """Checks a folder once; names of what was compared."""
    torch.manual_seed(0)
    golden = Golden(folder)
    check(golden)
    return tuple(golden.compared)


@pytest.mark.parametrize("folder", golden_folders())
def test_golden_is_reproduced(folder: Path) -> None:
    reproduce(folder)


@pytest.mark.parametrize("folder", golden_folders())
def test_perturbed_golden_fails(folder: Path) -> None:
    name = reproduce(folder)[-1]
    golden = Golden(folder)
    recorded = golden.io[name]
    golden.io[name] = recorded * 1.01 + 1e-3 if recorded.is_floating_point() else recorded.logical_not()
    with pytest.raises(AssertionError, match=name.replace(".", r"\.")):
        check(golden)


@pytest.fixture
def golden(tmp_path: Path) -> Golden:
    (tmp_path / "config.json").write_text(json.dumps({"system": "nobody", "variant": "nobody"}))
    recorded = {"y": [1.0, -2.0, 1e-7], "n": [1, 2], "g": [1e-9, 1.0]}
    save_file({key: torch.tensor(value) for key, value in recorded.items()}, tmp_path / "io.safetensors")
    return Golden(tmp_path)


def test_close_accepts_what_is_within_tolerance(golden: Golden) -> None:
    golden.close("y", torch.tensor([1.00005, -2.0, 0.0]))
    golden.close("n", torch.tensor([1, 2]))
    golden.close_gradient("g", torch.tensor([9e-4, 1.0]))
    assert golden.compared == ["y", "n", "g"]


def test_close_says_what_differs(golden: Golden) -> None:
    with pytest.raises(AssertionError, match=r"/y: 1 of 3 values .* 0.01 absolute, 0.01 relative"):
        golden.close("y", torch.tensor([1.01, -2.0, 0.0]))
    with pytest.raises(AssertionError, match=r"/y: shape \(2,\), expected \(3,\)"):
        golden.close("y", torch.zeros(2))
    with pytest.raises(AssertionError, match="/n: 1 of 2 values differ"):
        golden.close("n", torch.tensor([1, 3]))
    with pytest.raises(AssertionError, match="/g: 1 of 2"):
        golden.close_gradient("g", torch.tensor([0.0, 1.002]))
    with pytest.raises(AssertionError, match="not recorded"):
        golden.close("z", torch.zeros(2))
    with pytest.raises(AssertionError, match="None"):
        golden.close("y", None)


def test_nan_is_a_difference(golden: Golden) -> None:
    with pytest.raises(AssertionError, match="/y"):
        golden.close("y", torch.full((3,), float("nan")))


def test_system_without_a_check_is_skipped(golden: Golden) -> None:
    with pytest.raises(pytest.skip.Exception, match="facebench does not have 'nobody' yet"):
        check(golden)
