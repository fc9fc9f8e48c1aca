"""``facebench animate``: speech in, talking head out."""

from dataclasses import replace
from pathlib import Path

from facebench.command import run_command


def animate(
    checkpoint: Path,
    audio: Path,
    out: Path,
    data: str = "data/demo/talking",
    subject: str | None = None,
    style: str | None = None,
    emotion: str | None = None,
    intensity: int | None = None,
    words: Path | None = None,
    transcript: str | None = None,
    prompt: str | None = None,
    prompt_image: Path | None = None,
    reference: list[str] | None = None,
    template: Path | None = None,
    vertices: Path | None = None,
    mesh: Path | None = None,
    controls: Path | None = None,
    size: int = 256,
    chunk: float = 60.0,
) -> None:
    """Animates a head by a recording: writes an mp4 with sound, the vertices, and files that animators open.

    A system that turns the head as well gets a .pose.npy beside the mp4: (T, 3) rotation vectors in radians.

    Reads wav, flac, mp3 and ogg at any rate, mono or stereo, of any length. 'facebench systems' lists what a system
    takes beside sound.

    Example:
        facebench animate --checkpoint runs/faceformer/checkpoints/last.ckpt --audio speech.wav --out talk.mp4
        ... --emotion happy --intensity 2 --mesh talk.glb
        ... --reference '[F6_test-001_neutral_0, F6_test-002_sad_1]'

    Args:
        checkpoint: of a speech-to-mesh system.
        audio: the recording.
        out: the mp4 to write; a system that knows no mesh writes its controls alone.
        data: talking-head shards: their frame rate, and the neutral meshes and looks of their subjects.
        subject: whose head; by default the data's first subject.
        style: which training subject's speaking style; by default the subject's own, or the system's policy.
        emotion: its name; by default neutral.
        intensity: of the emotion: 0, 1 or 2.
        words: TextGrid or CSV file of what is said when.
        transcript: what is said, where no word times are known.
        prompt: how to speak, in words: "with a broad smile".
        prompt_image: picture of a face with the expression to speak with.
        reference: keys of clips in the data, of one person, to adapt to first.
        template: a mesh file (obj, ply, stl) to animate instead of a subject of the data.
        vertices: npy file for the vertices, (T, V, 3) float32 in metres; by default beside the mp4.
        mesh: .glb file (morph targets) for the moving mesh, or a folder for one OBJ for each frame.
        controls: .csv file (ARKit curves) or .npy file (T, C) for the rig's controls.
        size: height and width of the video in pixels.
        chunk: seconds that are animated at once; longer recordings are cut into overlapping pieces.
    """
    import numpy as np
    import torch

    from datamodules.animation_files import arkit_names, morph_targets, write_arkit_csv, write_glb, write_obj_frames
    from datamodules.audio import SAMPLE_RATE, read_audio
    from datamodules.draw import drawer, mesh_drawer
    from datamodules.errors import UserError
    from datamodules.render import Camera
    from datamodules.shards import npy_bytes, write_atomic
    from datamodules.speech import SpeechDataModule
    from datamodules.words import read_words
    from sweeps.media import write_video
    from trainers.animation import Conditions, check_conditions, move, reference_of, request
    from trainers.tasks import SpeechToMesh, SpeechToRig, load_system

    samples = read_audio(audio)
    if out.suffix != ".mp4":
        raise UserError(f"--out {out}: expected a name that ends in .mp4")
    if chunk < 5:
        raise UserError(f"--chunk {chunk:g}: expected at least 5 seconds")
    system = load_system(checkpoint)
    if not isinstance(system, SpeechToMesh):
        raise UserError(f"{checkpoint}: a {system.info.task} system; 'animate' needs a speech-to-mesh system")
    if controls is not None and not isinstance(system, SpeechToRig):
        raise UserError(
            f"--controls {controls}: {system.info.title} moves vertices, not a rig's controls; leave it out"
        )
    if controls is not None and controls.suffix not in (".csv", ".npy"):
        raise UserError(f"--controls {controls}: expected a name that ends in .csv or .npy")
    if controls is not None and controls.suffix == ".csv" and isinstance(system, SpeechToRig):
        arkit_names(controls, system.rig.controls)
    meshless = not system.num_vertices
    if meshless and (controls is None or mesh is not None or template is not None):
        raise UserError(
            f"{checkpoint}: this {system.info.title} moves a rig's controls and knows no mesh; give --controls, and "
            "neither --mesh nor --template"
        )
    timed = None if words is None else read_words(words)
    given = Conditions(style, emotion, intensity, transcript, timed, prompt, prompt_image)
    check_conditions(system, given, reference=bool(reference))

    module = SpeechDataModule(data, batch_size=1)
    system.check_frame_rate(module)
    draw = None
    if meshless:
        neutral, triangles = torch.zeros(0, 3), np.zeros((0, 3), np.int64)
    elif template is not None:
        import trimesh

        try:
            loaded = trimesh.load_mesh(template, process=False)
        except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(f"--template {template}: not a readable mesh ({error}); give an obj, ply or stl") from error
        if not isinstance(loaded, trimesh.Trimesh) or not len(loaded.vertices):
            raise UserError(f"--template {template}: expected one mesh; merge its parts first")
        neutral, triangles = torch.tensor(np.asarray(loaded.vertices), dtype=torch.float32), np.asarray(loaded.faces)
        centre, extent = loaded.bounds.mean(0), np.ptp(loaded.bounds, axis=0).max()
        draw = mesh_drawer(triangles, Camera(tuple(centre), 4 * extent, 1.1 * extent), size)
    else:
        subject = subject or next(iter(module.templates))
        if subject not in module.templates:
            raise UserError(f"--subject {subject}: unknown; {data} holds {', '.join(module.templates)}")
        neutral, triangles = module.templates[subject], module.topology["triangles"]
        draw = drawer(module, subject, size)
    if len(neutral) != system.num_vertices:
        raise UserError(
            f"{template or data}: a mesh of {len(neutral)} vertices, but {checkpoint} was trained on "
            f"{system.num_vertices}; give a mesh of that topology"
        )

    if reference:
        if module.num_vertices != system.num_vertices:
            raise UserError(
                f"--data {data}: meshes of {module.num_vertices} vertices, so no reference for {checkpoint}"
            )
        if isinstance(system, SpeechToRig):
            system.check_controls(module)
        system = system.adapt(reference_of(system, module, reference))
    if style is None and not reference and subject in system.subjects:
        given = replace(given, subject=subject)
    motion = move(system, request(system, audio.stem, samples, neutral, module.fps, given), module.fps, chunk)

    written = []
    if not meshless:
        written.append(vertices or out.with_suffix(".npy"))
        write_atomic(written[-1], npy_bytes(motion.vertices))
    if motion.pose is not None:
        written.append(out.with_suffix(".pose.npy"))
        write_atomic(written[-1], npy_bytes(motion.pose))
    if mesh is not None and mesh.suffix == ".glb":
        still, moved = neutral.numpy(), motion.vertices
        if motion.controls is not None and isinstance(system, SpeechToRig) and system.rig.offsets is not None:
            targets = dict(zip(system.rig.controls, system.rig.offsets.numpy(), strict=True)), motion.controls
        else:
            targets = morph_targets(moved, still)
        write_glb(mesh, still, triangles, module.fps, *targets)
        written.append(mesh)
    elif mesh is not None:
        write_obj_frames(mesh, motion.vertices, triangles)
        written.append(mesh)
    if controls is not None and motion.controls is not None and isinstance(system, SpeechToRig):
        if controls.suffix == ".csv":
            write_arkit_csv(controls, system.rig.controls, motion.controls, module.fps, motion.pose)
        else:
            write_atomic(controls, npy_bytes(motion.controls))
        written.append(controls)
    if draw is not None:
        write_video(out, [(system.info.title, motion.vertices)], draw, samples, module.fps)
        written.insert(0, out)
    seconds = len(samples) / SAMPLE_RATE
    print(f"written: {', '.join(map(str, written))} ({len(motion.vertices)} frames, {seconds:.1f} s)")


def main(args: list[str]) -> None:
    """Parses the arguments and runs the verb."""
    run_command(animate, "facebench animate", args)
