import io

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import UserError
from datamodules.faces import FaceDataModule
from datamodules.sources import m3celeba


def encoded(array: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "x.png"}


def write(tree, name: str, ids, mask=None) -> dict[str, dict]:
    """Two rows a row group, as a large file has many groups."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = {}
    for i in ids:
        pixels = tree.rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        classes = tree.rng.integers(0, 19, (8, 8), dtype=np.uint8)
        rows[str(i)] = {
            "id": str(i),
            "image": encoded(pixels),
            "mask": encoded(classes if mask is None else mask),
            "landmark_image": encoded(pixels),
            "landmark": [10 * i + k for k in range(8)],
            "captions_eng": [f"face {i}", "another"],
            "captions_fra": ["visage"],
            "captions_deu": ["Gesicht"],
            "captions_ita": ["volto"],
            "captions_spa": ["cara"],
            "pixels": pixels,
            "classes": classes,
        }
    columns = [name for name in next(iter(rows.values())) if name not in ("pixels", "classes")]
    table = pa.Table.from_pylist([{column: row[column] for column in columns} for row in rows.values()])
    table = table.set_column(
        table.schema.get_field_index("landmark"), "landmark", table["landmark"].cast(pa.list_(pa.int32()))
    )
    parquet.write_table(table, tree.path(name), row_group_size=2)
    return rows


def test_images_masks_landmarks_and_captions_in_five_languages(tree, tmp_path, read_back, labels_of):
    rows = write(tree, "data/train-00000-of-00002.parquet", range(5))
    rows |= write(tree, "data/train-00001-of-00002.parquet", range(5, 8))
    rows |= write(tree, "data/test-00000-of-00001.parquet", [8])
    manifest = m3celeba.build(tree.root, tmp_path / "out")
    module = FaceDataModule(str(tmp_path / "out"), batch_size=1)
    batches = read_back(module, "train")
    assert sorted(batches) == [str(i) for i in range(8)]
    assert list(read_back(module, "test")) == ["8"]
    for key, batch in batches.items():
        np.testing.assert_allclose((batch.image[0].permute(1, 2, 0) + 1) * 127.5, rows[key]["pixels"], atol=1e-3)
        np.testing.assert_array_equal(batch.mask[0], rows[key]["classes"])
        assert batch.landmarks[0].flatten().tolist() == rows[key]["landmark"]
        assert batch.captions == [rows[key]["captions_eng"]]
    languages = {name: labels_of(manifest)["3"][f"captions_{name}"] for name in ("fr", "de", "it", "es")}
    assert languages == {"fr": ["visage"], "de": ["Gesicht"], "it": ["volto"], "es": ["cara"]}


def test_masks_of_colours_are_refused_or_left_out(tree, tmp_path, read_back):
    write(tree, "train-0.parquet", [0], mask=np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"row '0' has a mask of mode RGB .* add --masks false"):
        m3celeba.build(tree.root, tmp_path / "out")
    m3celeba.build(tree.root, tmp_path / "bare", masks=False)
    batch = read_back(FaceDataModule(str(tmp_path / "bare"), batch_size=1), "train")["0"]
    assert batch.mask.shape == (1, 0, 0)


def test_other_files_are_refused(tree, tmp_path):
    tree.text("train-0.parquet", "no parquet")
    with pytest.raises(UserError, match=r"train-0\.parquet: not a readable parquet file"):
        m3celeba.build(tree.root, tmp_path / "out")
    (tree.root / "train-0.parquet").unlink()
    with pytest.raises(UserError, match=r"no train\*\.parquet"):
        m3celeba.build(tree.root, tmp_path / "out")
