import pickle
from collections import OrderedDict

import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.sources.pickles import read_pickle


def written(path, contents: bytes):
    path.write_bytes(contents)
    return path


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_and_containers_come_back(tmp_path, protocol):
    value = {
        "mesh": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "words": np.array(["a", "bc"]),
        "objects": np.array([{"a": 1}, None], dtype=object),
        "scalar": np.float64(0.1),
        "rest": [1, 2.5, None, True, b"bytes", "text", (1,), {2}, OrderedDict(a=1)],
    }
    read = read_pickle(written(tmp_path / "a.pkl", pickle.dumps(value, protocol)))
    for name in ("mesh", "fortran", "words", "objects"):
        assert read[name].dtype == value[name].dtype
        np.testing.assert_array_equal(read[name], value[name])
    assert read["scalar"] == value["scalar"]
    assert read["rest"] == value["rest"]


def test_a_python_2_pickle_of_an_array_comes_back(tmp_path):
    """Assembled by hand, opcode by opcode, as Python 2 and NumPy 1 wrote it: text and data as byte strings."""
    array = np.array([[1.5, -2.0, 200.0]])

    def string(data: bytes) -> bytes:
        return b"U" + bytes([len(data)]) + data

    contents = b"\x80\x02}" + string(b"FaceTalk_\xe4")
    contents += b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
    contents += b"(K\x01K\x01K\x03\x86cnumpy\ndtype\n" + string(b"f8") + b"K\x00K\x01\x87R"
    contents += b"(K\x03" + string(b"<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + string(array.tobytes())
    contents += b"tbs."
    read = read_pickle(written(tmp_path / "a.pkl", contents))
    assert list(read) == ["FaceTalk_ä"]
    np.testing.assert_array_equal(read["FaceTalk_ä"], array)


class Evil:
    def __reduce__(self):
        return eval, ("1 + 1",)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Evil(), "builtins.eval"),
        ({"a": [Evil()]}, "builtins.eval"),
        (np.array([Evil()], dtype=object), "builtins.eval"),
        (tuple, "builtins.tuple"),
        (np.load, "numpy.load"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path, value, name):
    with pytest.raises(UserError, match=name):
        read_pickle(written(tmp_path / "a.pkl", pickle.dumps(value, protocol=4)))


def test_an_array_cannot_ask_for_memory_before_its_data(tmp_path):
    bomb = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01b\x87R."
    with pytest.raises(UserError, match=r"expected \(0,\)"):
        read_pickle(written(tmp_path / "a.pkl", bomb))
    call = b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85\x85R."
    with pytest.raises(UserError, match="not a readable pickle"):
        read_pickle(written(tmp_path / "a.pkl", call))


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.pkl: not a readable pickle"):
        read_pickle(written(tmp_path / "a.pkl", pickle.dumps([1] * 100)[:-5]))
    with pytest.raises(UserError, match="no such file"):
        read_pickle(tmp_path / "b.pkl")
