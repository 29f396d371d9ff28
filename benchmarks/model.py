"""Time of each part of the model for a frame: plain, with what depends on the person computed once (cached), and that compiled.

    python benchmarks/model.py --device cuda
    python benchmarks/model.py --batches 1 --repeats 1 --no-compile        # a reduced run for CPUs

Weights are random: they do not change the time. Writes benchmarks/results/DEVICE.json and prints its table. Needs torch, numpy and jaxtyping,
nothing else of the package's dependencies.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from talk3d.models import deltaplane
from talk3d.models.avatar import RELEASED, AvatarConfig
from talk3d.models.deltaplane import DeltaplanePredictor
from talk3d.models.generator import GeneratorConfig, TriplaneGenerator
from talk3d.ops.geometry import head_camera
from talk3d.ops.planes import roll_out
from talk3d.presets import FFHQ512, TINY, TINY_AVATAR
from talk3d.types import Triplane

RESULTS = Path(__file__).parent / "results"
SIZES: dict[str, tuple[GeneratorConfig, AvatarConfig]] = {"FFHQ512": (FFHQ512, RELEASED), "TINY": (TINY, TINY_AVATAR)}
ONCE_A_PERSON = ("mapping", "backbone", "U-Net prefix")
"""Parts that cached frames do without."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the model as a function of tensors: as it is, and, if the person's share can be taken out, what then remains."""

    plain: Callable[[], Any]
    cached: Callable[..., Any]
    inputs: tuple[Any, ...] = ()


def plain_roll_out(planes: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], order: Any) -> list[Tensor]:
    """Roll out, then convolve all that came of it."""
    return [F.conv2d(x, weight, bias, padding=1) for x, weight, bias in zip(roll_out(planes, order).unbind(1), weights, biases, strict=True)]


def unsplit(part: Callable[[], Any]) -> Callable[[], Any]:
    """Run a part of the U-Net without the split of its roll-out convolutions."""

    def run() -> Any:
        with patch.object(deltaplane, "convolve_rolled_out", plain_roll_out):
            return part()

    return run


def make_parts(size: str, batch: int, device: str) -> dict[str, Part]:
    """Build the model at this size and return its parts in the order of the data, fed with what comes before them."""
    sizes, avatar = SIZES[size]
    torch.manual_seed(0)
    with torch.device(device):
        generator = TriplaneGenerator(sizes).eval()
        predictor = DeltaplanePredictor(avatar.deltaplane).eval()
        z, label = torch.randn(1, sizes.z_dim), torch.randn(1, 25) if sizes.c_dim else None
        tokens = torch.randn(batch, 5, avatar.deltaplane.token_width)
        coefficients = torch.randn(batch, avatar.deltaplane.num_bases + avatar.deltaplane.num_near)
    for parameter in predictor.parameters():
        if not parameter.any():  # what starts at zero would hide differences
            torch.nn.init.normal_(parameter, std=0.1)
    camera = head_camera(0.2 * torch.randn(batch, 3)).to(device)
    side = sizes.renderer.neural_rendering_resolution
    ws = generator.mapping(z, label)
    identity = generator.triplane(ws)
    prefix = predictor.prepare(identity)
    delta = predictor.predict(prefix, tokens, coefficients).planes
    rays = generator.rays(camera, side)

    def render(planes: Tensor) -> tuple[Tensor, Tensor]:
        features, alpha, _ = generator.render_rays(Triplane(planes=planes, axes=identity.axes), rays)
        features, alpha = (x.transpose(1, 2).unflatten(2, (side, side)) for x in (features, alpha))  # b c h w
        return 2 * features - 1, alpha

    features, alpha = render(identity.planes + delta)
    repeated, styles, many = ws.expand(batch, -1, -1), ws[:, -1].expand(batch, -1).clone(), (z.expand(batch, -1), label)
    many = (many[0], None if label is None else label.expand(batch, -1))
    return {
        "mapping": Part(plain=lambda: generator.mapping(*many), cached=lambda: None),
        "backbone": Part(plain=lambda: generator.triplane(repeated.clone()), cached=lambda: None),
        "U-Net prefix": Part(plain=unsplit(lambda: [predictor.prepare(identity) for _ in range(batch)]), cached=lambda: None),
        "U-Net rest": Part(
            plain=unsplit(lambda: predictor.predict(prefix, tokens, coefficients).planes),
            cached=lambda t, c: predictor.predict(prefix, t, c).planes,
            inputs=(tokens, coefficients),
        ),
        "volume rendering": Part(plain=lambda: render(identity.planes + delta), cached=render, inputs=(identity.planes + delta,)),
        "super-resolution": Part(
            plain=lambda: generator.superresolution(features, alpha, styles),
            cached=lambda f, a: generator.superresolution(f, a, ws[:, -1]),
            inputs=(features, alpha),
        ),
    }


