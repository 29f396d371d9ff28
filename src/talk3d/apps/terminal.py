"""Progress on a terminal: one display for a whole command, plain lines where nobody watches."""

import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from talk3d import __version__
from talk3d.io.catalogue import CATALOGUE, is_there
from talk3d.io.face_models import TASK_NAME, WHEEL, WHEEL_MEMBERS, cache_folder, find_task
from talk3d.io.weights import ASSETS

logger = logging.getLogger(__name__)


def duration(seconds: float) -> str:
    """Say a time span in its two largest useful units: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def in_one_line(box: str, command: str) -> str:
    """Say in one line what tyro says in a box of several, drawn with lines or, where the terminal has none, with dashes."""
    lines = [line.strip("│").rstrip() for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rules = [place for place, line in enumerate(lines) if line and not line.strip(" ─-")]
    if "╭" not in box and rules:  # the title is a line of its own, with a rule
        lines, rules = lines[rules[0] + 1 :], [place - rules[0] - 1 for place in rules[1:]]
    lines = lines[: rules[0]] if rules else lines
    indents = [len(line) - len(line.lstrip()) for line in lines]
    if lines and lines[0].strip().startswith("Missing from"):
        names = [line.strip() for line, indent in zip(lines, indents, strict=True) if indent == indents[0] + 4]
        lines = [f"missing: {'; '.join(names)}"]
    said = " ".join(" ".join(lines).split()).rstrip(".")
    return f"{said or 'this cannot be parsed'}: see talk3d {command} --help"


def _describe(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())


class _Notices(logging.Handler):
    """Hands warnings of the package to a display, each once."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.show = show
        self.shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.shown:
            self.shown.add(message)
            self.show(f"note: {message}")


class Display:
    """A `talk3d.types.Progress` that shows stage, step, losses and time left; use it with `with`."""

    def __init__(self, console: Console | None = None, *, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        """Choose where to show.

        Args:
            console: where to; the standard output if None.
            every_s: seconds between plain lines where the console is no terminal.
            clock: seconds that only grow.
        """
        self.console = console or Console()
        self.every_s, self.clock = every_s, clock
        self.stage = ""
        self.task: TaskID | None = None
        self.started_s = self.shown_s = 0.0
        self.first_step = 0
        self.notices = _Notices(self.note)
        self.bars: Progress | None = None
        if self.console.is_terminal:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("[dim]{task.fields[values]}"),
                console=self.console,
            )

    def __enter__(self) -> "Display":
        """Start drawing, and start showing what the package has to say."""
        logging.getLogger("talk3d").addHandler(self.notices)
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop drawing; what was shown stays."""
        logging.getLogger("talk3d").removeHandler(self.notices)
        if self.bars:
            self.bars.stop()

    def __call__(self, stage: str, step: int, total: int, values: Mapping[str, float]) -> None:
        """Show that `step` of `total` (0: unknown) of `stage` is done."""
        fresh = stage != self.stage
        if fresh:
            self.stage, self.started_s, self.first_step = stage, self.clock(), step
        if self.bars:
            self._draw(self.bars, step, total, values, fresh=fresh)
        elif fresh or step == total or self.clock() - self.shown_s >= self.every_s:
            self.shown_s = self.clock()
            self._print(step, total, values)

    def note(self, message: str) -> None:
        """Print one line without disturbing the display."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _draw(self, bars: Progress, step: int, total: int, values: Mapping[str, float], *, fresh: bool) -> None:
        if fresh or self.task is None:
            self.task = bars.add_task(self.stage, total=total or None, completed=step, values="")
        bars.update(self.task, total=total or None, completed=step, values=_describe(values))

    def _print(self, step: int, total: int, values: Mapping[str, float]) -> None:
        done = step - self.first_step
        left = ""
        if total and done > 0 and step < total:
            left = f"  {duration((self.clock() - self.started_s) / done * (total - step))} left"
        self.note(f"{self.stage} {step}/{total or '?'}{left}  {_describe(values)}".rstrip())


def note_findings(check: Mapping[str, Any]) -> None:
    """Say what tracking noticed about a video, and which face models it used.

    Args:
        check: of the clip.
    """
    if "landmarks" in check:
        logger.warning("the face points come from %s", check["landmarks"])
    if moved := check.get("audio_offset_applied_ms"):
        way = "forward" if moved > 0 else "back"
        logger.warning(
            "the sound is moved %s by %.0f ms to fit the lips: --audio-offset-ms 0 (build: --track.audio-offset-ms 0) leaves it", way, abs(moved)
        )
    for warning in check.get("warnings", ()):
        logger.warning("%s", warning)


def print_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], console: Console | None = None) -> None:
    """Print a small table, by default on the standard output."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if number == 0 else "right", no_wrap=number == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    (console or Console()).print(table)


PACKAGES = ("numpy", "scipy", "av", "safetensors", "ai-edge-litert", "torchmetrics", "jaxtyping", "tyro", "rich")
EXTRAS = {"mesh": ("scikit-image", "trimesh"), "onnx": ("onnx", "onnxscript"), "speech": ("transformers",), "tensorboard": ("tensorboard",)}
UNWANTED = ("torchvision", "torchaudio")


def asset(name: str) -> Path:
    """Return the path of a file that ships inside the package."""
    return ASSETS / name


def examine() -> list[tuple[str, str]]:
    """Return rows of what and found."""
    return [
        ("talk3d", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", _torch()),
        ("device for --device auto", _device()),
        ("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)),
        ("extras", "; ".join(_extra(name) for name in EXTRAS)),
        ("video encoders", _encoders()),
        ("face landmarks, better", _task()),
        ("face landmarks, offline", _registry_models()),
        ("optional networks", _optional()),
        ("assets", _assets()),
        *((name, "installed: talk3d never uses it, and its wheels often break a CPU torch") for name in UNWANTED if _version(name) != "missing"),
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _extra(name: str) -> str:
    missing = [package for package in EXTRAS[name] if _version(package) == "missing"]
    return f"{name} not there: pip install 'talk3d[{name}]'" if missing else f"{name} there"


def _torch() -> str:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return f"{torch.__version__}, {build}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _device() -> str:
    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return "cpu" if torch.version.cuda is None else "cpu: this torch could use CUDA but sees no GPU"


def _encoders() -> str:
    def state(name: str) -> str:
        return f"{name} {'yes' if name in av.codecs_available else 'missing: reinstall the package av'}"

    return ", ".join(state(name) for name in ("libx264", "aac"))


def _task() -> str:
    path = find_task()
    return (
        str(path)
        if path
        else f"not there: talk3d weights fetch face-landmarker, or put {TASK_NAME} (3.7 MB, published by MediaPipe) into {cache_folder()}"
    )


def _registry_models() -> str:
    missing = [name for name in WHEEL_MEMBERS if not (cache_folder() / name).is_file()]
    return f"fetched on first use from the package {WHEEL} (36 MB, once)" if missing else str(cache_folder())


def _optional() -> str:
    there = [name for name, entry in CATALOGUE.items() if is_there(entry)]
    missing = [name for name in CATALOGUE if name not in there]
    return f"there: {', '.join(there) or 'none'}; not there: {', '.join(missing) or 'none'} (talk3d weights list)"


def _assets() -> str:
    files = [path for path in sorted(asset(".").iterdir()) if path.suffix in (".safetensors", ".flac")]
    return ", ".join(f"{path.name} {path.stat().st_size / 2**20:.1f} MiB" for path in files) or "missing: reinstall talk3d"
