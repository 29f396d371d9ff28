"""Measure how well a prior finds people whom its training never saw, from one picture and from five.

    python benchmarks/unseen_people.py SYNTHETIC_HEADS unseen
    python benchmarks/prior.py unseen [--prior builtin] [--people 50] [--device cuda] [--processes 8] [-o prior.json] [--set tuning_steps=200]

What is measured is kept in the JSON after each person; a run that was stopped goes on from there. PSNR is over the union of the true and the
rendered matte, pictures premultiplied over black. Depth is the mean absolute error of the distance along the ray where the true one is known on
the head (above the chin; of 64² rays those whose neighbourhood is on it), in shares of the head's depth.
"""

import argparse
import dataclasses
import json
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from unseen_people import FIT, HELD_OUT, VIEWS

from talk3d.io.heads import load_heads
from talk3d.io.weights import load_prior
from talk3d.metrics.image import psnr
from talk3d.models.avatar import Prior
from talk3d.ops.rays import camera_rays
from talk3d.stages.invert import Inversion, InversionConfig, Views, guess_codes, invert
from talk3d.training.losses import PictureTarget, target_from_rgba
from talk3d.types import Camera, Rendering, Triplane

HEAD_DEPTH = 0.531
"""From the tip of the nose to the back of the mean head, scene units."""
CHIN_Y = -0.21
"""Height of the mean head's chin, scene units."""
DEPTH_SIDE = 64
"""Rays a side of the depth that is compared."""
CASES = {"one view": 1, "five views": len(FIT)}


@dataclasses.dataclass(frozen=True)
class Person:
    """All pictures of one person, in the order of `VIEWS`."""

    target: PictureTarget
    cameras: Camera
    depth: torch.Tensor  # n h w, 0 where nothing is

    def views(self, count: int) -> Views:
        """Return the first pictures as what an inversion may see."""
        part = PictureTarget(image=self.target.image[:count], alpha=self.target.alpha[:count])
        return Views(target=part, cameras=self.cameras[:count], moment=torch.zeros(count, dtype=torch.long))


def load_people(folder: Path, side: int) -> list[Person]:
    """Read what `unseen_people.py` wrote."""
    heads, depth, size = load_heads(folder, side), torch.from_numpy(np.load(folder / "depth.npy")).float(), len(VIEWS)
    people = []
    for first in range(0, len(heads.images), size):
        rgba = heads.images[first : first + size].permute(0, 3, 1, 2).float() / 255
        people.append(Person(target_from_rgba(rgba), heads.cameras[first : first + size], depth[first : first + size]))
    return people


def render_all(head: Inversion, cameras: Camera, device: str, rays: int) -> Rendering:
    """Render one head from all cameras, one after the other."""
    generator, rows = head.generator.to(device), head.person.to(device)
    with torch.no_grad():
        painted = generator.triplane(rows)
        planes = Triplane(planes=painted.planes + head.own.to(device), axes=painted.axes)
        one = {"neural_rendering_resolution": rays}
        parts = [generator.render_triplane(planes, rows[:, -1], cameras[i : i + 1].to(device), **one) for i in range(len(cameras))]
    fields = {field.name: torch.cat([getattr(part, field.name) for part in parts]).cpu() for field in dataclasses.fields(Rendering)}
    return Rendering(**fields)


def depth_errors(rendering: Rendering, person: Person) -> np.ndarray:
    """Mean absolute error of depth in every view, shares of the head's depth."""
    side = rendering.depth.shape[-1]
    cells = person.depth.unflatten(1, (side, -1)).unflatten(3, (side, -1)).transpose(2, 3).flatten(3)  # n h w (k k)
    inside = (cells > 0).all(-1) & (cells.amax(-1) - cells.amin(-1) < 0.05)
    truth = cells.median(-1).values
    rays = camera_rays(person.cameras, side, 2.0, 3.5)
    height = (rays.origins + truth.flatten(1)[..., None] * rays.directions)[..., 1].view_as(truth)
    head = (inside & (height > CHIN_Y)).float()
    error = (rendering.depth[:, 0] - truth).abs() * head
    return (error.sum((1, 2)) / head.sum((1, 2)) / HEAD_DEPTH).numpy()


def scores(head: Inversion, person: Person, device: str, rays: int) -> tuple[dict[str, list[float]], torch.Tensor]:
    """PSNR and depth error of every view, and the pictures."""
    rendering = render_all(head, person.cameras, device, rays)
    shape = render_all(head, person.cameras, device, DEPTH_SIDE)
    mask = torch.maximum(person.target.alpha, rendering.alpha.clamp(0, 1))
    found = psnr(((rendering.image + 1) / 2).clamp(0, 1), (person.target.image + 1) / 2, mask)
    return {"psnr": found.tolist(), "depth": depth_errors(shape, person).tolist()}, rendering.image.clamp(-1, 1)


