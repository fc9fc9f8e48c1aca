"""English sentences whose meaning moves the brows: a seeded grammar with tagged words.

Three kinds of words carry a tag: those that open a question, those that negate and those that stress. The
grammar also says words that sound the same and mean nothing of the kind (``not`` and ``knot``, ``no`` and
``know``, ``where`` and ``wear``), so that the transcript knows what the sound alone does not.
"""

import random
from dataclasses import dataclass

QUESTION, NEGATION, EMPHASIS = "question", "negation", "emphasis"
TAGS = (QUESTION, NEGATION, EMPHASIS)


@dataclass(frozen=True)
class Sentence:
    """A sentence and the meaning of its words.

    Attributes:
        id: pool and number, "train-007".
        text: the sentence with its punctuation.
        tags: one per word (blank-separated): one of :data:`TAGS`, or "".
    """

    id: str
    text: str
    tags: tuple[str, ...]


# A template is a list of words; {slot} draws from the lexicon; "not~n", "did~q", "really~e" carry a tag.
TEMPLATES = (
    # statements, with the decoys "know", "knot", "witch", "wear", "sew", "nun"
    "{person} {past} the {adjective} {thing} {place}.",
    "I know the {worker} {past} a {thing} {place}.",
    "The {worker} and {person} will wear {adjective} {clothes} {time}.",
    "{person} tied a knot around the {adjective} {thing}.",
    "The witch {past} my {thing} {place}.",
    "Maybe a nun will {base} the {adjective} {thing} {time}.",
    "My {worker} can sew {adjective} {clothes} {place}.",
    # negations
    "{person} did {not} {base} the {thing} {place}.",
    "{person} {never} {past} the {adjective} {thing}.",
    "{nobody} {past} the {adjective} {thing} {time}.",
    "There is no~n {adjective} {thing} {place}.",
    "The {worker} will {not} {base} my {clothes} {time}.",
    "None~n of them {past} the {thing} {place}.",
    # emphasis
    "{person} {really} {past} my {adjective} {thing}.",
    "This {thing} is {very} {adjective}, {person} says.",
    "The {worker} {really} {past} a {thing} {place}.",
    "My {clothes} are {very} {adjective} {time}.",
    # questions that expect yes or no
    "{Did} {person} {base} the {adjective} {thing} {place}?",
    "{Did} the {worker} {base} my {thing} {time}?",
    "Is~q the {adjective} {thing} {place}?",
    # questions for something
    "{Why} did {person} {base} the {adjective} {thing}?",
    "{Why} will the {worker} {base} a {thing} {place}?",
    "Who~q {past} the {adjective} {thing} {place}?",
    "Which~q {worker} {past} my {thing} {time}?",
    # combinations
    "{Why} did the {worker} never~n {base} my {thing}?",
    "{Did} {person} {really} {base} a {adjective} {thing}?",
    "{person} will {really} {not} {base} the {thing}.",
    "Is~q the {thing} {not} {very} {adjective}?",
)

