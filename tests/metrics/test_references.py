import dataclasses

import numpy as np
import pytest
import torch

from datamodules.errors import UserError
from metrics.references import Reference, ReferenceKey, cache_folder, cached

KEY = ReferenceKey(data="d" * 64, split="test", images=12, image_size=64, resizer="PIL bicubic", extractor="e" * 64)


@pytest.fixture
def features():
    return torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


def never():
    raise AssertionError("the cache was not used")


def test_statistics_are_numpy_s_and_come_from_the_cache(tmp_path, features):
    made = cached(KEY, lambda: features.split(5), tmp_path)
    np.testing.assert_allclose(made.mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(made.covariance, np.cov(features.double().numpy().T), rtol=1e-12)
    found = cached(KEY, never, tmp_path)
    for name in ("features", "mean", "covariance"):
        assert torch.equal(getattr(found, name), getattr(made, name))
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY.sha256}.safetensors"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("data", "f" * 64), ("split", "val"), ("image_size", 32), ("resizer", "PIL box"), ("extractor", "a" * 64)],
)
def test_every_choice_makes_other_statistics(tmp_path, features, field, value):
    cached(KEY, lambda: [features], tmp_path)
    other = dataclasses.replace(KEY, **{field: value})
    assert cached(other, lambda: [features + 1], tmp_path).mean[0] != features.double().mean(0)[0]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_build_that_fails_leaves_nothing(tmp_path, features):
    def killed():
        yield features[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(KEY, killed, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_another_extractor_is_refused(tmp_path, features):
    reference = cached(KEY, lambda: [features], tmp_path)
    reference.check_extractor("e" * 64)
    with pytest.raises(UserError, match=r"made with extractor eeeeeeeeeeee, but .* come from aaaaaaaaaaaa"):
        reference.check_extractor("a" * 64)


def test_bad_statistics(tmp_path, features):
    with pytest.raises(UserError, match="11 real images, but the protocol says 12"):
        cached(KEY, lambda: [features[:11]], tmp_path)
    broken = features.clone()
    broken[3, 0] = torch.inf
    with pytest.raises(UserError, match="real images: features of image 3 are not finite"):
        cached(KEY, lambda: [broken], tmp_path)
    with pytest.raises(UserError, match="no such reference statistics"):
        Reference.read(tmp_path / "a")
    path = tmp_path / f"{KEY.sha256}.safetensors"
    path.write_bytes(b"half a file")
    with pytest.raises(UserError, match="not readable reference statistics; delete"):
        cached(KEY, never, tmp_path)
    path.unlink()
    made = cached(dataclasses.replace(KEY, split="val"), lambda: [features], tmp_path)
    made.write(path)
    with pytest.raises(UserError, match="of another key than its name"):
        cached(KEY, never, tmp_path)


def test_folder_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FACEBENCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "references"
    monkeypatch.delenv("FACEBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / "facebench" / "references"
