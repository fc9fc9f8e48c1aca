import json
from collections import Counter

import numpy as np
import pytest
from praatio import textgrid
from scipy.signal import resample_poly

from datamodules.errors import UserError
from datamodules.sources import beat
from datamodules.speech import SpeechDataModule

NAMES = [f"shape{i}" for i in range(4)]
TAKES = {"neutral": 64, "happiness": 72}  # the last of their ranges


def write(tree, speaker: str, take: int, seconds: float, rate: int = 16_000, kind: int = 0, names=NAMES):
    """The first weight of each frame is its number, in thousandths."""
    frames = round(60 * seconds)
    weights = tree.rng.random((frames, 3)).round(6)
    weights[:, 0] = np.arange(frames) / 1000
    stem = f"{speaker}/{speaker}_scott_{kind}_{take}_{take}"
    content = {"names": names, "frames": [{"weights": row, "time": 0} for row in weights.tolist()]}
    tree.text(f"{stem}.json", json.dumps(content))
    return weights, tree.wav(f"{stem}.wav", seconds, rate)


def corpus(tree):
    return {
        (speaker, take): write(tree, speaker, take, 100.5, rate=24_000 if take == 64 else 16_000)
        for speaker in ("2", "4")
        for take in TAKES.values()
    }


def test_a_sound_or_a_time_that_changed_is_not_taken_for_the_one_that_was_built(tree, tmp_path):
    corpus(tree)

    def grid(end: float) -> None:
        written = textgrid.Textgrid()
        written.addTier(textgrid.IntervalTier("words", [(0, end, "hi")], 0, 100))
        written.addTier(textgrid.IntervalTier("phones", [(0, end, "AY")], 0, 100))
        written.save(str(tree.path("2/2_scott_0_64_64.TextGrid")), format="short_textgrid", includeBlankSpaces=True)

    grid(0.25)
    beat.build(tree.root, tmp_path / "out", speakers=["2", "4"])
    grid(0.35)
    with pytest.raises(UserError, match="or of a source that has changed since"):
        beat.build(tree.root, tmp_path / "out", speakers=["2", "4"])
    grid(0.25)
    beat.build(tree.root, tmp_path / "out", speakers=["2", "4"])
    tree.wav("4/4_scott_0_72_72.wav", 100.6)
    with pytest.raises(UserError, match="or of a source that has changed since"):
        beat.build(tree.root, tmp_path / "out", speakers=["2", "4"])


def test_pieces_of_ten_seconds_at_30_fps_with_their_own_sound(tree, tmp_path, read_back):
    takes = corpus(tree)
    write(tree, "2", 66, 20, kind=1)  # a conversation, which is not used
    manifest = beat.build(tree.root, tmp_path / "out", speakers=["2", "4"])
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    batches = {split: read_back(module, split) for split in ("train", "val", "test")}
    found = {key: batch for each in batches.values() for key, batch in each.items()}
    assert len(found) == 2 * 2 * 10
    emotions = list(manifest.fields["emotions"])
    assert emotions == ["neutral", "happiness", "anger", "sadness", "contempt", "surprise", "fear", "disgust"]
    for speaker in ("2", "4"):
        number = 0
        for emotion, take in TAKES.items():
            weights, sound = takes[speaker, take]
            for piece in range(10):
                number += 1
                batch = found[f"{speaker}_{emotions.index(emotion)}_{number:02d}"]
                np.testing.assert_allclose(batch.weights[0], weights[600 * piece : 600 * (piece + 1) : 2], atol=1e-6)
                assert batch.emotion.tolist() == [emotions.index(emotion)]
                assert batch.subject == [speaker]
                if take == 64:
                    part = sound[240_000 * piece : 240_000 * (piece + 1)] / 32768
                    np.testing.assert_allclose(batch.audio[0], np.clip(resample_poly(part, 2, 3), -1, 1), atol=1e-4)
                else:
                    part = sound[160_000 * piece : 160_000 * (piece + 1)]
                    np.testing.assert_array_equal(batch.audio[0] * 32768, part)
    assert module.num_vertices == 0
    assert manifest.fields["controls"] == NAMES[:3]
    # 80, 10, 10 percent, every emotion of every speaker alike
    assert {split: len(each) for split, each in batches.items()} == {"train": 32, "val": 4, "test": 4}
    assert set(Counter((b.subject[0], int(b.emotion[0])) for b in batches["train"].values()).values()) == {8}


