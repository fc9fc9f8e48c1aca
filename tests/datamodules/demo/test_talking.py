import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from datamodules.demo.talking import appearance, build_talking, draw_subjects, make_clip, plan_clips
from datamodules.errors import UserError
from datamodules.head import Head
from datamodules.render import Camera, Light, render
from datamodules.shards import Manifest
from datamodules.speech import SpeechDataModule

pytest.importorskip("espeakng_loader")

SUBJECTS, SENTENCES = 3, 2


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Manifest:
    return build_talking(tmp_path_factory.mktemp("talking") / "data", SUBJECTS, SENTENCES, processes=2)


@pytest.fixture(scope="module")
def clips(built) -> list[dict]:
    """Every sample, decoded by hand."""
    templates = load_file(built.root / "templates.safetensors")
    decoded = []
    for shard in built.shards:
        members: dict[str, dict[str, bytes]] = {}
        with tarfile.open(built.root / shard.file) as tar:
            for member in tar.getmembers():
                key, _, name = member.name.partition(".")
                members.setdefault(key, {})[name] = tar.extractfile(member).read()
        for key, raw in members.items():
            clip = json.loads(raw["json"])
            clip |= {name: np.load(io.BytesIO(raw[f"{name}.npy"])) for name in ("offsets", "weights", "pose")}
            clip["audio"], clip["rate"] = soundfile.read(io.BytesIO(raw["wav"]))
            clip["template"] = templates[clip["subject"]]
            decoded.append({**clip, "key": key, "split": shard.split})
    return decoded


def test_the_number_of_processes_changes_no_byte(built, tmp_path):
    assert build_talking(tmp_path / "again", SUBJECTS, SENTENCES, processes=1).sha256 == built.sha256


def test_splits_share_neither_subjects_nor_sentences(clips):
    assert len(clips) == SUBJECTS * SENTENCES
    for name in ("subject", "sentence", "transcript"):
        by_split = [{clip[name] for clip in clips if clip["split"] == split} for split in ("train", "val", "test")]
        assert all(by_split)
        assert sum(map(len, by_split)) == len(set.union(*by_split))


def test_vocaset_proportions_and_balance_of_emotions():
    clips = plan_clips(draw_subjects(12, seed=0), 24, seed=0)
    assert {split: len({c.subject.name for c in made}) for split, made in clips.items()} == {
        "train": 8,
        "val": 2,
        "test": 2,
    }
    every = [clip for made in clips.values() for clip in made]
    assert len({clip.key for clip in every}) == len(every) == 288
    assert sum(clip.emotion == "neutral" for clip in every) == 72
    assert len({(clip.emotion, clip.intensity) for clip in clips["train"]}) == 7 * 3 + 1
    spoken_by = {clip.sentence.id: set() for clip in clips["train"]}
    for clip in clips["train"]:
        spoken_by[clip.sentence.id].add(clip.subject.name)
    assert min(map(len, spoken_by.values())) >= 2  # what is said can be told from who says it


def test_audio_and_motion_are_of_one_length(clips, built):
    for clip in clips:
        frames = len(clip["offsets"])
        assert clip["offsets"].shape == (frames, 3689, 3)
        assert clip["offsets"].dtype == np.float16
        assert clip["weights"].shape == (frames, 52)
        assert clip["pose"].shape == (frames, 3)
        assert clip["rate"] == 16_000
        assert len(clip["audio"]) * 30 == frames * 16_000
        assert 1.5 < frames / 30 < 8
        assert np.abs(clip["audio"]).max() < 0.99  # never clipped
        assert [word for word, _, _ in clip["words"]] == [w.strip(".,?") for w in clip["transcript"].split()]
        assert len(clip["tags"]) == len(clip["words"])
        assert clip["words"][-1][2] <= frames / 30
        assert clip["emotion"] in built.fields["emotions"]
    lengths = {key: length for shard in built.shards for key, length in zip(shard.keys, shard.lengths, strict=True)}
    assert lengths == {clip["key"]: len(clip["offsets"]) for clip in clips}


def test_the_weights_made_the_mesh(clips, built):
    head = Head.load()
    assert built.fields["controls"] == head.units
    for clip in clips:
        expected = head.pose(clip["template"], clip["weights"]) - clip["template"]
        np.testing.assert_allclose(clip["offsets"].astype(float), expected, atol=1e-5)
        assert 0.003 < np.abs(expected).max() < 0.04


