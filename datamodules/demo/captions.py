"""Captions from a grammar over attributes: ten in English, one each in French, German, Italian and Spanish.

Every caption names the person by sex and age group and some of the attributes that are present, in random
order; what is absent is not mentioned, so that every caption is true.
"""

import numpy as np

ENGLISH = (
    "{A} with {features}.",
    "A photo of {a} with {features}.",
    "This {person} has {features}.",
    "{Pronoun} is {young} and has {features}.",
    "A portrait of {a}, with {features}.",
    "The {person} in the picture has {features}.",
    "{A} who has {features}.",
    "A close-up of {a} showing {features}.",
    "We see {a} with {features}.",
    "There is {a} with {features}.",
)

# CelebA attribute -> noun phrase; in the other languages as it stands after avec / mit / con / con.
PHRASES: dict[str, tuple[str, str, str, str, str]] = {
    "Smiling": ("a smile", "un sourire", "einem Lächeln", "un sorriso", "una sonrisa"),
    "Mouth_Slightly_Open": (
        "a slightly open mouth",
        "la bouche entrouverte",
        "leicht geöffnetem Mund",
        "la bocca socchiusa",
        "la boca entreabierta",
    ),
    "Eyeglasses": ("glasses", "des lunettes", "einer Brille", "gli occhiali", "gafas"),
    "Black_Hair": ("black hair", "des cheveux noirs", "schwarzen Haaren", "i capelli neri", "el pelo negro"),
    "Blond_Hair": ("blond hair", "des cheveux blonds", "blonden Haaren", "i capelli biondi", "el pelo rubio"),
    "Brown_Hair": ("brown hair", "des cheveux bruns", "braunen Haaren", "i capelli castani", "el pelo castaño"),
    "Gray_Hair": ("gray hair", "des cheveux gris", "grauen Haaren", "i capelli grigi", "el pelo gris"),
    "Bald": ("a bald head", "le crâne chauve", "einer Glatze", "la testa calva", "la cabeza calva"),
    "Mustache": ("a mustache", "une moustache", "einem Schnurrbart", "i baffi", "bigote"),
    "Goatee": ("a goatee", "un bouc", "einem Spitzbart", "il pizzetto", "perilla"),
    "Wearing_Lipstick": ("lipstick", "du rouge à lèvres", "Lippenstift", "il rossetto", "los labios pintados"),
    "Pale_Skin": ("pale skin", "la peau pâle", "blasser Haut", "la pelle pallida", "la piel pálida"),
    "Bushy_Eyebrows": (
        "bushy eyebrows",
        "des sourcils épais",
        "buschigen Augenbrauen",
        "le sopracciglia folte",
        "las cejas pobladas",
    ),
    "Big_Nose": ("a big nose", "un gros nez", "einer großen Nase", "il naso grande", "la nariz grande"),
    "Pointy_Nose": ("a pointy nose", "un nez pointu", "einer spitzen Nase", "il naso a punta", "la nariz puntiaguda"),
    "Big_Lips": ("full lips", "des lèvres pulpeuses", "vollen Lippen", "le labbra carnose", "los labios gruesos"),
    "Chubby": ("a chubby face", "le visage rond", "einem runden Gesicht", "il viso paffuto", "la cara redonda"),
    "Narrow_Eyes": ("narrow eyes", "des yeux étroits", "schmalen Augen", "gli occhi stretti", "los ojos estrechos"),
}

# language -> (conjunction, "with", person by (male, young))
LANGUAGES: dict[str, tuple[str, str, dict[tuple[bool, bool], str]]] = {
    "fr": ("et", "avec", {(True, True): "Un jeune homme", (True, False): "Un homme âgé",
                          (False, True): "Une jeune femme", (False, False): "Une femme âgée"}),
    "de": ("und", "mit", {(True, True): "Ein junger Mann", (True, False): "Ein älterer Mann",
                          (False, True): "Eine junge Frau", (False, False): "Eine ältere Frau"}),
    "it": ("e", "con", {(True, True): "Un giovane uomo", (True, False): "Un uomo anziano",
                        (False, True): "Una giovane donna", (False, False): "Una donna anziana"}),
    "es": ("y", "con", {(True, True): "Un hombre joven", (True, False): "Un hombre mayor",
                        (False, True): "Una mujer joven", (False, False): "Una mujer mayor"}),
}  # fmt: skip


def english(attributes: dict[str, bool], rng: np.random.Generator) -> list[str]:
    """Ten English captions: every sentence of the grammar once, each with its own choice of attributes."""
    return [_english(template, attributes, rng) for template in rng.permutation(ENGLISH)]


def _english(template: str, attributes: dict[str, bool], rng: np.random.Generator) -> str:
    young = "young" if attributes["Young"] else "older"
    person = f"{young} {'man' if attributes['Male'] else 'woman'}"
    article = "a" if attributes["Young"] else "an"
    return template.format(
        A=f"{article.capitalize()} {person}",
        a=f"{article} {person}",
        person=person,
        young=young,
        Pronoun="He" if attributes["Male"] else "She",
        features=_listed([phrases[0] for phrases in _chosen(attributes, rng)], "and"),
    )


def translated(attributes: dict[str, bool], rng: np.random.Generator) -> dict[str, str]:
    """One caption in each of the other languages, keyed ``captions_fr``, ``captions_de`` ..."""
    captions = {}
    for i, (language, (conjunction, preposition, people)) in enumerate(LANGUAGES.items(), start=1):
        features = _listed([phrases[i] for phrases in _chosen(attributes, rng)], conjunction)
        person = people[attributes["Male"], attributes["Young"]]
        captions[f"captions_{language}"] = f"{person} {preposition} {features}."
    return captions


def _chosen(attributes: dict[str, bool], rng: np.random.Generator) -> list[tuple[str, ...]]:
    """The phrases of at least half of the attributes that are present, in random order."""
    present = [name for name in PHRASES if attributes[name]]
    count = rng.integers((len(present) + 1) // 2, len(present) + 1)
    return [PHRASES[str(name)] for name in rng.permutation(present)[: max(1, count)]]


def _listed(items: list[str], conjunction: str) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {conjunction} {items[-1]}"
