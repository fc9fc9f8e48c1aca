"""Random weights in the layout of ``syncnet_v2.model``; the published ones are not ours to ship."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datamodules.errors import UserError
from trainers import backbones
from trainers.nets.syncnet import SyncNet, mfcc

# Shapes of the published file's convolutions, by their place in the sequence; a batch norm follows each.
SOUND = {0: (64, 1, 3, 3), 4: (192, 64, 3, 3), 8: (384, 192, 3, 3), 11: (256, 384, 3, 3), 14: (256, 256, 3, 3)}
SOUND |= {18: (512, 256, 5, 4)}
LIPS = {0: (96, 3, 5, 7, 7), 4: (256, 96, 1, 5, 5), 8: (256, 256, 1, 3, 3), 11: (256, 256, 1, 3, 3)}
LIPS |= {14: (256, 256, 1, 3, 3), 18: (512, 256, 1, 6, 6)}

# python_speech_features 0.6: mfcc(samples(), 16000).
GOLDEN = """
 23.36290603 -35.45664899  -6.88015055  -8.43435786  -3.97701064  -7.67018617  -6.53083203
 -4.91737058  -3.34813742  -7.51585968   0.57710234   4.32916495  -0.04329775
 23.15058391 -31.30622782  -3.48050896  -3.06380706   1.55495974  -1.58235925  -4.60568792
 -5.33792273  -1.51792344  -3.67293789  -1.56097648   0.0302641   -0.35623852
 22.9118722  -34.28616359  -4.1273151   -4.40214703   0.42215653  -4.71293938  -7.82572424
 -7.70386496  -2.03930036  -2.4719607    0.03780598  -0.00991275   2.05734632
 21.47828009 -29.12385581 -11.81419839  -0.2041675   -1.0543827   -8.39116817 -11.97266636
-16.94766354  -5.4588836   -6.62892714  -2.87499242   2.65681845  -1.75240295
-36.04365339 0 0 0 0 0 0 0 0 0 0 0 0
"""


def samples() -> np.ndarray:
    """(1000,) 16-bit samples, the last 400 silent."""
    t = np.arange(1000)
    values = ((t * t * 37 + t * 1009) % 20011 - 10005).astype(np.int16)
    values[600:], values[0] = 0, -32768
    return values


@pytest.fixture(scope="module")
def published():
    """A state dict as the authors' file has it, from before batch norm counted its batches."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def norm(name, size):
        return {
            f"{name}.weight": 1 + 0.1 * normal(size),
            f"{name}.bias": 0.1 * normal(size),
            f"{name}.running_mean": 0.1 * normal(size),
            f"{name}.running_var": 1 + 0.1 * normal(size).abs(),
        }

    state = {}
    for stream, shapes in (("netcnnaud", SOUND), ("netcnnlip", LIPS)):
        for place, shape in shapes.items():
            state[f"{stream}.{place}.weight"] = normal(*shape) / np.prod(shape[1:]) ** 0.5
            state[f"{stream}.{place}.bias"] = 0.1 * normal(shape[0])
            state |= norm(f"{stream}.{place + 1}", shape[0])
    for head in ("netfcaud", "netfclip"):
        state |= {f"{head}.0.weight": normal(512, 512) / 23, f"{head}.0.bias": normal(512)} | norm(f"{head}.1", 512)
        state |= {f"{head}.3.weight": normal(1024, 512) / 23, f"{head}.3.bias": normal(1024)}
    return state


