"""The command line: finds the command, runs it, and turns what went wrong into one line and an exit code.

Nothing heavy is imported before a command is known, so that `talk3d --help` is instant.
Exit codes: 0 done, 2 something the user can mend, 130 interrupted.
"""

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from talk3d import __version__
from talk3d.errors import Talk3DError

SUMMARIES = {
    "demo": "the shipped avatar speaks the shipped sentence: writes demo.mp4",
    "build": "a video in, an avatar out: track, personalize and train in one, resumable",
    "animate": "an avatar speaks any recording, seen from any camera",
    "check": "says what is wrong with a video, and what to do, before anything is learnt from it",
    "track": "a video in, a clip out: sound, face, head pose, crop and masks per frame",
    "personalize": "a clip in, a person out: the prior learns this one head",
    "train": "a person and a clip in, an avatar out: the head learns to talk",
    "evaluate": "measures an avatar on the part of a clip it never saw",
    "compare": "ranks avatars, and films of other systems, on the same part of a clip",
    "export": "hands an avatar to other programs: a mesh of the head, ONNX graphs",
    "pretrain": "many heads in, a prior out: what `personalize` starts from",
    "weights": "optional networks of others: list, fetch, verify; import published generators",
    "prior": "show: random people, an orbit, depth, normals and a mesh of a prior",
    "doctor": "says what is installed, and what is missing",
}
EXAMPLES = {
    "check": "talk3d check me.mp4\n  talk3d check me.mp4 -o me.json",
    "track": "talk3d track me.mp4 -o me.clip",
    "personalize": "talk3d personalize me.clip -o me.person.t3d",
    "train": "talk3d train me.person.t3d me.clip -o me.t3d\n  talk3d train me.person.t3d me.clip -o quick.t3d --steps 500",
    "build": "talk3d build me.mp4 -o me.t3d\n  talk3d build me.mp4 -o me.t3d --train.steps 2000        (only training runs again)\n"
    "  talk3d build me.mp4 -o me.t3d --fresh                   (start over)",
    "animate": "talk3d animate me.t3d speech.wav -o talking.mp4\n  talk3d animate me.t3d film.mp4 -o turning.mp4 --camera orbit\n"
    "  talk3d animate me.t3d speech.wav -o whole.mp4 --paste-into me.build/clip\n  talk3d animate me.t3d hour.mp3 -o hour.mp4 --resume\n"
    "  talk3d animate me.t3d speech.wav -o cut_out.mov --background transparent",
    "evaluate": "talk3d evaluate me.t3d me.clip -o report.html\n  talk3d evaluate me.t3d me.clip -o report.json --no-controls",
    "compare": "talk3d compare me.t3d quick.t3d other_system.mp4 --clip me.clip -o compared.html",
    "export": "talk3d export me.t3d --mesh head.glb\n  talk3d export me.t3d --onnx graphs",
    "pretrain": "talk3d pretrain heads/ -o prior.t3d\n  talk3d pretrain photos.zip -o prior.t3d --mode adversarial --sheets sheets",
    "prior": "talk3d prior show builtin -o shown\n  talk3d prior show prior.t3d -o shown --seed 3 --mesh-format ply",
    "demo": "talk3d demo\n  talk3d demo -o elsewhere.mp4",
    "weights": "talk3d weights list\n  talk3d weights fetch lpips-alex arcface\n  talk3d weights verify\n"
    "  talk3d weights import ffhq512-128.pkl -o prior.t3d --axes fixed\n  talk3d weights import 19_80000.pt -o talk3d.t3d",
    "doctor": "talk3d doctor",
}
OVERVIEW = f"""talk3d {__version__}: a short video of one person talking in, a talking 3D avatar out.

usage: talk3d COMMAND …        talk3d COMMAND --help

{chr(10).join(f"  {name:12} {summary}" for name, summary in SUMMARIES.items())}

examples:
  talk3d demo
  talk3d build me.mp4 -o me.t3d
  talk3d animate me.t3d speech.wav -o talking.mp4 --camera orbit
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the command and its arguments; those of the process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW, end="")
        return 0
    if arguments[0] in ("--version", "-V"):
        print(f"talk3d {__version__}")
        return 0
    name = arguments[0]
    if name not in SUMMARIES:
        close = difflib.get_close_matches(name, SUMMARIES, n=1)
        return _fail(f"there is no command {name!r}" + (f": did you mean {close[0]}?" if close else f": choose one of {', '.join(SUMMARIES)}"))
    return _run(name, arguments[1:])


def _run(name: str, arguments: list[str]) -> int:
    """Run a command that exists; what a user can mend becomes one line on the standard error."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait actively crawl wherever another program runs; read as torch is imported
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("talk3d.apps.commands").run(name, arguments, EXAMPLES[name])
    except Talk3DError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "talk3d"):
            raise
        return _fail(f"this needs the package {missing}, which is not installed: pip install {missing}")
    except BrokenPipeError:  # whoever reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print(f"\ntalk3d: interrupted, nothing half-written; {_how_to_go_on(name)}", file=sys.stderr)
        return 130
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 2
    return 0


def _how_to_go_on(name: str) -> str:
    if name in ("build", "personalize", "train", "pretrain"):
        return "run the same command again to go on from the last checkpoint"
    if name == "animate":
        return "run the same command with --resume to go on after the frames that are written, if any"
    return "run the same command again to start over"


def _fail(message: str) -> int:
    print(f"talk3d: {' '.join(message.split())}", file=sys.stderr)
    return 2