def test_lips_meet_on_m_b_p_and_part_on_open_vowels(clips, built):
    topology = load_file(built.root / "topology.safetensors")
    upper, lower = topology["upper_lip_inner"], topology["lower_lip_inner"]
    for clip in clips:
        height = clip["offsets"][..., 1].astype(float)
        gap = 1000 * (height[:, upper].mean(1) - height[:, lower].mean(1))  # mm more than at rest
        at = {
            kind: [gap[round((s + e) / 2 * 30)] for p, s, e in clip["phonemes"] if p in kind.split()]
            for kind in ("m b p", "ɑ æ aɪ aʊ")
        }
        assert all(value < 1 for value in at["m b p"])
        if at["ɑ æ aɪ aʊ"]:
            assert np.mean(at["ɑ æ aɪ aʊ"]) > 2


def test_the_mouth_opens_with_the_voice(clips):
    units = Head.load().units
    for clip in clips:
        opened = (
            clip["weights"][:, units.index("jawOpen")].astype(float) - clip["weights"][:, units.index("mouthClose")]
        )
        steps = len(opened) // 3
        loud = np.sqrt((clip["audio"].reshape(steps, -1) ** 2).mean(1))
        assert np.corrcoef(loud, opened.reshape(steps, 3).mean(1))[0, 1] > 0.3


def test_manifest_and_topology(built):
    topology = load_file(built.root / "topology.safetensors")
    fields = built.fields
    assert (fields["fps"], fields["sample_rate"], fields["unit"]) == (30, 16_000, "metre")
    assert (fields["topology"], fields["vertices"]) == ("demo-head", 3689)
    assert fields["subjects"][: len(fields["train_subjects"])] == fields["train_subjects"]
    np.testing.assert_array_equal(topology["triangles"], Head.load().triangles)
    assert {"lips", "upper_face", "upper_lip_inner", "lower_lip_inner"} <= set(fields["regions"])
    for name, region in fields["regions"].items():
        indices = topology[name]
        assert indices.dtype == np.int32
        assert region["count"] == len(indices) == len(set(indices.tolist()))
        assert region["sha256"] == hashlib.sha256(np.sort(indices).astype("<i8").tobytes()).hexdigest()


def test_the_data_module_reads_it(built):
    data = SpeechDataModule(str(built.root), batch_size=2)
    batch = next(iter(data.val_dataloader()))
    assert batch.vertices.shape == (2, int(batch.lengths.max()), 3689, 3)
    assert batch.weights.shape[-1] == 52
    assert batch.subject_index.tolist() == [-1, -1]
    assert (batch.audio_lengths * 30 == batch.lengths * 16_000).all()


def test_full_precision():
    clip = plan_clips(draw_subjects(3, seed=0), 1, seed=0)["train"][0]
    half, full = (make_clip(clip, precision) for precision in ("float16", "float32"))
    assert half.members["wav"] == full.members["wav"]
    offsets = np.load(io.BytesIO(full.members["offsets.npy"]))
    assert offsets.dtype == np.float32
    rounded = np.load(io.BytesIO(half.members["offsets.npy"]))
    np.testing.assert_array_equal(rounded, offsets.astype(np.float16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"subjects": 2}, "--subjects 2"), ({"sentences": 0}, "--sentences 0"), ({"precision": "int8"}, "'int8'")],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        build_talking(tmp_path / "data", **arguments)
    assert not (tmp_path / "data").exists()


def test_appearance_draws_a_person(built, clips):
    clip = clips[0]
    person = appearance(built, clip["subject"])
    mesh = person.dress(clip["template"])
    np.testing.assert_allclose(mesh.vertices[:3689], clip["template"], atol=1e-6)
    assert len(mesh.colours) == len(mesh.vertices)
    image = render(mesh.vertices, mesh.triangles, mesh.colours, 48, Camera(frame=0.24), supersample=1, light=Light())
    assert 0.2 < (image < 250).any(-1).mean() < 0.95


def test_the_lower_teeth_go_with_the_jaw(built, clips):
    head = Head.load()
    person = appearance(built, clips[0]["subject"])
    template = clips[0]["template"]
    opened = template + head.unit_deltas[head.units.index("jawOpen")]
    teeth, upper = head.part("teeth_lower"), head.part("teeth_upper")
    moved = person.dress(opened).vertices - person.dress(template).vertices
    assert moved[teeth, 1].mean() < -0.01
    assert np.abs(moved[upper]).max() < 1e-4


def test_appearance_of_a_stranger(built):
    with pytest.raises(UserError, match="'Nobody'"):
        appearance(built, "Nobody")


def test_appearance_of_an_outdated_build(built):
    fields = {**built.fields, "identities": {"F1": {"nose": 1}}}
    with pytest.raises(UserError, match="build it again"):
        appearance(Manifest(Path("old"), built.kind, built.name, fields, built.shards), "F1")
