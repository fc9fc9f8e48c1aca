"""What papers and third parties reported: shown apart from what was measured, each number with its source.

``reported.yaml`` is a list of entries; each holds numbers of one table or statement::

    - task: speech-to-mesh
      data: VOCASET, test
      metric: LVE, squared (×1e-5 m²)
      source: UniTalker's table
      basis: third party
      values: {FaceFormer: 1.1696}

A number that nobody has checked against such a source has no place in the file.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from datamodules.errors import UserError

FILE = Path(__file__).with_name("reported.yaml")

# How sure a number is, the surest first.
BASES = {
    "official": "the authors' code or its saved output",
    "abstract": "the paper's abstract or project page",
    "third party": "another paper or repository",
    "issue": "a reader or author in an issue thread",
}
_FIELDS = ("task", "data", "metric", "source", "basis", "values")


@dataclass(frozen=True)
class Reported:
    """One number that someone reported.

    Attributes:
        task: for instance ``speech-to-mesh``.
        system: its name as printed there.
        data: data set and split or setting.
        metric: with unit and multiplier.
        value: as printed.
        source: who printed it.
        basis: how sure it is, a key of ``BASES``.
    """

    task: str
    system: str
    data: str
    metric: str
    value: str
    source: str
    basis: str


def read_reported(path: Path = FILE) -> list[Reported]:
    """Reads and checks reported numbers, in the file's order.

    Raises:
        UserError: not such a file, a field is missing or not known, or a number without a checked source.
    """
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of entries")
    numbers = []
    for place, entry in enumerate(entries, 1):
        where = f"{path}, entry {place}"
        if not isinstance(entry, dict) or set(entry) != set(_FIELDS) or not isinstance(entry["values"], dict):
            raise UserError(f"{where}: expected the fields {', '.join(_FIELDS)}, with values a mapping")
        if entry["basis"] not in BASES:
            raise UserError(f"{where}: basis is '{entry['basis']}', expected one of {', '.join(BASES)}")
        about = {field: str(entry[field]) for field in _FIELDS if field != "values"}
        numbers += [Reported(system=system, value=str(value), **about) for system, value in entry["values"].items()]
    return numbers
