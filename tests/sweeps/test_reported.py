import pytest

from datamodules.errors import UserError
from sweeps.reported import read_reported

GOOD = """
- task: speech-to-mesh
  data: VOCASET, test
  metric: LVE
  source: someone's table
  basis: third party
  values: {FaceFormer: 1.10, VOCA: 3 / 4}
"""


def write(tmp_path, text):
    path = tmp_path / "reported.yaml"
    path.write_text(text)
    return path


def test_values_become_numbers_with_their_source(tmp_path):
    first, second = read_reported(write(tmp_path, GOOD))
    assert (first.system, first.data, first.source, first.basis) == (
        "FaceFormer",
        "VOCASET, test",
        "someone's table",
        "third party",
    )
    assert (second.system, second.value) == ("VOCA", "3 / 4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("third party", "memory"), "entry 1: basis is 'memory', expected one of official, abstract"),
        (GOOD.replace("  source: someone's table\n", ""), "entry 1: expected the fields task, data"),
        (GOOD.replace("values: {", "values: [").replace("}", "]"), "with values a mapping"),
        ("task: x", "expected a list of entries"),
        ("- [", "not readable YAML"),
    ],
)
def test_a_number_without_a_checked_source_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_reported(write(tmp_path, text))
