import io
import json
import tarfile

import numpy as np
import pytest
from safetensors.numpy import load_file

from datamodules.errors import UserError
from datamodules.sources import ict

V = 6
NAMES = ["jawOpen", "browDown_L", "mouthSmile_L"]  # not in alphabetical order


def face_kit(tree):
    neutral = tree.rng.normal(0, 5, (V, 3)).round(4)
    targets = {
        name: (neutral + tree.rng.normal(0, 1, (V, 3))).round(4) for name in (*NAMES, "identity000", "identity001")
    }
    faces = [[0, 1, 2, 3], [3, 4, 5]]
    for name, mesh in {"generic_neutral_mesh": neutral, **targets}.items():
        tree.obj(f"{name}.obj", mesh, faces)
    tree.text("vertex_indices.json", json.dumps({"expressions": NAMES, "idx_to_landmark_idx": []}))
    return neutral, targets


def samples(manifest):
    for shard in manifest.shards:
        with tarfile.open(manifest.root / shard.file) as tar:
            found = {}
            for member in tar:
                key, _, kind = member.name.partition(".")
                contents = tar.extractfile(member).read()
                found.setdefault(key, {})[kind] = contents
        for key, members in found.items():
            offsets, weights = (np.load(io.BytesIO(members[name])) for name in ("offsets.npy", "weights.npy"))
            yield shard.split, key, json.loads(members["json"])["subject"], offsets, weights


def test_faces_are_sums_of_the_kits_directions(tree, tmp_path):
    neutral, targets = face_kit(tree)
    manifest = ict.build(tree.root, tmp_path / "out", identities=10, expressions=20)
    templates = load_file(manifest.root / "templates.safetensors")
    expressions = np.stack([targets[name] - neutral for name in NAMES])
    people = np.stack([(targets[f"identity00{i}"] - neutral).ravel() for i in range(2)])
    seen, active = {}, []
    for split, key, subject, offsets, weights in samples(manifest):
        np.testing.assert_allclose(offsets, np.einsum("c,cvx->vx", weights, expressions), atol=1e-5)
        assert ((weights >= 0) & (weights <= 1)).all()
        assert not weights.any() or not key.endswith("-0000")
        active.append(weights > 0)
        seen.setdefault(split, set()).add(subject)
    assert {split: len(subjects) for split, subjects in seen.items()} == {"train": 8, "val": 1, "test": 1}
    assert len(set().union(*seen.values())) == 10
    assert np.array(active).any(0).all()
    for mesh in templates.values():  # every template is the neutral mesh plus a sum of the two identities
        _, rest, *_ = np.linalg.lstsq(people.T, (mesh - neutral).ravel(), rcond=None)
        assert rest[0] < 1e-8
    assert manifest.kind == "expression-meshes"
    assert manifest.fields["controls"] == NAMES
    assert load_file(manifest.root / "topology.safetensors")["triangles"].tolist() == [[0, 1, 2], [0, 2, 3], [3, 4, 5]]


def test_the_face_alone(tree, tmp_path):
    face_kit(tree)
    manifest = ict.build(tree.root, tmp_path / "out", identities=3, expressions=1, vertices=4)
    assert manifest.fields["vertices"] == 4
    assert load_file(manifest.root / "topology.safetensors")["triangles"].tolist() == [[0, 1, 2], [0, 2, 3]]


def test_mistakes_are_named(tree, tmp_path):
    face_kit(tree)
    with pytest.raises(UserError, match="--vertices 9: expected 1 to 6"):
        ict.build(tree.root, tmp_path / "out", vertices=9)
    tree.obj("jawOpen.obj", np.zeros((5, 3)), [])
    with pytest.raises(UserError, match=r"jawOpen\.obj: 5 vertices, expected 6"):
        ict.build(tree.root, tmp_path / "out")
    (tree.root / "jawOpen.obj").unlink()
    with pytest.raises(UserError, match=r"holds no jawOpen\.obj"):
        ict.build(tree.root, tmp_path / "out")