def test_words_of_a_take_are_those_of_its_pieces(tree, tmp_path, read_back):
    corpus(tree)
    grid = textgrid.Textgrid()
    grid.addTier(textgrid.IntervalTier("words", [(1, 2, "one"), (9.5, 10.5, "across"), (99, 100.2, "last")], 0, 101))
    grid.addTier(textgrid.IntervalTier("phones", [(12, 13, "AH0")], 0, 101))
    grid.save(str(tree.path("2/2_scott_0_64_64.TextGrid")), format="long_textgrid", includeBlankSpaces=True)
    beat.build(tree.root, tmp_path / "out", speakers=["2", "4"])
    module = SpeechDataModule(str(tmp_path / "out"), batch_size=1)
    found = {key: batch for split in ("train", "val", "test") for key, batch in read_back(module, split).items()}
    assert found["2_0_01"].words == [[("one", 1, 2), ("across", 9.5, 10)]]
    assert found["2_0_02"].words == [[("across", 0, 0.5)]]
    assert found["2_0_02"].phonemes == [[("AH", 2, 3)]]
    assert found["2_0_10"].transcript == ["last"]
    assert found["4_0_01"].words == [[]]


def test_the_split_is_the_seeds(tmp_path):
    pieces = [
        beat.Piece(speaker, emotion, number, tmp_path, 0)
        for speaker in "24"
        for emotion in ("fear", "anger")
        for number in range(10)
    ]
    first, again, other = (beat.split_pieces(pieces, seed, tmp_path) for seed in (42, 42, 1))
    assert first == again != other
    assert sorted(piece.key for part in first.values() for piece in part) == sorted(piece.key for piece in pieces)


def test_mistakes_are_named(tree, tmp_path):
    write(tree, "2", 65, 10)
    with pytest.raises(UserError, match="holds no folder '4'"):
        beat.build(tree.root, tmp_path / "out")
    with pytest.raises(UserError, match="1 pieces of 10 s cannot be split by emotion"):
        beat.build(tree.root, tmp_path / "out", speakers=["2"])
    write(tree, "2", 66, 30, names=["a", "b", "c"])
    with pytest.raises(UserError, match=r"blendshapes \['a', 'b', 'c'\], expected those of the first take"):
        beat.build(tree.root, tmp_path / "out", speakers=["2"])
    tree.text("2/2_scott_0_66_66.json", '{"names": ["a"], "frames": [{"weights": [1, 2]}]}')
    with pytest.raises(UserError, match=r"weights of shape \(1, 2\) for 1 names"):
        beat.build(tree.root, tmp_path / "out", speakers=["2"])
    tree.text("2/2_scott_0_66_66.json", "{}")
    with pytest.raises(UserError, match="not BEAT's 'names' and 'frames'"):
        beat.build(tree.root, tmp_path / "out", speakers=["2"])
    (tree.root / "2/2_scott_0_66_66.json").unlink()
    (tree.root / "2/2_scott_0_65_65.wav").unlink()
    with pytest.raises(UserError, match=r"2_scott_0_65_65\.wav: no such sound file"):
        beat.build(tree.root, tmp_path / "out", speakers=["2"])


def test_emotions_by_take_number(tree):
    ends = {"neutral": (0, 64), "happiness": (65, 72), "anger": (73, 80), "sadness": (81, 86), "contempt": (87, 94)}
    ends |= {"surprise": (95, 102), "fear": (103, 110), "disgust": (111, 118)}
    for emotion, takes in ends.items():
        assert {beat.emotion_of(take, tree.root) for take in takes} == {emotion}
    with pytest.raises(UserError, match="take 119, expected 0 to 118"):
        beat.emotion_of(119, tree.root)
