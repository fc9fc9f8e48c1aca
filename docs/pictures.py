"""The README's pictures, from the last ``make demo``: ``make docs``."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from PIL import Image

from sweeps.results import read_results

SUITE = Path("runs/demo")
IMAGES = Path("docs/images")
PAGE = (1280, 1500)  # pixels of the report's head that are shown
FRAMES = 4


def leaderboard() -> Image.Image:
    """The head of the report, as a browser shows it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("docs/pictures.py: no chromium on the PATH; install it")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/user"]
        quiet += ["--disable-background-networking", "--disable-sync", "--no-first-run"]
        page = (SUITE / "report" / "index.html").resolve().as_uri()
        size = f"--window-size={PAGE[0]},{PAGE[1]}"
        subprocess.run([browser, *quiet, size, f"--screenshot={shot}", page], check=True, capture_output=True)
        return Image.open(shot).convert("RGB")


def talking_head() -> Image.Image:
    """Frames of the first video of FaceFormer: the truth beside it."""
    result = next(r for r in read_results(SUITE / "results.jsonl") if r.system == "faceformer" and r.media)
    frames = imageio.imread(SUITE / result.media["videos"][0]["file"], plugin="FFMPEG")
    chosen = np.linspace(0.2 * len(frames), 0.8 * len(frames), FRAMES).astype(int)
    return Image.fromarray(np.concatenate([frames[i] for i in chosen], axis=1))


def main() -> None:
    """Writes both, with few colours, so that the repository stays small."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name, make in (("leaderboard", leaderboard), ("talking-head", talking_head)):
        make().quantize(128, dither=Image.Dither.NONE).save(IMAGES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
