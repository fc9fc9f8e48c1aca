"""Who is in each sample: what error bars over people draw."""

import json
import tarfile

from datamodules.shards import Manifest

FIELDS = ("subject", "identity")


def people(manifest: Manifest, split: str) -> dict[str, str]:
    """Key of each sample of a split -> its subject or identity; samples whose labels name nobody are left out.

    Args:
        manifest: of the data.
        split: for instance ``test``.
    """
    found: dict[str, str] = {}
    for shard in manifest.split(split):
        with tarfile.open(manifest.locate(shard)) as tar:
            for member in tar:
                if not member.name.endswith(".json"):
                    continue
                labels = json.load(tar.extractfile(member))  # type: ignore[arg-type]  # it is a file
                for field in FIELDS:
                    if field in labels:
                        found[member.name.removesuffix(".json")] = str(labels[field])
    return found