def embed(state, stream, head, x):
    """The published network in plain functions; x: a batch of MFCC or of pictures, blue first."""

    def norm(name, x):
        values = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *values))

    sound = stream == "netcnnaud"
    conv, pool = (F.conv2d, F.max_pool2d) if sound else (F.conv3d, F.max_pool3d)
    flat = (1, 1) if sound else (0, 1, 1)
    convolutions = {0: (1, 1), 4: (1, flat), 8: (1, flat), 11: (1, flat), 14: (1, flat), 18: (1, 0)}
    pools = {4: (3, (1, 2), 0), 14: (3, 2, 0)}
    if not sound:
        convolutions |= {0: ((1, 2, 2), 0), 4: ((1, 2, 2), flat)}
        pools = {0: ((1, 3, 3), (1, 2, 2), 0), 4: ((1, 3, 3), (1, 2, 2), flat), 14: ((1, 3, 3), (1, 2, 2), 0)}
    for place, (stride, padding) in convolutions.items():
        weight, bias = (state[f"{stream}.{place}.{part}"] for part in ("weight", "bias"))
        x = norm(f"{stream}.{place + 1}", conv(x, weight, bias, stride=stride, padding=padding))
        if place in pools:
            x = pool(x, *pools[place])
    x = norm(f"{head}.1", F.linear(x.flatten(1), state[f"{head}.0.weight"], state[f"{head}.0.bias"]))
    return F.linear(x, state[f"{head}.3.weight"], state[f"{head}.3.bias"])


def test_mfcc_are_those_of_python_speech_features():
    golden = np.array(GOLDEN.split(), dtype=np.float64).reshape(5, 13)
    np.testing.assert_allclose(mfcc((samples() / 32768).astype(np.float32)), golden, rtol=0, atol=1e-8)
    assert mfcc(np.zeros(100, np.float32)).shape == (1, 13)


@torch.inference_mode()
def test_network_is_the_published_one_window_by_window(published, tmp_path):
    path = tmp_path / "syncnet_v2.model"
    torch.save(published, path)
    network = backbones.load(f"path:{path}", "lip_sync")
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (8, 224, 224, 3), generator=generator, dtype=torch.uint8)
    audio = 0.1 * torch.randn(8 * 640 + 300, generator=generator)
    seen, heard = network(frames, audio)
    assert seen.shape == heard.shape == (3, 1024)
    cepstra = torch.from_numpy(mfcc(audio.numpy())).float().T
    for i in range(3):
        pictures = frames[i : i + 5].numpy()[..., ::-1].transpose(3, 0, 1, 2).astype(np.float32)
        expected = embed(published, "netcnnlip", "netfclip", torch.from_numpy(pictures)[None])
        torch.testing.assert_close(seen[i : i + 1], expected, rtol=1e-4, atol=1e-4)
        sound = cepstra[None, None, :, 4 * i : 4 * i + 20]
        torch.testing.assert_close(
            heard[i : i + 1], embed(published, "netcnnaud", "netfcaud", sound), rtol=1e-4, atol=1e-4
        )
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
    with pytest.raises(ValueError, match="at least 6 frames of picture and sound at 25 fps"):
        network(frames, audio[: 6 * 640 - 1])


def test_files_that_are_not_the_published_one(published, tmp_path):
    path = tmp_path / "syncnet_v2.model"
    spec = f"path:{path}"
    with pytest.raises(UserError, match=r"no such weights; .*download_model\.sh"):
        backbones.load(spec, "lip_sync")
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(UserError, match=r"which could run code.* convert it.*state_dict\(\)"):
        backbones.load(spec, "lip_sync")
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"download syncnet_v2\.model again"):
        backbones.load(spec, "lip_sync")
    for other in ([1], {"netfcaud.0.weight": published["netfcaud.0.weight"]}):
        torch.save(other, path)
        with pytest.raises(UserError, match="not SyncNet's layers"):
            backbones.load(spec, "lip_sync")


def test_new_versions_of_pytorch_may_have_written_the_file(tmp_path):
    network = SyncNet()
    torch.save(network.state_dict(), tmp_path / "syncnet_v2.model", _use_new_zipfile_serialization=False)
    loaded = backbones.load(f"path:{tmp_path}/syncnet_v2.model", "lip_sync")
    assert torch.equal(loaded.netfclip[3].bias, network.netfclip[3].bias)
