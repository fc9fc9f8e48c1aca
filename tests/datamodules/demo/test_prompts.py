import io
import itertools
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from datamodules.demo.prompts import (
    ACTION_UNITS,
    ACTIONS,
    CAPTIONS,
    DEGREES,
    PROTOTYPES,
    TEMPLATES,
    WORDS,
    build_prompts,
    control_weights,
    describe,
    draw_action_units,
)
from datamodules.demo.visemes import EMOTIONS
from datamodules.errors import UserError
from datamodules.head import Head
from datamodules.shards import Manifest

UNITS = Head.load().units


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("prompts")
    build_prompts(root, train=16, val=8, test=8, size=32, seed=3, processes=2)
    return root


def samples(root, split):
    found = {}
    for path in sorted(root.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, name = member.name.split(".", 1)
                found.setdefault(key, {})[name] = tar.extractfile(member).read()
    return found


def test_the_bytes_depend_on_the_seed_only(corpus, tmp_path):
    again = build_prompts(tmp_path / "again", train=16, val=8, test=8, size=32, seed=3, processes=1)
    assert again.sha256 == Manifest.read(corpus).sha256
    other = build_prompts(tmp_path / "other", train=16, val=8, test=8, size=32, seed=4, processes=1)
    assert other.sha256 != again.sha256


def test_every_emotion_in_turn_with_its_controls_and_a_picture(corpus):
    found = list(samples(corpus, "train").values())
    labels = [json.loads(sample["json"]) for sample in found]
    assert [label["emotion"] for label in labels] == [*EMOTIONS, *EMOTIONS]
    for sample, label in zip(found, labels, strict=True):
        weights = np.load(io.BytesIO(sample["weights.npy"]))
        assert weights.dtype == np.float32
        np.testing.assert_array_equal(weights, control_weights(label["aus"]))
        assert set(label["aus"]) == set(PROTOTYPES[label["emotion"]])
        with Image.open(io.BytesIO(sample["png"])) as image:
            assert image.size == (32, 32)


def test_action_units_move_their_arkit_units():
    weights = dict(
        zip(UNITS, control_weights({"AU1": 0.5, "AU4": 0.25, "AU12L": 0.75, "AU2R": 0.1}).tolist(), strict=True)
    )
    moved = {name: round(value, 3) for name, value in weights.items() if value}
    assert moved == {
        "browInnerUp": 0.5,
        "browDownLeft": 0.25,
        "browDownRight": 0.25,
        "mouthSmileLeft": 0.75,
        "browOuterUpRight": 0.1,
    }


def test_every_named_action_unit_is_known():
    for aus in PROTOTYPES.values():
        assert {action.rstrip("LR") for action in aus} <= set(ACTION_UNITS)
        assert not aus or set(aus) & set(ACTIONS)


def test_strength_scales_the_prototype():
    weak, strong = (draw_action_units("angry", strength, np.random.default_rng(0)) for strength in (0.4, 0.8))
    for action, value in weak.items():
        assert strong[action] == pytest.approx(2 * value, abs=2e-3)
        assert 0.85 * 0.4 <= value / PROTOTYPES["angry"][action] <= 1.15 * 0.4 + 2e-3


def test_no_wording_of_one_split_is_another_s():
    tables = [TEMPLATES, *WORDS.values(), *ACTIONS.values()]
    tables += [tuple(degrees[level] for degrees in DEGREES) for level in (0, 2)]
    for table in tables:
        for one, other in itertools.combinations(table, 2):
            assert not set(one) & set(other)
    words = [{word for table in WORDS.values() for word in table[split]} for split in range(3)]
    rng = np.random.default_rng(0)
    for split in range(3):
        held_out = set().union(*(words[other] for other in range(3) if other != split))
        texts = [describe(emotion, level, split, rng) for emotion in EMOTIONS for level in range(3) for _ in range(40)]
        assert not any(set(re.findall(r"[a-z]+", text.lower())) & held_out for text in texts)
    assert not set(CAPTIONS) & {template for templates in TEMPLATES for template in templates}


def test_prompts_are_english_sentences():
    rng = np.random.default_rng(1)
    for split in range(3):
        for emotion in EMOTIONS:
            for level in range(3):
                text = describe(emotion, level, split, rng)
                assert text[0].isupper()
                assert text.endswith(".")
                assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |[{}]", text), text


def test_captions_say_every_word_of_the_emotion(corpus):
    for sample in samples(corpus, "train").values():
        label = json.loads(sample["json"])
        words = [word for words in WORDS[label["emotion"]] for word in words]
        assert len(label["captions"]) == len(words)
        assert all(word in caption for word, caption in zip(words, label["captions"], strict=True))


def test_impossible_arguments(tmp_path):
    with pytest.raises(UserError, match=r"size 8, .* expected at least 16 pixels"):
        build_prompts(tmp_path, size=8)
