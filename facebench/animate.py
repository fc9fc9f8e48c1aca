"""``facebench animate``: speech in, talking head out."""

from pathlib import Path

from facebench.command import run_command


def animate(
    checkpoint: Path,
    audio: Path,
    out: Path,
    data: str = "data/demo/talking",
    subject: str | None = None,
    style: str | None = None,
    template: Path | None = None,
    vertices: Path | None = None,
    size: int = 256,
) -> None:
    """Animates a head by a recording: writes an mp4 with sound and the vertices of every frame.

    Reads wav, flac, mp3 and ogg at any rate, mono or stereo, of any length.

    Example:
        facebench animate --checkpoint runs/faceformer/checkpoints/last.ckpt --audio speech.wav --out talk.mp4

    Args:
        checkpoint: of a speech-to-mesh system.
        audio: the recording.
        out: the mp4 to write.
        data: talking-head shards: their frame rate, and the neutral meshes and looks of their subjects.
        subject: whose head; by default the data's first subject.
        style: which training subject's speaking style; by default the subject's own, or the system's policy.
        template: a mesh file (obj, ply, stl) to animate instead of a subject of the data.
        vertices: npy file for the vertices, (T, V, 3) float32 in metres; by default beside the mp4.
        size: height and width of the video in pixels.
    """
    import numpy as np
    import torch

    from datamodules.audio import SAMPLE_RATE, read_audio
    from datamodules.batches import SpeechBatch
    from datamodules.draw import drawer, mesh_drawer
    from datamodules.errors import UserError
    from datamodules.render import Camera
    from datamodules.shards import npy_bytes, write_atomic
    from datamodules.speech import SpeechDataModule
    from sweeps.media import write_video
    from trainers.tasks import SpeechToMesh, load_system

    samples = read_audio(audio)
    if out.suffix != ".mp4":
        raise UserError(f"--out {out}: expected a name that ends in .mp4")
    system = load_system(checkpoint)
    if not isinstance(system, SpeechToMesh):
        raise UserError(f"{checkpoint}: a {system.info.task} system; 'animate' needs a speech-to-mesh system")
    if style is not None and style not in system.subjects:
        raise UserError(f"--style {style}: unknown; this {system.info.title} knows {', '.join(system.subjects)}")

    module = SpeechDataModule(data, batch_size=1)
    if template is not None:
        import trimesh

        mesh = trimesh.load_mesh(template, process=False)
        neutral = torch.tensor(np.asarray(mesh.vertices), dtype=torch.float32)
        centre, extent = mesh.bounds.mean(0), np.ptp(mesh.bounds, axis=0).max()
        draw = mesh_drawer(np.asarray(mesh.faces), Camera(tuple(centre), 4 * extent, 1.1 * extent), size)
    else:
        subject = subject or next(iter(module.templates))
        if subject not in module.templates:
            raise UserError(f"--subject {subject}: unknown; {data} holds {', '.join(module.templates)}")
        neutral, draw = module.templates[subject], drawer(module, subject, size)
    if len(neutral) != system.num_vertices:
        raise UserError(
            f"{template or data}: a mesh of {len(neutral)} vertices, but {checkpoint} was trained on "
            f"{system.num_vertices}; give a mesh of that topology"
        )

    speaker = style or subject
    frames = max(1, round(len(samples) / SAMPLE_RATE * module.fps))
    batch = SpeechBatch(
        key=[audio.stem],
        audio=torch.from_numpy(samples)[None],
        audio_lengths=torch.tensor([len(samples)]),
        vertices=neutral.expand(1, frames, -1, -1),
        lengths=torch.tensor([frames]),
        template=neutral[None],
        subject=[speaker or "unknown"],
        subject_index=torch.tensor([system.subjects.index(speaker) if speaker in system.subjects else -1]),
        emotion=torch.zeros(1, dtype=torch.int64),
        intensity=torch.zeros(1, dtype=torch.int64),
        weights=torch.zeros(1, frames, 0),
        transcript=[""],
        words=[[]],
        phonemes=[[]],
    )
    with torch.inference_mode():
        moved = system.animate(batch)[0, :frames].numpy()
    vertices = vertices or out.with_suffix(".npy")
    write_atomic(vertices, npy_bytes(moved))
    write_video(out, [(system.info.title, moved)], draw, samples, module.fps)
    print(f"written: {out} and {vertices} ({frames} frames, {frames / module.fps:.1f} s)")


def main(args: list[str]) -> None:
    """Parses the arguments and runs the verb."""
    run_command(animate, "facebench animate", args)
