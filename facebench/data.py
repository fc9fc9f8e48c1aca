"""``facebench data``: build data sets as shards."""

from pathlib import Path

from datamodules.errors import UserError
from facebench.command import run_command


def demo(
    out: str,
    faces: int = 5500,
    size: int = 64,
    subjects: int = 12,
    sentences: int = 24,
    seed: int = 0,
    processes: int | None = None,
) -> None:
    """Builds the demo corpus: rendered faces and talking heads from a CC0 head and a speech synthesiser.

    A build that was interrupted goes on where it stopped; a finished one is left as it is.

    Example:
        facebench data demo --out data/demo

    Args:
        out: folder to write; gets the folders faces/ and talking/.
        faces: number of face images (8/11 train, 1/11 val, 2/11 test); 0 for none.
        size: height and width of the images in pixels, up to 512.
        subjects: number of talking heads (2/3 train, 1/6 val, 1/6 test); 0 for none.
        sentences: sentences each of them speaks.
        seed: another seed is another corpus.
        processes: parallel processes, by default one per core.
    """
    from datamodules.demo.faces import build_faces
    from datamodules.demo.talking import build_talking

    if faces:
        val = faces // 11
        test = 2 * val
        build_faces(
            Path(out) / "faces",
            train=faces - val - test,
            val=val,
            test=test,
            size=size,
            seed=seed,
            processes=processes,
        )
    if subjects:
        build_talking(Path(out) / "talking", subjects=subjects, sentences=sentences, seed=seed, processes=processes)


SOURCES = {"demo": demo}


def main(args: list[str]) -> None:
    """The first argument names the data set."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: facebench data NAME --out DIR ...\n\nNAME is one of: " + ", ".join(SOURCES))
        print("\n'facebench data NAME --help' says more.")
        return
    if args[0] not in SOURCES:
        raise UserError(f"no data set '{args[0]}'; known: {', '.join(SOURCES)}")
    run_command(SOURCES[args[0]], f"facebench data {args[0]}", args[1:])
