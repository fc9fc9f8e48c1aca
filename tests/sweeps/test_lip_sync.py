from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from metrics.protocols import Protocol
from metrics.score_speech import Clip, score_speech
from metrics.timing import lip_sync_error
from sweeps.lip_sync import LipSyncJudge, at_rate, face_drawer
from sweeps.score import bind_judges, speech_judges, truths
from trainers.nets.syncnet import SyncNet


def plate(left, right, bottom, top, depth):
    """Four vertices of an upright rectangle."""
    return [[left, bottom, depth], [right, bottom, depth], [right, top, depth], [left, top, depth]]


@pytest.fixture
def plates():
    """A face-like plate off the centre of a mesh whose other parts are far away and hardly visible."""
    face = plate(-0.3, 0.1, -0.2, 0.2, 0.1)
    specks = plate(-1, -0.999, -1, -0.999, 0) + plate(0.999, 1, 0.999, 1, 0)
    vertices = torch.tensor(face + specks)
    triangles = np.array([[i, i + 1, i + 2] for i in (0, 4, 8)] + [[i, i + 2, i + 3] for i in (0, 4, 8)])
    return SimpleNamespace(
        templates={"anna": vertices}, manifest=SimpleNamespace(fields={}), topology={"triangles": triangles}, fps=30
    )


def test_face_is_cut_as_the_authors_cut_it(plates):
    picture = face_drawer(plates, "anna", range(4))(plates.templates["anna"].numpy())
    assert picture.shape == (224, 224, 3)
    drawn = np.abs(picture.astype(int) - picture[-1, -1].astype(int)).sum(-1) > 20
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    # A box of 224 / 1.4 = 160 pixels at the upper edge, 0.2 * 160 pixels to its left and right.
    np.testing.assert_allclose([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1], [0, 160, 32, 192], atol=2)


def test_motion_at_another_rate():
    motion = torch.tensor([[0.0, 3.0], [6.0, 3.0], [6.0, 9.0]])[..., None]
    assert at_rate(motion, 25, 25).equal(motion)
    torch.testing.assert_close(at_rate(motion, 30, 60)[:, 0, 0], torch.tensor([0.0, 3.0, 6.0, 6.0, 6.0]))
    assert len(at_rate(motion.expand(3, 2, 1).repeat(26, 1, 1), 30, 25)) == 65  # 78 frames at 30 Hz are 65 at 25 Hz


def test_judge_draws_a_clip_once(plates):
    seen = []

    def network(frames, audio):
        seen.append((frames, audio))
        return torch.ones(2, 3), torch.zeros(2, 3)

    template = plates.templates["anna"]
    audio = torch.zeros(16_000)
    clip = Clip("a", template[None], template[None], template, audio=audio, subject="anna")
    judge = LipSyncJudge(network, plates, range(4))  # type: ignore[arg-type]
    still = template.expand(7, -1, -1)
    lower = still - torch.tensor([0, 0.05, 0])
    for vertices in (still, still.clone(), lower):
        judge(clip, vertices)
    assert len(seen) == 2
    frames, sound = seen[0]
    assert frames.shape == (6, 224, 224, 3)
    assert frames.dtype == torch.uint8
    assert sound is audio
    assert not torch.equal(seen[1][0], frames)
    judge(replace(clip, key="b"), lower)
    assert len(seen) == 3, "another clip has another sound"
    for missing in ({"audio": None}, {"subject": None}):
        with pytest.raises(ValueError, match="needs the sound and the subject"):
            judge(replace(clip, **missing), still)


@pytest.fixture
def protocol(tmp_path):
    spec = Protocol.read("syncnet-demo").spec
    spec["judges"]["lip_sync"]["name"] = f"path:{tmp_path}/syncnet_v2.model"
    for metric in spec["metrics"].values():
        metric["largest_offset"] = 2
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(spec))
    return Protocol.read(tmp_path / "mine.yaml")


def test_lip_sync_from_meshes_to_scores(head_root, protocol, tmp_path):
    with pytest.raises(UserError, match=r"syncnet_v2.model': no such weights; .*download_model.sh"):
        bind_judges(protocol)
    torch.manual_seed(0)
    torch.save(SyncNet().state_dict(), tmp_path / "syncnet_v2.model")
    data = SpeechDataModule(str(head_root), batch_size=1)
    bound = bind_judges(protocol.bind_regions(data.regions))
    judges = speech_judges(bound, data, data.regions)
    assert judges.emotion is judges.features is None
    clips = [
        replace(clip, predicted=clip.truth[:12], truth=clip.truth[:12]) for clip in islice(truths(data, "test"), 2)
    ]
    scores = score_speech(clips, bound, data.regions, judges=judges).metrics
    assert judges.lip_sync is not None
    for clip in clips:
        found = lip_sync_error(*judges.lip_sync(clip, clip.truth), 2)
        assert scores["lse_d"]["per_sample"][clip.key] == pytest.approx(found.distance.item())
        assert scores["lse_c"]["per_sample"][clip.key] == pytest.approx(found.confidence.item())
    assert bound.id.startswith("syncnet-demo-")


def test_protocol_names_what_is_drawn(head_root, protocol, tmp_path):
    spec = protocol.spec | {"regions": {}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(spec))
    data = SpeechDataModule(str(head_root), batch_size=1)
    with pytest.raises(UserError, match=r"judges\.lip_sync looks at region 'face'; name it in regions"):
        speech_judges(Protocol.read(tmp_path / "mine.yaml"), data, data.regions)
