import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from datamodules.demo import looks
from datamodules.demo.captions import LANGUAGES, PHRASES, english, translated
from datamodules.demo.faces import (
    ATTRIBUTES,
    CAMERA,
    HELD_OUT,
    MIN_DISTANCE,
    View,
    build_faces,
    draw_expression,
    draw_identities,
    draw_look,
    draw_view,
    label_attributes,
    rotation,
    take_picture,
)
from datamodules.demo.looks import LABEL, Look
from datamodules.errors import UserError
from datamodules.head import Head
from datamodules.render import Light
from datamodules.shards import Manifest

HEAD = Head.load()
FRONT = View(0, 0, 0, Light(), np.full((2, 3), 0.5))
PEOPLE = draw_identities(24, seed=5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("faces")
    build_faces(root, train=20, val=8, test=12, size=32, seed=3, processes=2)
    return root


def samples(root, split):
    found = {}
    for path in sorted(root.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, name = member.name.split(".", 1)
                found.setdefault(key, {})[name] = tar.extractfile(member).read()
    return found


def labels(root, split):
    return [json.loads(sample["json"]) for sample in samples(root, split).values()]


def test_the_bytes_depend_on_the_seed_only(corpus, tmp_path):
    again = build_faces(tmp_path / "again", train=20, val=8, test=12, size=32, seed=3, processes=1)
    assert again.sha256 == Manifest.read(corpus).sha256
    for shard in again.shards:
        assert (again.root / shard.file).read_bytes() == (corpus / shard.file).read_bytes()
    assert draw_identities(1, seed=3) == draw_identities(2, seed=3)[:1] != draw_identities(1, seed=4)


def test_samples_hold_what_the_data_module_reads(corpus):
    from datamodules.faces import FaceDataModule

    module = FaceDataModule(str(corpus), batch_size=4)
    batch = next(iter(module.val_dataloader()))
    assert batch.image.shape == (4, 3, 32, 32)
    assert batch.attributes.shape == (4, 21)
    assert module.attributes == ATTRIBUTES
    assert batch.landmarks.shape == (4, 68, 2)
    assert int(batch.mask.max()) < len(module.manifest.fields["mask_classes"])
    assert all(len(captions) == 10 for captions in batch.captions)


def test_identities_of_the_splits_are_disjoint_and_shown_four_times(corpus):
    shown = {split: [label["identity"] for label in labels(corpus, split)] for split in ("train", "val", "test")}
    assert {split: len(set(numbers)) for split, numbers in shown.items()} == {"train": 5, "val": 2, "test": 3}
    assert not set(shown["train"]) & set(shown["val"]) | set(shown["val"]) & set(shown["test"])
    assert all(numbers.count(number) == 4 for numbers in shown.values() for number in numbers)


def test_held_out_compositions_are_in_test_only(corpus):
    for split in ("train", "val", "test"):
        for label in labels(corpus, split):
            has = dict(zip(ATTRIBUTES, label["attributes"], strict=True))
            unseen = any(has[one] and has[other] for one, other in HELD_OUT)
            assert label["unseen_composition"] == unseen
            assert not (unseen and split != "test")


def test_identities_differ_by_the_minimum_distance():
    faces = np.stack([HEAD.identity(person.shape)[HEAD.landmarks] for person in PEOPLE])
    difference = faces[:, None] - faces[None]
    distance = np.sqrt((difference**2).sum(-1).mean(-1)) + np.eye(len(PEOPLE))
    assert distance.min() >= MIN_DISTANCE * (1 - 1e-6)


def test_labels_of_the_mouth_agree_with_the_geometry():
    neutral = HEAD.identity(PEOPLE[0].shape)
    rest = neutral[HEAD.landmarks]
    rng = np.random.default_rng(0)
    gaps, lifts = {True: [], False: []}, {True: [], False: []}
    for _ in range(60):
        expression = draw_expression(rng)
        has = label_attributes(PEOPLE[0], Look(), expression)
        point = HEAD.pose(neutral, expression)[HEAD.landmarks]
        gaps[has["Mouth_Slightly_Open"]].append(np.linalg.norm(point[62] - point[66]))
        lifts[has["Smiling"]].append((point[[48, 54], 1] - rest[[48, 54], 1]).mean())
    assert min(gaps[True]) > max(gaps[False]) + 0.004  # metres
    assert min(lifts[True]) > max(lifts[False])


@pytest.mark.parametrize("number", range(0, 24, 3))
def test_what_is_labelled_is_what_the_mask_shows(number):
    person, rng = PEOPLE[number], np.random.default_rng(number)
    look, expression = draw_look(person, rng), draw_expression(rng)
    has = label_attributes(person, look, expression)
    image, mask, landmarks = take_picture(person, look, expression, draw_view(rng), 64)
    assert image.shape == (64, 64, 3)
    shows = {name: bool((mask == index).sum() > 3) for name, index in LABEL.items()}
    assert shows["eye_g"] == has["Eyeglasses"]
    assert shows["hair"] == (not has["Bald"])
    assert shows["mouth"] >= has["Mouth_Slightly_Open"]
    hair = [has[f"{name.capitalize()}_Hair"] for name in looks.HAIR_COLOURS]
    assert sum(hair) == (not has["Bald"])
    assert has["No_Beard"] == (not has["Mustache"] and not has["Goatee"])
    # Landmarks lie on the face: the tip of the nose on the nose, the outer lips' middle on the lips.
    x, y = np.floor(landmarks[30]).astype(int)
    assert mask[y, x] == LABEL["nose"]
    assert landmarks.min() > -8
    assert landmarks.max() < 72


def test_left_and_right_in_the_mask_are_the_subjects():
    _, mask, landmarks = take_picture(PEOPLE[1], Look(), np.zeros(52), FRONT, 128)
    for name, corners in (("r_eye", (36, 39)), ("l_eye", (42, 45))):
        y, x = np.nonzero(mask == LABEL[name])
        assert landmarks[corners[0], 0] - 2 < x.mean() < landmarks[corners[1], 0] + 2
        assert y.mean() == pytest.approx(landmarks[list(corners), 1].mean(), abs=3)


def test_glasses_lipstick_and_beards_change_their_own_pixels_only():
    person = next(one for one in PEOPLE if one.male and one.skin < 0.5 and not one.bald)
    plain, mask, landmarks = take_picture(person, Look(), np.zeros(52), FRONT, 64)
    changes = {
        "glasses": (Look(glasses="black"), 36, 45, 10),
        "lipstick": (Look(lipstick="red"), 48, 54, 10),
        "mustache": (Look(mustache=True), 33, 51, 10),
        "goatee": (Look(goatee=True), 57, 8, 10),
    }
    for name, (look, first, last, reach) in changes.items():
        image, _, _ = take_picture(person, look, np.zeros(52), FRONT, 64)
        y, x = np.nonzero(np.abs(image.astype(int) - plain).sum(-1) > 60)
        assert len(x) >= 8, name
        middle = landmarks[[first, last]].mean(0)
        assert [x.mean(), y.mean()] == pytest.approx(middle, abs=reach), name
    red, _, _ = take_picture(person, Look(lipstick="red"), np.zeros(52), FRONT, 64)
    lips = np.isin(mask, [LABEL["u_lip"], LABEL["l_lip"]])
    saturation = [picture[lips].astype(int)[:, 0] - picture[lips].astype(int)[:, 1] for picture in (red, plain)]
    assert saturation[0].mean() > saturation[1].mean() + 50


def test_the_eyes_stay_in_place_while_the_head_turns():
    for yaw, pitch in ((0, 0), (25, 0), (-25, 10)):
        turned = HEAD.identity(PEOPLE[2].shape) @ rotation(yaw, pitch, 0).T
        eyes = np.stack([turned[HEAD.part(part)].mean(0) for part in ("eye_left", "eye_right")]).mean(0)
        assert CAMERA.project(eyes, 64)[:2] == pytest.approx([32, 29.4], abs=0.1)
    assert rotation(30, 0, 0) @ [0, 0, 1] == pytest.approx([0.5, 0, np.sqrt(0.75)])  # toward the subject's left
    assert (rotation(0, 10, 0) @ [0, 0, 1])[1] < 0  # down


def test_young_is_under_forty_with_a_margin_and_women_have_no_beards():
    people = [looks.sample_identity(np.random.default_rng(i)) for i in range(200)]
    assert all((person.age < 40) == person.traits["Young"] for person in people)
    assert not any(35 < person.age < 49 for person in people)
    rng = np.random.default_rng(0)
    for person in people:
        look = draw_look(person, rng)
        assert person.male or not (look.mustache or look.goatee)


def test_captions_are_true():
    rng = np.random.default_rng(1)
    for person in PEOPLE:
        has = label_attributes(person, draw_look(person, rng), draw_expression(rng))
        written = english(has, rng)
        assert len(set(written)) == 10
        for caption in written:
            assert ("woman" in caption or "She" in caption) == (not has["Male"])
            assert ("young" in caption) == has["Young"] or "This" in caption or "The" in caption
            for name, phrases in PHRASES.items():
                assert has[name] or phrases[0] not in caption
        others = translated(has, rng)
        assert list(others) == [f"captions_{language}" for language in LANGUAGES]
        for i, caption in enumerate(others.values(), start=1):
            absent = [phrases[i] for name, phrases in PHRASES.items() if not has[name]]
            assert not any(phrase in caption for phrase in absent)


def test_pictures_are_lossless(corpus):
    sample = next(iter(samples(corpus, "train").values()))
    image = Image.open(io.BytesIO(sample["png"]))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
    assert Image.open(io.BytesIO(sample["mask.png"])).mode == "L"


def test_impossible_sizes_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="at least 16 pixels"):
        build_faces(tmp_path, size=4)