LEXICON: dict[str, tuple[str, ...]] = {
    "person": (
        *("Bob", "Pam", "Abby", "Tom", "Mabel", "Philip", "Joseph", "Thea", "Yasmin", "Hugo"),
        *("Zoe", "Sheila", "Victor", "George", "Ruth", "Kim", "Wanda", "Joy"),
    ),
    "worker": (
        *("baker", "farmer", "plumber", "captain", "bishop", "teacher", "nurse", "judge", "cowboy", "author"),
        *("mayor", "poet", "barber", "youth", "swimmer", "chief"),
    ),
    "thing": (
        *("bottle", "lamp", "umbrella", "piano", "map", "book", "box", "ship", "treasure", "toy"),
        *("boat", "pump", "jam jar", "cheese", "bath mat", "feather", "watch", "violin", "mushroom", "pebble"),
        *("apple pie", "power cable", "wheel", "garage door", "oil can", "hoop", "thimble", "yellow bowl"),
    ),
    "clothes": ("boots", "pyjamas", "gloves", "jumpers", "caps", "shoes", "leather belts", "wool mittens"),
    "adjective": (
        *("big", "blue", "purple", "broken", "empty", "simple", "huge", "noisy", "smooth", "unusual"),
        *("cheap", "good", "young", "brown", "pretty", "warm", "thick", "beige", "damp", "weird"),
    ),
    "place": (
        *("by the pump", "in the barn", "behind the church", "on the boat", "under the bridge", "at home"),
        *("near the beach", "up in the tower", "above the shop", "from Paris", "with both thumbs", "in the mud"),
        *("beside the pool", "on the moon", "at the south gate", "for my boss"),
    ),
    "time": (
        *("in May", "this morning", "on Thursday", "before lunch", "by midnight", "all summer", "at five"),
        *("in the autumn", "next month", "after the party", "each September", "while you sleep"),
    ),
    "verb": (
        *("bump/bumped", "paint/painted", "move/moved", "borrow/borrowed", "measure/measured", "watch/watched"),
        *("push/pushed", "break/broke", "throw/threw", "use/used", "buy/bought", "hide/hid", "choose/chose"),
        *("join/joined", "leave/left", "weigh/weighed", "describe/described", "remember/remembered"),
        *("compare/compared", "polish/polished", "gather/gathered", "wash/washed", "pull/pulled", "find/found"),
        *("empty/emptied", "improve/improved"),
    ),
    "not": ("not~n",),
    "never": ("never~n", "hardly~n", "seldom~n"),
    "nobody": ("Nobody~n", "No~n one~n"),
    "really": ("really~e", "certainly~e", "absolutely~e", "truly~e"),
    "very": ("very~e", "so~e", "extremely~e", "terribly~e"),
    "Did": ("Did~q", "Will~q", "Can~q"),
    "Why": ("Why~q", "When~q", "How~q", "Where~q"),
}

_TAG_OF_MARK = {"q": QUESTION, "n": NEGATION, "e": EMPHASIS}


def draw_sentences(counts: dict[str, int], seed: int = 0) -> dict[str, list[Sentence]]:
    """Draws pools of sentences; no sentence is in two pools or twice in one.

    Templates take turns, and so do the words of each slot, in a random order: a pool of a few dozen
    sentences has every kind of sentence and nearly every word, therefore every English phoneme.

    Args:
        counts: pool name -> number of sentences.
        seed: decides everything.
    """
    rng = random.Random(seed)
    turns: dict[str, list[str]] = {}
    used: set[str] = set()
    pools: dict[str, list[Sentence]] = {}
    for pool, count in counts.items():
        pools[pool] = []
        while len(pools[pool]) < count:
            text, tags = _fill(_take_turn(turns, "template", TEMPLATES, rng), turns, rng)
            if text not in used:
                used.add(text)
                pools[pool].append(Sentence(f"{pool}-{len(pools[pool]):03d}", text, tags))
    return pools


def _take_turn(turns: dict[str, list[str]], slot: str, choices: tuple[str, ...], rng: random.Random) -> str:
    """The next of a shuffled list, shuffled anew when used up."""
    if not turns.get(slot):
        turns[slot] = rng.sample(choices, len(choices))
    return turns[slot].pop()


def _fill(template: str, turns: dict[str, list[str]], rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """Replaces every slot, then separates words from their tags."""
    words: list[str] = []
    for item in template.split():
        slot, stop = item.strip("{},.?"), item[len(item.rstrip(",.?")) :]
        if not item.startswith("{"):
            words.append(item)
            continue
        if slot in ("base", "past"):
            verb = _take_turn(turns, "verb", LEXICON["verb"], rng).split("/")
            filled = verb[0] if slot == "base" else verb[1]
        else:
            filled = _take_turn(turns, slot, LEXICON[slot], rng)
        words += (filled + stop).split()
    plain, tags = [], []
    for word in words:
        name, _, mark = word.partition("~")
        plain.append(name + mark[1:])
        tags.append(_TAG_OF_MARK.get(mark[:1], ""))
    return " ".join(plain), tuple(tags)
