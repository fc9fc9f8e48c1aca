"""``facebench data``: build data sets as shards, check them, look at them, add features to them."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from datamodules.errors import UserError
from facebench.command import run_command


def demo(
    out: str,
    faces: int = 5500,
    size: int = 64,
    subjects: int = 12,
    sentences: int = 24,
    prompts: int = 3300,
    seed: int = 0,
    processes: int | None = None,
) -> None:
    """Builds the demo corpus: rendered faces, talking heads and described expressions.

    They come from a CC0 head and a speech synthesiser.

    A build that was interrupted goes on where it stopped; a finished one is left as it is.

    Example:
        facebench data demo --out data/demo

    Args:
        out: folder to write; gets the folders faces/, talking/ and prompts/.
        faces: number of face images (8/11 train, 1/11 val, 2/11 test); 0 for none.
        size: height and width of the images in pixels, up to 512.
        subjects: number of talking heads (2/3 train, 1/6 val, 1/6 test); 0 for none.
        sentences: sentences each of them speaks.
        prompts: number of described expressions (8/11 train, 1/11 val, 2/11 test); 0 for none.
        seed: another seed is another corpus.
        processes: parallel processes, by default one per core.
    """
    from datamodules.demo.faces import build_faces
    from datamodules.demo.prompts import build_prompts
    from datamodules.demo.talking import build_talking

    for name, build, count in (("faces", build_faces, faces), ("prompts", build_prompts, prompts)):
        if count:
            val = count // 11
            test = 2 * val
            build(
                Path(out) / name,
                train=count - val - test,
                val=val,
                test=test,
                size=size,
                seed=seed,
                processes=processes,
            )
    if subjects:
        build_talking(Path(out) / "talking", subjects=subjects, sentences=sentences, seed=seed, processes=processes)


# Each but the first is the module of that name in datamodules.sources.
SOURCES = {
    "demo": "the demo corpus: rendered faces, talking heads from a speech synthesiser, described expressions",
    "ffhq": "FFHQ, with FFHQ-Aging's labels if they are there",
    "celeba": "CelebA: attributes, identities, landmarks",
    "celebahq": "CelebA-HQ / CelebAMask-HQ: attributes and masks",
    "mm-celebahq": "Multi-Modal-CelebA-HQ: captions, and CelebAMask-HQ's attributes and masks if wanted",
    "celebatext-hq": "CelebAText-HQ: captions by people, attributes",
    "m3celeba": "M3CelebA: captions in five languages, masks, landmarks (parquet)",
    "image-folder": "any folder of images, with an optional CSV",
    "vocaset": "VOCASET, as released or in FaceFormer's layout",
    "biwi": "BIWI / B3D(AC)2, as released or in FaceFormer's or FaceXHuBERT's layout",
    "mead3d": "3DMEAD: FLAME coefficients with emotion and intensity (hdf5 or ProbTalk3D's npy)",
    "multiface": "Multiface, as released or in FaceDiffuser's layout",
    "beat": "BEAT: blendshape weights with emotion",
    "mesh-folder": "any folder of wav and npy vertices with templates",
    "tead": "text prompts with blendshape weights, as JSON lines",
    "ict": "expression meshes drawn from ICT-FaceKit",
}


def source(name: str) -> Callable[..., object]:
    """The function that builds a data set."""
    if name == "demo":
        return demo
    return importlib.import_module(f"datamodules.sources.{name.replace('-', '_')}").build


def check(
    root: str,
    world_size: int = 1,
    workers: int = 0,
    batch_size: int | None = None,
    frames_per_batch: int | None = None,
    samples: int = 4,
    splits: list[str] | None = None,
    checksums: bool = True,
    json: Path | None = None,
    processes: int | None = None,
) -> None:
    """Looks for everything in a folder of shards that would stop, hang or spoil a job, before the job starts.

    Exits with 0 for data that are ready, else with 2 and a line for each problem.

    Example:
        facebench data check data/demo/talking --world-size 8 --workers 4 --batch-size 4

    Args:
        root: folder of shards.
        world_size: processes that will train together (nodes times devices).
        workers: data workers of each.
        batch_size: samples in a batch of each; by default 8.
        frames_per_batch: instead of --batch-size, the bound on a batch's frames.
        samples: samples of each shard to decode, evenly spread; 0 for all of them.
        splits: those the job will use; by default train, val and test.
        checksums: whether to read every byte; without it a damaged shard of the right size can pass.
        json: file for the same findings as JSON.
        processes: shards to check at the same time, by default one per core.
    """
    from datamodules.doctor import examine, print_report
    from datamodules.shards import write_atomic

    report = examine(
        root,
        world_size=world_size,
        workers=workers,
        batch_size=batch_size,
        frames_per_batch=frames_per_batch,
        samples=samples,
        splits=splits,
        checksums=checksums,
        processes=processes,
    )
    print_report(report)
    if json is not None:
        write_atomic(json, report.as_json())
    if report.problems:
        count = len(report.problems)
        raise UserError(f"{root}: not ready, {count} problem{'s' if count > 1 else ''} listed above")


def show(root: str, split: str = "train", samples: int = 8, out: Path = Path("sheet.png")) -> None:
    """Prints a few samples and draws them: images with labels and masks, meshes with their speech.

    Example:
        facebench data show data/demo/talking --split val --out sheet.html

    Args:
        root: folder of shards.
        split: whose samples.
        samples: how many, evenly spread over the split.
        out: a name in .png for a picture, or in .html for one page with sound.
    """
    from datamodules.show import print_samples, write_sheet

    if out.suffix not in (".png", ".html"):
        raise UserError(f"--out {out}: expected a name that ends in .png or .html")
    if samples < 1:
        raise UserError(f"--samples {samples}: expected at least 1")
    print_samples(write_sheet(root, split, samples, out))
    print(f"written: {out}")


def features(
    root: str,
    backbone: str,
    kind: str | None = None,
    alignment: Literal["native", "interpolate", "pairs"] = "native",
    name: str | None = None,
    precision: Literal["float16", "float32"] = "float16",
    processes: int | None = None,
) -> None:
    """Runs a backbone over a data set once and stores what it gives beside the shards, as a column.

    A system with a frozen encoder reads the column instead of computing, when data.columns lists it. A run that was
    interrupted goes on where it stopped.

    Example:
        facebench data features data/demo/talking --backbone demo:speech --alignment interpolate

    Args:
        root: folder of shards.
        backbone: demo:NAME, path:FILE or hub:NAME.
        kind: of the backbone; needed for a hub name on faces, and clip for the transcripts of talking heads.
        alignment: how speech features meet frames; interpolate or pairs for FaceFormer, native for VOCA.
        name: of the column; by default the backbone's and the alignment.
        precision: of the stored numbers.
        processes: parallel processes, by default one per core or graphics card.
    """
    from trainers.features import write_features

    column = write_features(root, backbone, kind, alignment, name, precision, processes)
    dims = " x ".join(map(str, column.dims))
    print(f"column '{column.name}': {dims} {column.dtype}; use it by --data.init_args.columns '[{column.name}]'")


TOOLS: dict[str, Callable[..., None]] = {"check": check, "show": show, "features": features}


def main(args: list[str]) -> None:
    """The first argument names a data set to build, or what to do with a built one, whose folder may follow."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: facebench data NAME [--root OFFICIAL_DIR] --out DIR ...\n\nNAME is one of:")
        print("\n".join(f"  {name:<14} {what}" for name, what in SOURCES.items()))
        print("\nor: facebench data TOOL DIR ...\n\nTOOL is one of: " + ", ".join(TOOLS))
        print("\n'facebench data NAME --help' says more.")
        return
    if args[0] in TOOLS:
        tool, *rest = args
        if rest and not rest[0].startswith("-"):
            rest = ["--root", *rest]
        run_command(TOOLS[tool], f"facebench data {tool}", rest)
        return
    if args[0] not in SOURCES:
        raise UserError(f"no data set '{args[0]}'; known: {', '.join(SOURCES)}; tools: {', '.join(TOOLS)}")
    run_command(source(args[0]), f"facebench data {args[0]}", args[1:])
