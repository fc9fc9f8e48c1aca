"""``facebench VERB ...``: the command line. Each verb is one file beside this one."""

import importlib
import sys

VERBS = {
    "data": "build, inspect and list data sets",
    "systems": "list the systems: task, paper, year, status",
    "fit": "train a system in a run folder (and resume it)",
    "validate": "validate a trained system",
    "test": "test a trained system",
    "predict": "write a trained system's predictions",
    "convert": "official weights to a run that predicts and is scored",
    "score": "score predictions under a protocol",
    "protocols": "list, show and compare the protocols; convert between lip vertex errors",
    "bench": "run a suite: systems x data x seeds",
    "report": "write the leaderboard page of a suite's results",
    "animate": "speech in, talking head out",
    "edit": "image in, strip of edits out",
}
SHARED = {"fit": "run", "validate": "run", "test": "run", "predict": "run"}  # four verbs of one LightningCLI

HELP = """usage: facebench [--debug] VERB ...

Train, tune and compare text-to-face, face-editing and speech-driven 3D face systems under one protocol.

verbs:
{verbs}

options:
  --debug      show the traceback of an error
  --version    print the version

example:
  facebench data demo --out data/demo
  facebench fit --config configs/demo/faceformer.yaml --run runs/faceformer
  facebench animate --checkpoint runs/faceformer/checkpoints/last.ckpt --audio speech.wav --out talk.mp4

'facebench VERB --help' says more."""


def main(argv: list[str] | None = None) -> int:
    """Runs one verb; returns the exit code (2 for a mistake of the user's)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    if debug:
        args.remove("--debug")
    if not args or args[0] in ("-h", "--help"):
        print(HELP.format(verbs="\n".join(f"  {verb:<12} {what}" for verb, what in VERBS.items())))
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"facebench {version('facebench')}")
        return 0
    verb, *rest = args
    if verb not in VERBS:
        print(f"facebench: no verb '{verb}'; known: {', '.join(VERBS)}", file=sys.stderr)
        return 2

    module = importlib.import_module(f"facebench.{SHARED.get(verb, verb)}")
    from datamodules.errors import UserError

    try:
        module.main([verb, *rest] if verb in SHARED else rest)
    except UserError as error:
        if debug:
            raise
        print(f"facebench {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"facebench {verb}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