_state: dict[str, object] = {}


def prepare(prior: str, folder: Path, config: InversionConfig, device: str, begun: "Synchronized[int]") -> None:
    """Load what every person needs, once in each process; the processes share all GPUs."""
    torch.set_num_threads(1)
    with begun:
        begun.value += 1
        if device == "cuda":
            torch.cuda.set_device(begun.value % torch.cuda.device_count())
    loaded = load_prior(prior)
    side = loaded.generator.renderer_config.superresolution.output_side
    _state.update(prior=loaded, people=load_people(folder, side), config=config, device=device)


def measure(index: int) -> tuple[dict[str, dict[str, list[float]]], np.ndarray]:
    """Find one person in all cases; return the scores, and the held-out views as pictures: truth, then each case, one row each."""
    prior, config, device = _state["prior"], _state["config"], _state["device"]
    assert isinstance(prior, Prior) and isinstance(config, InversionConfig) and isinstance(device, str)
    person = _state["people"][index]  # pyright: ignore
    rays = config.rays or prior.generator.renderer_config.superresolution.input_side  # as many as were compared
    results, strips = {}, [person.target.image]
    for name, count in CASES.items():
        views = person.views(count)
        guess = guess_codes(prior, views)[:, None].expand(-1, prior.generator.num_ws, -1)
        guessed = Inversion(generator=prior.generator, own=torch.zeros(1, 3, 1, 1, 1), person=guess[:1], moments=guess, drift=0.0)
        results[f"{name}, guess"], _ = scores(guessed, person, device, rays)
        prior.generator.to("cpu")
        inversion = invert(prior, views, config, device=device)
        results[name], pictures = scores(inversion, person, device, rays)
        strips.append(pictures)
    rows = [torch.cat(list(strip[[0, *range(len(FIT), len(VIEWS))]]), -1) for strip in strips]
    picture = torch.cat(rows, -2).permute(1, 2, 0)  # h w c
    return results, ((picture + 1) * 127.5).round().byte().numpy()


def table(results: list[dict[str, dict[str, list[float]]]]) -> str:
    """The card's table: means over people."""
    columns = ["case", "PSNR seen", "PSNR held out", "worst view", *(f"{y:+d}° {p:+d}°" for y, p in HELD_OUT), "depth front", "depth held out"]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for case in results[0]:
        decibels = np.array([result[case]["psnr"] for result in results])
        depth = 100 * np.array([result[case]["depth"] for result in results])
        seen = decibels[:, : CASES[case.removesuffix(", guess")]].mean()
        held_out = decibels[:, len(FIT) :]
        cells = [f"{seen:.2f}", f"{held_out.mean():.2f}", f"{held_out.mean(0).min():.2f}", *(f"{x:.2f}" for x in held_out.mean(0))]
        cells += [f"{depth[:, 0].mean():.2f} %", f"{depth[:, len(FIT) :].mean():.2f} %"]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def done_before(out: Path, facts: Mapping[str, object]) -> list[dict[str, dict[str, list[float]]]]:
    """Return the results of people whom a stopped run with the same settings had measured."""
    if not out.is_file():
        return []
    found = json.loads(out.read_text())
    results = found.pop("results")
    if found != json.loads(json.dumps(facts)):
        raise SystemExit(f"{out} was measured with other settings: give another --out")
    return results


def main() -> None:
    """Measure everybody and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prior", default="builtin")
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, default=Path("prior.json"))
    parser.add_argument("--set", action="append", default=[], help="a setting of the inversion, such as tuning_steps=200")
    given = parser.parse_args()
    settings = {name: json.loads(value) for name, _, value in (setting.partition("=") for setting in given.set)}
    config = InversionConfig(**settings)
    facts = {"prior": given.prior, "config": dataclasses.asdict(config), "views": VIEWS}
    results = done_before(given.out, facts)
    context = multiprocessing.get_context("spawn")
    arguments = (given.prior, given.folder, config, given.device, context.Value("i", 0))
    with ProcessPoolExecutor(given.processes, mp_context=context, initializer=prepare, initargs=arguments) as pool:
        for result, picture in pool.map(measure, range(len(results), given.people)):
            Image.fromarray(picture).save(given.out.with_name(f"{given.out.stem}_{len(results):02d}.png"))
            results.append(result)
            given.out.write_text(json.dumps(facts | {"results": results}))
    print(table(results))


if __name__ == "__main__":
    main()
