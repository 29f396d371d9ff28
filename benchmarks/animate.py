"""Where the time of an animated frame goes: the avatar as it is, the same baked, and how far the machine's limit is.

    python benchmarks/animate.py                                # the sample avatar on the CPU
    python benchmarks/animate.py --device cuda --variants       # a random avatar of the published size on a GPU, and how else it could be made
    python benchmarks/animate.py --device cuda --profile        # the kernels of each part

Every time is a median; on the CPU it is processor time, which other work hardly disturbs. PSNR is between the pictures of both, values in [0, 1].
Writes benchmarks/results/animate_DEVICE.json. A random avatar needs torch, numpy and jaxtyping only.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from model import RESULTS, make_parts, surroundings

from talk3d.models.avatar import RELEASED, Avatar, AvatarConfig, Performance, PersonalizedGenerator
from talk3d.models.baked import BakedAvatar, _Recorded
from talk3d.models.generator import GeneratorConfig, TriplaneGenerator
from talk3d.models.superresolution import BakedConv
from talk3d.ops.geometry import head_camera
from talk3d.ops.planes import project_points
from talk3d.presets import FFHQ512, TINY, TINY_AVATAR
from talk3d.types import Camera, Driving

SIZES: dict[str, tuple[GeneratorConfig, AvatarConfig]] = {"FFHQ512": (FFHQ512, RELEASED), "TINY": (TINY, TINY_AVATAR)}


def random_avatar(size: str, device: str) -> Avatar:
    """Return an avatar of this size with random weights, none of them zero."""
    sizes, config = SIZES[size]
    torch.manual_seed(0)
    generator = TriplaneGenerator(sizes).eval().with_renderer(rest_pose=(0.0, 0.0, 0.0))
    label = torch.randn(1, sizes.c_dim) if sizes.c_dim else None
    person = PersonalizedGenerator.from_generator(generator, generator.mapping(torch.randn(1, sizes.z_dim), label), {})
    side, count = sizes.renderer.superresolution.output_side, 16
    performance = Performance(
        cameras=head_camera(0.2 * torch.randn(count, 3)),
        blink=torch.rand(count, 1),
        head_pose=0.2 * torch.randn(count, 3),
        anchors=torch.rand(count, 6),
        upper_face=0.05 * torch.randn(count, 5),
    )
    background = torch.zeros(3, side, side)
    avatar = Avatar(
        personalized=person, config=config, performance=performance, background=background, audio_source="", fps=25.0, provenance={}
    ).eval()
    for parameter in avatar.predictor.parameters():
        if not parameter.any():  # what starts at zero would say nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return avatar.to(device)


def sample_avatar(device: str) -> Avatar:
    """Return the shipped avatar."""
    import talk3d

    return talk3d.load_avatar(Path(talk3d.__file__).parent / "assets" / "sample_avatar.safetensors").to(device).eval()


def moments(avatar: Avatar, start: int, batch: int) -> tuple[Driving, Camera]:
    """Return what drives some frames: the person's own motion, and noise for sound."""
    performance, device = avatar.performance, avatar.background.device
    index = (start + torch.arange(batch)) * 7 % len(performance.blink)
    audio = torch.randn(batch, 8, 16, avatar.config.conditioning.audio_channels, generator=torch.Generator().manual_seed(start))
    parts = {name: getattr(performance, name).cpu()[index].to(device) for name in ("blink", "head_pose", "anchors", "upper_face")}
    return Driving(audio=audio.to(device), **parts), performance.cameras.to("cpu")[index].to(device)


