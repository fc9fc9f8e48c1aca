import pytest
import yaml

from metrics.protocols import Protocol
from sweeps.bounds import bounds


@pytest.fixture
def protocol(tmp_path, tiny, monkeypatch) -> Protocol:
    monkeypatch.setenv("FACEBENCH_CACHE", str(tmp_path / "cache"))
    spec = Protocol.read("demo-generation").spec
    spec |= {"images": 6, "reference_images": 6, "image_size": 32}
    kinds = {"features": "attributes", "identity": "identity", "perceptual": "perceptual"}
    spec["judges"] = {role: {"name": tiny[kind], "sha256": None} for role, kind in kinds.items()}
    wanted = ("fid", "identity", "lpips", "diversity")
    spec["metrics"] = {name: spec["metrics"][name] for name in wanted}
    spec["metrics"]["fid"]["jackknife_groups"] = 3
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(spec))
    return Protocol.read(path)


def test_bounds_of_generation_say_what_photos_score(faces_root, protocol) -> None:
    rows = list(bounds("text-to-face", str(faces_root), protocol, "unused.yaml"))
    assert [(row["system"], row["role"]) for row, _, _ in rows] == [
        ("photo", "ceiling"),
        ("other-photos", "floor"),
        ("mean-photo", "floor"),
    ]
    photo, others, mean = ({name: metric["value"] for name, metric in scores.metrics.items()} for _, scores, _ in rows)
    assert photo["fid"] == pytest.approx(0, abs=1e-4)
    assert photo["identity"] == pytest.approx(1, abs=1e-5)
    assert photo["lpips"] == photo["diversity"] == 0
    assert others["fid"] == pytest.approx(0, abs=1e-4), "the same photos, each beside another's caption"
    assert others["lpips"] > 0
    assert others["diversity"] > 0
    assert mean["fid"] > 0
    assert mean["diversity"] == 0
    assert len({bound.id for _, _, bound in rows}) == 1
