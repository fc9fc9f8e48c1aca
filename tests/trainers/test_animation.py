from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.errors import UserError
from datamodules.speech import SpeechDataModule
from trainers.animation import Conditions, check_conditions, in_pieces, move, piece, read_image, reference_of, request
from trainers.speech.voca import VOCA

FPS, RATE = 30, 16_000


@pytest.fixture
def system(speech_backbone) -> VOCA:
    return VOCA(12, ["anna", "bert"], speech_backbone, components=3).eval()


def clip_of(system, seconds: float):
    audio = np.arange(int(seconds * RATE), dtype=np.float32)
    clip = request(system, "talk", audio, torch.zeros(12, 3), FPS, Conditions(words=[("a", 0.0, 0.5), ("b", 0.5, 1.5)]))
    assert int(clip.lengths[0]) == round(seconds * FPS)
    return clip


def test_pieces_hold_their_own_sound_and_words(system) -> None:
    part = piece(clip_of(system, 3), 30, 75, FPS)
    assert part.audio[0, [0, -1]].tolist() == [RATE, 2.5 * RATE - 1]
    assert part.lengths.tolist() == [45]
    assert part.vertices.shape[1] == 45
    assert part.words == [[("b", 0.0, 0.5)]]
    assert part.key == ["talk@30"]


def test_a_piece_without_words_is_silent_and_not_unknown(system) -> None:
    clip = clip_of(system, 5)
    assert piece(clip, 60, 100, FPS).transcript == [" "]
    assert piece(clip, 0, 30, FPS).transcript == ["a b"]
    assert piece(replace(clip, words=[[]], transcript=[""]), 60, 100, FPS).transcript == [""]


def test_each_piece_of_a_long_recording_gets_its_share_of_the_transcript(system) -> None:
    clip = replace(clip_of(system, 6), words=[[]], transcript=["One, two three!"])
    heard = []
    system.animate = lambda part: heard.append(part) or part.vertices
    with pytest.warns(UserWarning, match="spread evenly"):
        move(system, clip, FPS, seconds=2.5, overlap=0.5)
    assert [part.transcript[0] for part in heard] == ["One, two", "two three!", "three!"]
    assert heard[0].words == [[("One,", 0.0, 2.0), ("two", 2.0, 2.5)]]


def test_pieces_keep_the_marks_of_the_transcript(system) -> None:
    clip = replace(clip_of(system, 6), transcript=["A? B!"])
    heard = []
    system.animate = lambda part: heard.append(part) or part.vertices
    move(system, clip, FPS, seconds=2.5, overlap=0.5)
    assert heard[0].words == [[("A?", 0.0, 0.5), ("B!", 0.5, 1.5)]]


@pytest.mark.parametrize("seconds", [1.0, 2.0, 2.1, 3.7, 9.0])
def test_what_depends_on_each_frame_alone_is_the_same_in_pieces(system, seconds: float) -> None:
    clip = clip_of(system, seconds)

    def first_samples(part):
        starts = (torch.arange(int(part.lengths[0])) * RATE / FPS).round().long()
        return part.audio[:, starts, None]

    pieces = in_pieces(first_samples, clip, FPS, seconds=2.0, overlap=0.5)
    torch.testing.assert_close(pieces, first_samples(clip), rtol=0, atol=1.0)


def test_pieces_fade_into_each_other(system) -> None:
    numbers = iter([0.0, 1.0, 0.0, 1.0])
    clip = clip_of(system, 5)
    faded = in_pieces(lambda part: torch.full((1, int(part.lengths[0]), 1), next(numbers)), clip, FPS, 2.0, 0.5)
    steps = faded[0, :, 0].diff().abs()
    assert steps.max() < 0.1, "no jump from one piece to the next"
    assert faded.min() == 0
    assert faded.max() == 1


