"""``facebench score``: predictions and a protocol in, scores out."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from facebench.command import run_command


def score(
    predictions: str, data: str, protocol: str, regions: dict[str, str] | None = None, out: str | None = None
) -> None:
    """Scores a folder of predictions under a protocol, any time, on any machine.

    Example:
        facebench predict --config configs/demo/voca.yaml --run runs/voca
        facebench score --predictions runs/voca/predictions --data data/demo/talking --protocol demo-speech
        facebench score --predictions runs/biwi/predictions --data data/biwi --protocol codetalker-biwi \\
            --regions '{lips: lve.txt, upper_face: fdd.txt}'

    Args:
        predictions: folder written by 'facebench predict'.
        data: folder of the data that was predicted.
        protocol: name of a protocol, or the path of a protocol file.
        regions: for speech, files of vertex indices by region: integers separated by commas, or .npy; by default the
            regions that come with the data.
        out: JSON file to write; by default scores.json in the predictions' folder.
    """
    from datamodules.shards import write_atomic
    from metrics.protocols import Protocol
    from sweeps.score import score as score_folder

    scores, bound = score_folder(Path(predictions), data, Protocol.read(protocol), regions)
    table = Table("metric", "value", "unit", title=f"{bound.id}")
    for name, entry in scores.metrics.items():
        value = entry["value"]
        table.add_row(name, "not reached" if value is None else f"{value:.4g}", entry["unit"])
    Console().print(table)
    written = {"protocol": bound.id, "metrics": scores.metrics, "curve": scores.curve}
    if scores.dropped_frames:
        written["dropped_frames"] = scores.dropped_frames
    path = Path(out) if out else Path(predictions) / "scores.json"
    write_atomic(path, json.dumps(written).encode())
    print(f"written: {path}")


def main(args: list[str]) -> None:
    """Parses the arguments and runs the verb."""
    run_command(score, "facebench score", args)
