from collections import Counter

import pytest

from datamodules.demo.sentences import TAGS, draw_sentences

COUNTS = {"train": 72, "val": 24, "test": 24}

# The phonemes of General American English, as espeak-ng writes them without stress and length.
CONSONANTS = [*"pbtdkɡfvθðszʃʒhmnŋlɹjw", "tʃ", "dʒ"]
VOWELS = ["i", "ɪ", "eɪ", "ɛ", "æ", "ɑ", "ɔ", "oʊ", "ʊ", "u", "ʌ", "ə", "ɚ", "aɪ", "aʊ", "ɔɪ"]


def test_pools_are_of_the_asked_size_and_share_no_sentence():
    pools = draw_sentences(COUNTS)
    texts = [sentence.text for pool in pools.values() for sentence in pool]
    assert {name: len(pool) for name, pool in pools.items()} == COUNTS
    assert len(set(texts)) == len(texts) == 120


def test_the_seed_decides():
    assert draw_sentences(COUNTS, seed=3) == draw_sentences(COUNTS, seed=3)
    assert draw_sentences(COUNTS, seed=3) != draw_sentences(COUNTS, seed=4)


def test_every_word_has_a_tag_and_every_pool_has_every_kind():
    for pool in draw_sentences(COUNTS).values():
        for sentence in pool:
            assert len(sentence.tags) == len(sentence.text.split())
            assert not set("{}~/") & set(sentence.text)
        assert {tag for sentence in pool for tag in sentence.tags} == {*TAGS, ""}


def test_questions_and_only_questions_end_in_a_question_mark():
    for sentence in draw_sentences(COUNTS)["train"]:
        assert ("question" in sentence.tags) == sentence.text.endswith("?")


@pytest.mark.parametrize(
    ("meaning", "sound"), [("not", "knot"), ("no", "know"), ("which", "witch"), ("so", "sew"), ("none", "nun")]
)
def test_words_that_sound_alike_differ_in_meaning(meaning, sound):
    tags: dict[str, set[str]] = {meaning: set(), sound: set()}
    for sentence in draw_sentences({"train": 300})["train"]:
        for word, tag in zip(sentence.text.lower().split(), sentence.tags, strict=True):
            if word.strip(".,?") in tags:
                tags[word.strip(".,?")].add(tag)
    assert len(tags[meaning]) == 1
    assert "" not in tags[meaning]
    assert tags[sound] == {""}


def test_every_english_phoneme_is_said_and_lips_close_often():
    pytest.importorskip("espeakng_loader")
    from datamodules.demo.espeak import speak

    said = Counter(p for s in draw_sentences(COUNTS)["train"] for p, _, _ in speak(s.text).phonemes)
    assert all(said[phoneme] >= 3 for phoneme in CONSONANTS + VOWELS)
    assert sum(said[p] for p in "mbp") / said.total() > 0.12