def seconds(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median time of a run after one that warms up; on one CPU thread the thread's own time, which other work does not disturb."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    times = []
    for number in range(repeats + 1):
        wait()
        start = clock()
        run()
        wait()
        times.append(clock() - start)
        if number == 0 and not device.startswith("cuda") and repeats == 1 and times[0] > 5:
            return times[0]  # a long run on a CPU needs no warming up
    return median(times[1:])


def largest_difference(found: Any, expected: Any) -> float:
    """Largest absolute difference of two results, which are tensors or tuples of them."""
    pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs)


def measure(size: str, batch: int, device: str, repeats: int, compile_until: float) -> dict[str, dict[str, Any]]:
    """Time every part; what is compiled after `compile_until` (of the monotonic clock) is left out."""
    measured: dict[str, dict[str, Any]] = {}
    for name, part in make_parts(size, batch, device).items():
        row: dict[str, Any] = {"plain_s": seconds(part.plain, device, repeats)}
        if name in ONCE_A_PERSON:
            row |= {"cached_s": 0.0, "compiled_s": 0.0}
        else:
            row["cached_s"] = seconds(lambda part=part: part.cached(*part.inputs), device, repeats)
            row["difference"] = largest_difference(part.cached(*part.inputs), part.plain())
            if time.monotonic() < compile_until:
                torch.compiler.reset()
                fast = torch.compile(part.cached, dynamic=False)
                row["compiled_s"] = seconds(lambda fast=fast, part=part: fast(*part.inputs), device, repeats)
                row["compiled_difference"] = largest_difference(fast(*part.inputs), part.plain())
        measured[name] = row
        print(f"batch {batch} {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    return measured


def table(parts: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Milliseconds a frame, as markdown; the last row sums the parts, with how many times faster than plain it is."""
    lines = ["| batch | part | plain | cached | compiled |", "| ---: | --- | ---: | ---: | ---: |"]
    for batch, rows in parts.items():
        sums = {key: sum(row.get(key, float("nan")) for row in rows.values()) / int(batch) * 1e3 for key in ("plain_s", "cached_s", "compiled_s")}
        for name, row in rows.items():
            cells = [f"{row[key] / int(batch) * 1e3:.2f}" if key in row else "not measured" for key in sums]
            lines.append(f"| {batch} | {name} | {' | '.join(cells)} |")
        cells = [f"{value:.2f} ({sums['plain_s'] / value:.2f} times)" if value == value else "not measured" for value in sums.values()]
        lines.append(f"| {batch} | **frame** | {' | '.join(cells)} |")
    return "\n".join(lines)


def surroundings(device: str, commit: str | None) -> dict[str, Any]:
    """Name hardware, versions and commit."""
    if commit is None:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or "unknown"
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return {
        "hardware": torch.cuda.get_device_name() if device.startswith("cuda") else f"{model}, {torch.get_num_threads()} threads",
        "commit": commit,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="FFHQ512")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=10, help="runs after the first; their median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--tf32", action="store_true", help="let the GPU round factors to 10 bits, which is faster and not exact")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--compile-budget-s", type=float, default=150, help="no part is compiled that starts later than this")
    parser.add_argument("--commit", help="named in the results; by default asked of git")
    parser.add_argument("--out", type=Path, help="where the results go")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = chosen.tf32
    compile_until = time.monotonic() + chosen.compile_budget_s if chosen.compile else 0.0
    with torch.no_grad():
        parts = {str(batch): measure(chosen.size, batch, chosen.device, chosen.repeats, compile_until) for batch in chosen.batches}
    result = {"size": chosen.size, "tf32": chosen.tf32, "repeats": chosen.repeats, **surroundings(chosen.device, chosen.commit), "seconds": parts}
    if chosen.device.startswith("cuda"):
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    path = chosen.out or RESULTS / f"{chosen.device.partition(':')[0]}{'_tf32' * chosen.tf32}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nmilliseconds a frame, {chosen.size}, {result['hardware']}, torch {result['torch']}, commit {result['commit']}\n\n{table(parts)}")


if __name__ == "__main__":
    main()
