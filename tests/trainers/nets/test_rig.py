import pytest
import torch
from safetensors.torch import save_file

from datamodules.errors import UserError
from datamodules.head import Head
from trainers.nets.rig import Rig, load_rig


def test_the_demo_rig_poses_as_the_head_does() -> None:
    head, rig = Head.load(), load_rig("demo")
    assert rig.controls == head.units
    neutral = head.identity({})[: head.exterior]
    weights = torch.rand(3, 52)
    posed = rig(torch.from_numpy(neutral)[None], weights[None])[0]
    torch.testing.assert_close(posed, torch.from_numpy(head.pose(neutral, weights.numpy())), rtol=0, atol=1e-6)


def test_a_rig_of_a_file(tmp_path) -> None:
    offsets = {"b": torch.eye(3), "a": torch.ones(3, 3)}
    save_file(offsets, tmp_path / "rig.safetensors", metadata={"controls": "b\na"})
    rig = load_rig(f"path:{tmp_path}/rig.safetensors")
    assert rig.controls == ["b", "a"]
    posed = rig(torch.zeros(1, 3, 3), torch.tensor([[[2.0, 0.5]]]))
    assert torch.equal(posed[0, 0], 2 * torch.eye(3) + 0.5)


def test_names_alone_give_an_empty_mesh(tmp_path) -> None:
    (tmp_path / "names.txt").write_text("jawOpen\nmouthClose\n")
    rig = load_rig(f"names:{tmp_path}/names.txt")
    assert rig(torch.zeros(2, 0, 3), torch.rand(2, 5, 2)).shape == (2, 5, 0, 3)
    with pytest.raises(UserError, match="moves meshes of 0 vertices, found 4"):
        rig(torch.zeros(2, 4, 3), torch.rand(2, 5, 2))


def test_flame_names_the_controls_of_3dmead() -> None:
    controls = load_rig("flame").controls
    assert len(controls) == 53
    assert (controls[0], controls[49], controls[50], controls[52]) == ("exp_00", "exp_49", "jaw_0", "jaw_2")


def test_strange_rigs_are_refused(tmp_path) -> None:
    (tmp_path / "text").write_text("no rig")
    for spec, reason in {
        "other": "expected demo, flame, path:FILE or names:FILE",
        f"path:{tmp_path}/none": "no such file",
        f"path:{tmp_path}/text": "not a rig",
    }.items():
        with pytest.raises(UserError, match=reason):
            load_rig(spec)


def test_a_rig_moves_with_the_module() -> None:
    assert Rig(["a"], torch.ones(1, 2, 3)).double().offsets.dtype == torch.float64