def seconds(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median time of a run after two that warm up."""
    clock, times = (time.process_time if device == "cpu" else time.perf_counter), []
    for _ in range(repeats + 2):
        if device != "cpu":
            torch.cuda.synchronize()
        start = clock()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return median(times[2:])


def recorded(work: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
    """Return the work as a CUDA graph where there is CUDA."""
    if not inputs[0].is_cuda:
        return lambda: work(*inputs)
    graph = _Recorded(work, inputs)
    return lambda kept=(graph, work, inputs): kept[0].graph.replay()  # what was recorded must outlive its graph


def works(avatar: Avatar, baked: BakedAvatar, batch: int) -> dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """Return each part of a baked frame as a function, and what comes to it from the part before."""
    driving, camera = moments(avatar, 0, batch)
    conditioner = avatar.conditioner
    tokens = conditioner(driving)
    coefficients = conditioner.coefficients(driving, conditioner.heard(tokens, driving))
    planes = baked.deltaplane(tokens, coefficients)
    features, alpha, _ = baked.renderer(planes, camera, driving.head_pose)
    return {
        "tokens": (lambda a, *_: (conditioner(driving),), (driving.audio,)),
        "deltaplane": (lambda t, c: tuple(baked.deltaplane(t, c)), (tokens, coefficients)),
        "volume rendering": (lambda *p: baked.renderer(list(p), camera, driving.head_pose), tuple(planes)),
        "super-resolution": (lambda f, a: baked.superresolution(f, a), (features, alpha)),
    }


def plain_works(avatar: Avatar, baked: BakedAvatar, batch: int) -> dict[str, Callable[[], Any]]:
    """Return each part of a plain frame, with the person's cache."""
    driving, camera = moments(avatar, 0, batch)
    person, conditioner = avatar.personalized, avatar.conditioner
    tokens = conditioner(driving)
    coefficients = conditioner.coefficients(driving, conditioner.heard(tokens, driving))
    features, alpha, _ = baked.renderer(baked.deltaplane(tokens, coefficients), camera, driving.head_pose)
    prefix = avatar.predictor.prepare(person.triplane)
    rays = person.renderer.rays(camera, person.renderer.renderer_config.neural_rendering_resolution)
    bent = person.renderer.renderer_config.bent(person.triplane + avatar.predictor.predict(prefix, tokens, coefficients), driving.head_pose)
    return {
        "tokens": lambda: conditioner(driving),
        "deltaplane": lambda: person.triplane + avatar.predictor.predict(prefix, tokens, coefficients),
        "volume rendering": lambda: person.renderer._render_occupied(bent, rays, person.occupied, None),
        "super-resolution": lambda: person.renderer.superresolution(features, alpha, person.w),
    }


def show_profile(avatar: Avatar, batch: int, top: int = 14) -> None:
    """Print the kernels that take longest in each part of a baked batch, in milliseconds a frame."""
    for name, (work, inputs) in works(avatar, BakedAvatar(avatar), batch).items():
        run = recorded(work, *inputs)
        run()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for _ in range(5):
                run()
            torch.cuda.synchronize()
        events = [event for event in profiler.key_averages() if event.self_device_time_total]
        kernels = [(event.self_device_time_total / 5e3 / batch, event.count // 5, event.key) for event in events]
        print(f"{name}: {sum(k[0] for k in kernels):.3f} ms a frame in {sum(k[1] for k in kernels)} kernels", flush=True)
        for took, count, key in sorted(kernels, reverse=True)[:top]:
            print(f"  {took:.4f} {count:4d}x {key[:150]}", flush=True)


def quality(avatar: Avatar, baked: BakedAvatar, batch: int, batches: int = 4) -> float:
    """Return the worst PSNR of a frame, baked against plain."""
    worst = []
    for number in range(batches):
        driving, camera = moments(avatar, number * batch, batch)
        found, expected = (model.render(driving, camera).image.clamp(-1, 1) / 2 for model in (baked, avatar))
        worst.append(float((-10 * (found - expected).square().flatten(1).mean(1).log10()).min()))
    return min(worst)


def limit(baked: BakedAvatar, driving: Driving, camera: Camera, device: str) -> dict[str, float]:
    """Return how much arithmetic a baked batch holds and how fast this machine does such arithmetic at best."""
    with FlopCounterMode(display=False) as counter:
        baked._compute(*(getattr(driving, part.name) for part in fields(driving)), camera.cam2world, camera.intrinsics)
    side, dtype = (768, torch.float32) if device == "cpu" else (8192, torch.float16)
    square = torch.randn(side, side, dtype=dtype, device=device)
    rate = 2 * side**3 / seconds(lambda: square @ square, device, 5)
    return {"flop": counter.get_total_flops(), "peak_flop_s": rate, "limit_s": counter.get_total_flops() / rate}


def measure(avatar: Avatar, batch: int, device: str, repeats: int) -> dict[str, Any]:
    """Time frames and parts at one batch size."""
    baked = BakedAvatar(avatar)
    driving, camera = moments(avatar, 0, batch)
    row: dict[str, Any] = {
        "plain_s": seconds(lambda: avatar.render(driving, camera), device, repeats),
        "baked_s": seconds(lambda: baked.render(driving, camera), device, repeats),
        "psnr_db": quality(avatar, baked, batch),
        "graph": bool(baked._graphs),
        "limit": limit(baked, driving, camera, device),
    }
    print(f"batch {batch}: {json.dumps(row)}", flush=True)
    fast_parts = [recorded(work, *inputs) for work, inputs in works(avatar, baked, batch).values()]
    row["parts"] = {
        name: {"plain_s": seconds(plain, device, repeats), "baked_s": seconds(fast, device, repeats)}
        for (name, plain), fast in zip(plain_works(avatar, baked, batch).items(), fast_parts, strict=True)
    }
    print(f"batch {batch}: {json.dumps(row['parts'])}", flush=True)
    return row


def measure_compiled(avatar: Avatar, batch: int, device: str, repeats: int) -> dict[str, Any]:
    """Time frames of the baked avatar compiled."""
    torch.compiler.reset()
    driving, camera = moments(avatar, 0, batch)
    start, fast = time.perf_counter(), BakedAvatar(avatar, compiled=True)
    fast.render(driving, camera)
    row: dict[str, Any] = {"compiling_s": time.perf_counter() - start, "compiled_s": seconds(lambda: fast.render(driving, camera), device, repeats)}
    row |= {"compiled_psnr_db": quality(avatar, fast, batch), "compiled": fast._compiled is not None, "compiled_graph": bool(fast._graphs)}
    print(f"batch {batch}: {json.dumps(row)}", flush=True)
    return row


class GridLookup:
    """The look-up by `grid_sample` instead, in float32, for volumes that are looked at equally often."""

    def __init__(self, baked: BakedAvatar) -> None:
        self.config, self.dtype, self.batch = baked.renderer.config, baked.renderer.dtype, 1

    def rows(self, planes: list[Tensor]) -> Tensor:
        """Stack the planes, channels-last."""
        self.batch = len(planes[0])
        return torch.stack(planes, 1).flatten(0, 1).float().contiguous(memory_format=torch.channels_last)

    def __call__(self, rows: Tensor, points: Tensor, volume: Tensor | None = None) -> Tensor:
        """Look up."""
        grid = project_points(points.view(self.batch, -1, 3), self.config.plane_axes, self.config.box_warp).flatten(0, 1).unsqueeze(1)
        found = F.grid_sample(rows, grid, align_corners=False).unflatten(0, (self.batch, 3)).sum(1).squeeze(2)  # b c n
        return found.transpose(1, 2).to(self.dtype).flatten(0, 1)


def variants(avatar: Avatar, batch: int, repeats: int) -> dict[str, float]:
    """Time a GPU's frames when parts are made in other ways."""

    def transposed(baked: BakedAvatar) -> None:
        module, w = avatar.personalized.renderer.superresolution, avatar.personalized.w
        blocks = [module.get_submodule(name) for name in ("block0", "block1")]
        first: list[Any] = [BakedConv.of_layer(block.get_submodule("conv0"), w, torch.float16, fourfold=False) for block in blocks]
        baked.superresolution.blocks = [(up, new, *rest) for (up, _, *rest), new in zip(baked.superresolution.blocks, first, strict=True)]

    def grid(baked: BakedAvatar) -> None:
        setattr(baked.renderer, "lookup", GridLookup(baked))  # noqa: B010

    def all_samples(baked: BakedAvatar) -> None:
        baked.renderer.num_coarse, baked.renderer.num_fine = 48, 24

    def fewer_samples(baked: BakedAvatar) -> None:
        baked.renderer.num_coarse, baked.renderer.num_fine = 16, 8

    times = {}
    driving, camera = moments(avatar, 0, batch)
    for change in (grid, transposed, all_samples, fewer_samples):
        baked = BakedAvatar(avatar)
        change(baked)
        times[change.__name__] = seconds(lambda baked=baked: baked.render(driving, camera), "cuda", repeats)
        print(f"{change.__name__}: {times[change.__name__] * 1e3 / batch:.2f} ms a frame, {quality(avatar, baked, batch, 1):.1f} dB", flush=True)
    return times


def published_plain(batch: int) -> float:
    """Return the seconds of a batch on the plain path of `model.py`, in float32."""
    return sum(seconds(part.plain, "cuda", 5) for part in make_parts("FFHQ512", batch, "cuda").values())


def table(parts: dict[str, Any]) -> str:
    """Milliseconds a frame, as markdown."""
    lines = ["| batch | part | plain | baked |", "| ---: | --- | ---: | ---: |"]
    for batch, row in parts.items():
        for name, times in row["parts"].items():
            lines.append(f"| {batch} | {name} | {times['plain_s'] / int(batch) * 1e3:.2f} | {times['baked_s'] / int(batch) * 1e3:.2f} |")
        plain, fast = (row[key] / int(batch) * 1e3 for key in ("plain_s", "baked_s"))
        lines.append(f"| {batch} | **frame** | {plain:.2f} | {fast:.2f} ({plain / fast:.1f} times, {row['psnr_db']:.1f} dB) |")
        lines.append(f"| {batch} | frames a second | {1e3 / plain:.0f} | {1e3 / fast:.0f} |")
        if "compiled_s" in row:
            compiled = row["compiled_s"] / int(batch) * 1e3
            lines.append(f"| {batch} | **frame**, compiled | | {compiled:.2f} ({plain / compiled:.1f} times, {row['compiled_psnr_db']:.1f} dB) |")
        lines.append(f"| {batch} | arithmetic alone | | {row['limit']['limit_s'] / int(batch) * 1e3:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=["sample", *SIZES], help="sample on the CPU, FFHQ512 elsewhere, if not given")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--profile", action="store_true", help="also print the kernels of each part (CUDA)")
    parser.add_argument("--compile", action="store_true", help="also measure the baked avatar compiled")
    parser.add_argument("--variants", action="store_true", help="also time what the parts could be made of, and model.py's plain path (CUDA)")
    parser.add_argument("--commit", help="named in the results; by default asked of git")
    parser.add_argument("--out", type=Path, help="where the results go")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    size = chosen.size or ("sample" if chosen.device == "cpu" else "FFHQ512")
    avatar = sample_avatar(chosen.device) if size == "sample" else random_avatar(size, chosen.device)
    result: dict[str, Any] = {"size": size, "repeats": chosen.repeats, **surroundings(chosen.device, chosen.commit)}
    path = chosen.out or RESULTS / f"animate_{chosen.device.partition(':')[0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    with torch.no_grad():
        result["batches"] = {}
        for batch in chosen.batches:
            if chosen.variants:
                result.setdefault("model_plain_s", {})[str(batch)] = published_plain(batch)
                print("plain path of model.py:", result["model_plain_s"], flush=True)
            result["batches"][str(batch)] = measure(avatar, batch, chosen.device, chosen.repeats)
            keep()
        print(f"\nmilliseconds a frame, {size}, {result['hardware']}, torch {result['torch']}, commit {result['commit']}\n", flush=True)
        print(table(result["batches"]), flush=True)
        largest = max(chosen.batches)
        if chosen.profile:
            show_profile(avatar, largest)
        if chosen.variants:
            result["variants_s"] = variants(avatar, largest, chosen.repeats)
            keep()
        if chosen.compile:
            for batch in chosen.batches:
                result["batches"][str(batch)] |= measure_compiled(avatar, batch, chosen.device, chosen.repeats)
                keep()
            print(table(result["batches"]), flush=True)


if __name__ == "__main__":
    main()