def test_conditions_that_are_not_taken_or_known_are_refused(system) -> None:
    check_conditions(system, Conditions(subject="bert"))
    for given, says in {
        Conditions(subject="dora"): "--style dora: unknown; .* knows anna, bert",
        Conditions(emotion="happy"): "--emotion: .* does not take it; it takes --style",
        Conditions(intensity=1): "--intensity: .* does not take it",
        Conditions(transcript="a hum"): "--transcript: .* does not take it",
        Conditions(prompt="gently"): "--prompt: .* does not take it",
    }.items():
        with pytest.raises(UserError, match=says):
            check_conditions(system, given)
    with pytest.raises(UserError, match=r"--reference: .* does not take it"):
        check_conditions(system, Conditions(), reference=True)
    system.emotions, system.conditions = ["neutral", "happy"], ("subject", "emotion", "intensity", "words")
    check_conditions(system, Conditions(emotion="happy", intensity=2, transcript="a hum"))
    with pytest.raises(UserError, match=r"--emotion bored: unknown; .* knows neutral, happy"):
        check_conditions(system, Conditions(emotion="bored"))
    with pytest.raises(UserError, match="--intensity 3: expected 0, 1 or 2"):
        check_conditions(system, Conditions(intensity=3))
    with pytest.raises(UserError, match=r"--intensity 2: of which --emotion\? one of neutral, happy"):
        check_conditions(system, Conditions(intensity=2))
    system.conditions = ("subject", "prompt", "prompt image", "reference")
    with pytest.raises(UserError, match=r"--prompt_image: .* leave one out"):
        check_conditions(system, Conditions(prompt="gently", prompt_image=Path("smile.png")))
    with pytest.raises(UserError, match="--style: the style comes from --reference; leave one out"):
        check_conditions(system, Conditions(subject="anna"), reference=True)


def test_a_stranger_needs_a_style_where_the_system_has_no_single_one(system) -> None:
    system.unseen, system.every_style = "all-mean", True
    sound = np.zeros(RATE, np.float32)
    with pytest.raises(UserError, match=r"--style: .* no single style .*all-mean.*; name one of anna, bert"):
        request(system, "talk", sound, torch.zeros(12, 3), FPS, Conditions())
    clip = request(system, "talk", sound, torch.zeros(12, 3), FPS, Conditions(subject="bert"))
    assert clip.subject_index.tolist() == [1]


def test_words_after_the_end_of_the_sound_are_refused(system) -> None:
    words = [("soon", 0.2, 0.4), ("late", 1.5, 2.0)]
    with pytest.raises(UserError, match=r"--words: 'late' begins at 1.5 s, but the recording ends at 1.0 s"):
        request(system, "talk", np.zeros(RATE, np.float32), torch.zeros(12, 3), FPS, Conditions(words=words))


def test_a_request_without_conditions_is_neutral_and_of_nobody(system) -> None:
    system.emotions = ["happy", "neutral"]
    clip = request(system, "talk", np.zeros(RATE, np.float32), torch.zeros(12, 3), FPS, Conditions())
    assert (clip.subject_index.tolist(), clip.emotion.tolist(), clip.intensity.tolist()) == ([-1], [1], [0])


def test_pictures(tmp_path) -> None:
    Image.new("RGB", (4, 2), (255, 0, 0)).save(tmp_path / "red.png")
    assert read_image(tmp_path / "red.png")[:, 0, 0].tolist() == [1, -1, -1]
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png: not a picture"):
        read_image(tmp_path / "text.png")


def test_references_are_found_by_key_in_any_split(system, talking_root) -> None:
    data = SpeechDataModule(str(talking_root), batch_size=2)
    whole = {
        key: batch.clip(i)
        for split in ("train", "test")
        for batch in data.loader(split)
        for i, key in enumerate(batch.key)
    }
    keys = [key for key in whole if key.startswith("anna")][:2]
    reference = reference_of(system, data, keys[::-1])
    assert reference.key == keys[::-1]
    assert torch.equal(reference.clip(1).vertices, whole[keys[0]].vertices)
    assert reference.subject_index.tolist() == [0, 0]
    system.subjects = ["bert", "carl"]
    assert reference_of(system, data, keys).subject_index.tolist() == [-1, -1]
    with pytest.raises(UserError, match=r"--reference nobody: .* no clip of this key"):
        reference_of(system, data, [keys[0], "nobody"])
    other = next(key for key in whole if not key.startswith("anna"))
    with pytest.raises(UserError, match="expected those of one person"):
        reference_of(system, data, [keys[0], other])


def test_features_of_the_whole_clip_do_not_reach_its_pieces(system) -> None:
    clip = replace(clip_of(system, 3), features={"x": torch.zeros(1, 90, 2)}, feature_lengths={"x": torch.tensor([90])})
    assert piece(clip, 0, 30, FPS).features == {}
