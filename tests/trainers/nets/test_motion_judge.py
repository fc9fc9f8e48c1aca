import pytest
import torch

from datamodules.errors import UserError
from trainers import backbones
from trainers.nets.motion_judge import MotionJudge


def judge() -> MotionJudge:
    torch.manual_seed(0)
    return MotionJudge(["neutral", "happy"], num_vertices=6, vertices=[1, 4], width=8).eval()


def test_it_looks_at_its_vertices_relative_to_the_template_alone() -> None:
    network = judge()
    vertices, template = torch.randn(7, 6, 3), torch.randn(6, 3)
    logits = network(vertices, template)
    shift = torch.randn(6, 3)
    torch.testing.assert_close(network(vertices + shift, template + shift), logits, rtol=1e-3, atol=1e-4)
    elsewhere = vertices.clone()
    elsewhere[:, [0, 2, 3, 5]] = 0
    assert torch.equal(network(elsewhere, template), logits)


def test_order_and_number_of_frames_do_not_matter() -> None:
    network = judge()
    vertices, template = 0.01 * torch.randn(5, 6, 3), torch.zeros(6, 3)
    features = network.features(vertices, template)
    assert features.shape == (8,)
    torch.testing.assert_close(network.features(vertices.flip(0), template), features)
    torch.testing.assert_close(network.features(vertices.repeat(3, 1, 1), template), features)


def test_another_mesh_is_refused() -> None:
    with pytest.raises(UserError, match="knows meshes of 6 vertices, found 5"):
        judge()(torch.zeros(2, 5, 3), torch.zeros(5, 3))


def test_it_comes_back_from_its_file(tmp_path) -> None:
    network = judge()
    init = {"emotions": network.emotions, "num_vertices": 6, "vertices": [1, 4], "width": 8}
    backbones.save(network, tmp_path / "judge.safetensors", "motion", init, {})
    loaded = backbones.load(f"path:{tmp_path}/judge.safetensors", "motion")
    clip = torch.randn(3, 6, 3), torch.zeros(6, 3)
    assert torch.equal(loaded(*clip), network(*clip))
    assert not loaded.training
