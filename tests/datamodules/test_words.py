import pytest
from praatio import textgrid

from datamodules.errors import UserError
from datamodules.words import read_alignment, read_words, spread_words, words_at_frames, words_within

SPOKEN = [("Did", 0.2, 0.4), ("Pam", 0.4, 0.75), ("move", 1.0, 1.25)]


def write_grid(path, form: str = "long_textgrid", **tiers) -> str:
    grid = textgrid.Textgrid()
    for name, entries in tiers.items():
        grid.addTier(textgrid.IntervalTier(name.replace("_", " - "), entries, 0, 2))
    grid.save(str(path), format=form, includeBlankSpaces=True)
    return str(path)


@pytest.mark.parametrize("form", ["long_textgrid", "short_textgrid"])
@pytest.mark.parametrize("name", ["words", "Pam_words", "Wörter"])
def test_words_of_a_text_grid(tmp_path, form, name) -> None:
    others = {"phones": [(0.2, 0.3, "d")]} if "words" in name else {}
    path = write_grid(tmp_path / "clip.TextGrid", form, **{name: [(s, e, w) for w, s, e in SPOKEN]}, **others)
    assert read_words(path) == SPOKEN


def test_words_of_a_table(tmp_path) -> None:
    path = tmp_path / "clip.csv"
    path.write_text('\ufeffword,start,end,score\nDid,0.2,0.4,1\nPam,0.4,0.75,1\n,0.75,1,1\n"move",1,1.25,1\n', "utf-8")
    assert read_words(path) == SPOKEN


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("clip.txt", "", "convert it"),
        ("missing.csv", None, "no such file"),
        ("clip.csv", "Begin,End\n1,2\n", "no column 'word'"),
        ("clip.csv", "word,start,end\n", "holds no words"),
        ("clip.csv", "word,start,end\na,0,one\n", "could not convert"),
        ("clip.csv", "word,start,end\na,0\n", "not a table"),
        ("clip.csv", b"word,start,end\n\xff,0,1\n", "not a table"),
        ("clip.csv", "word,start,end\na,1,1\n", "'a' from 1 to 1 s"),
        ("clip.csv", "word,start,end\na,0,nan\n", "'a' from 0 to nan s"),
        ("clip.csv", "word,start,end\na,0,2\nb,1,3\n", "expected to start at 2 s"),
        ("clip.TextGrid", "nothing", "not a TextGrid"),
        ("clip.TextGrid", "", "not a TextGrid"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, name, contents, message) -> None:
    path = tmp_path / name
    if contents is not None:
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(UserError, match=message) as error:
        read_words(path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_grid_of_several_tiers_needs_one_of_words(tmp_path) -> None:
    path = write_grid(tmp_path / "clip.TextGrid", phones=[(0.2, 0.3, "d")], syllables=[(0.2, 0.3, "da")])
    with pytest.raises(UserError, match="'phones', 'syllables', expected one named 'words'"):
        read_words(path)


def test_words_without_times_are_equally_long() -> None:
    assert spread_words("  Move it,\nPam!  ", 1.5) == [("Move", 0.0, 0.5), ("it,", 0.5, 1.0), ("Pam!", 1.0, 1.5)]
    assert spread_words(" ", 1.0) == []


def test_a_frame_has_the_word_in_its_middle() -> None:
    # The middles lie at 0.05, 0.15, 0.25 ... seconds.
    said = words_at_frames([("a", 0.05, 0.15), ("b", 0.15, 0.4), ("c", 0.56, 9.0)], frames=8, fps=10)
    assert said.tolist() == [0, 1, 1, 1, -1, -1, 2, 2]
    assert words_at_frames([], frames=2, fps=10).tolist() == [-1, -1]


def test_words_and_phonemes_of_an_aligner(tmp_path) -> None:
    phones = [(0.2, 0.3, "D"), (0.3, 0.4, "IH1"), (0.4, 1.0, "sil"), (1.0, 1.25, "UW0")]
    words = [(0.0, 0.2, "<eps>"), *((start, end, word) for word, start, end in SPOKEN)]
    path = tmp_path / "clip.TextGrid"
    write_grid(path, Pam_words=words, Pam_phones=phones)
    assert read_alignment(path) == (SPOKEN, [("D", 0.2, 0.3), ("IH", 0.3, 0.4), ("UW", 1.0, 1.25)])
    write_grid(path, words=words)
    with pytest.raises(UserError, match="interval tiers 'words', expected one named 'phones'"):
        read_alignment(path)
    with pytest.raises(UserError, match=r"other.TextGrid: no such TextGrid"):
        read_alignment(tmp_path / "other.TextGrid")


def test_words_of_a_part_are_timed_from_its_start() -> None:
    assert words_within(SPOKEN, 0.5, 1.0) == [("Pam", 0.0, 0.25)]
    assert words_within(SPOKEN, 0.0, 0.25) == [("Did", 0.2, 0.25)]
    assert words_within(SPOKEN, 0.0, 9.0) == SPOKEN
