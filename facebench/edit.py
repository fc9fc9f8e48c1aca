"""``facebench edit``: an image in, a strip of edits out."""

from pathlib import Path

from facebench.command import run_command


def edit(
    checkpoint: Path,
    image: Path,
    out: Path,
    attribute: list[str] | None = None,
    remove: bool = False,
    strengths: list[float] | None = None,
    scale: int = 2,
) -> None:
    """Edits attributes of a face: a row for each, from the photo over its inversion to ever stronger edits.

    The photo is cropped to its central square and scaled to the generator's size.

    Example:
        facebench edit --checkpoint runs/adatrans/checkpoints/last.ckpt --image face.png \\
          --attribute '[Eyeglasses]' --out edits.png

    Args:
        checkpoint: of a face-editing system.
        image: the photo.
        out: the PNG to write.
        attribute: which attributes; by default all that the system edits.
        remove: take the attributes away instead of giving them.
        strengths: by default those of the system's benchmark.
        scale: enlarges the strip.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps, UnidentifiedImageError

    from datamodules.draw import png_bytes
    from datamodules.errors import UserError
    from datamodules.shards import write_atomic
    from trainers.tasks import FaceEditing, load_system

    system = load_system(checkpoint)
    if not isinstance(system, FaceEditing):
        raise UserError(f"{checkpoint}: a {system.info.task} system; 'edit' needs a face-editing system")
    names = attribute or system.attributes
    for name in names:
        system.check_attribute(name)
    if not image.is_file():
        raise UserError(f"{image}: no such image")
    size = system.generator.resolution
    try:
        with Image.open(image) as opened:
            photo = ImageOps.fit(ImageOps.exif_transpose(opened).convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{image}: not an image that can be read ({error})") from error

    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        w_plus = system.invert(pixels)
        inversion = system.synthesise(w_plus)
        target = torch.full((1,), -1.0 if remove else 1.0)
        rows = [
            torch.cat(
                [pixels, inversion]
                + [system.synthesise(system.edit(w_plus, name, target, s)) for s in strengths or system.strengths]
            )
            for name in names
        ]
    strip = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    image_bytes = ((strip + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    write_atomic(out, png_bytes(image_bytes.repeat(scale, axis=0).repeat(scale, axis=1)))
    print(f"written: {out} (rows: {', '.join(names)}; columns: photo, inversion, rising strength)")


def main(args: list[str]) -> None:
    """Parses the arguments and runs the verb."""
    run_command(edit, "facebench edit", args)
