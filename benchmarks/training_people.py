"""Render the people from whom the builtin prior learns, with their distances: two expressions and eight views of each.

    python benchmarks/training_people.py SYNTHETIC_HEADS OUT --people 4000 [--first 0] [--processes 8]

Writes a data set in EG3D's layout with samples.npz and depth.npy (see `talk3d.io.heads.load_heads`). Which people there are depends only on
their numbers. Needs OpenGL (EGL), and numpy, moderngl and pillow for the renderer.
"""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from unseen_people import ray_distance

SIDE, DEPTH_SIDE = 256, 64
EXPRESSIONS, VIEWS = 2, 8
SEED = 1
"""Of every person, with their number; the unseen ones of `unseen_people.py` count from 100,000."""


@cache
def renderer(tool: str) -> Any:
    """Make the renderer, once in each process."""
    sys.path.insert(0, tool)
    from heads import HeadRenderer

    return HeadRenderer(Path(tool) / "ict_facekit.npz", SIDE, 2)


def angles(rng: np.random.Generator, view: int) -> tuple[float, float]:
    """Draw yaw and pitch in radians: the first view is nearly from the front, half of the others are from well above or below."""
    if view == 0:
        return rng.normal(0, 0.18), rng.normal(0.02, 0.08)
    return rng.uniform(-1.15, 1.15), rng.uniform(-0.4, 0.4) if view % 2 else rng.normal(0.02, 0.16)


def coarse(distance: np.ndarray) -> np.ndarray:
    """Return the median distance of each cell that lies on one surface, 0 for the others."""
    size = SIDE // DEPTH_SIDE
    cells = distance.reshape(DEPTH_SIDE, size, DEPTH_SIDE, size).transpose(0, 2, 1, 3).reshape(DEPTH_SIDE, DEPTH_SIDE, -1)
    one = (cells > 0).all(-1) & (cells.max(-1) - cells.min(-1) < 0.05)
    return np.where(one, np.median(cells, -1), 0).astype(np.float16)


def render_person(tool: str, out: Path, number: int) -> list[tuple[str, list[float], np.ndarray]]:
    """Render all pictures of one person; return their names, labels and distances."""
    head = renderer(tool)
    from heads import FOCAL, background_image, eg3d_label, look_at, random_expression, random_person

    rng = np.random.default_rng([SEED, number])
    person = random_person(rng)
    head.set_person(person)
    behind, rows = background_image(person, SIDE), []
    for expression in range(EXPRESSIONS):
        weights = {} if expression == 0 and rng.random() < 0.3 else random_expression(rng, head.names)
        for view in range(VIEWS):
            camera = look_at(*angles(rng, view))
            rgba = head.render(weights, camera)
            alpha = rgba[..., 3:] / 255
            rgb = (rgba[..., :3] * alpha + 255 * behind * (1 - alpha)).round().astype(np.uint8)
            name = f"{number:06d}_{expression}{view}.webp"
            Image.fromarray(np.concatenate([rgb, rgba[..., 3:]], -1)).save(out / name, quality=92, method=0, exact=True)
            rows.append((name, eg3d_label(camera), coarse(ray_distance(head, FOCAL))))
    return rows


def main() -> None:
    """Render everybody."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("synthetic_heads", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--people", type=int, default=4000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    labels, depths, numbers = [], [], range(given.first, given.first + given.people)
    with ProcessPoolExecutor(given.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        same = ([str(given.synthetic_heads)] * given.people, [given.out] * given.people)
        for number, rows in enumerate(pool.map(render_person, *same, numbers), 1):
            labels += [(name, label) for name, label, _ in rows]
            depths += [depth for *_, depth in rows]
            print(f"person {number}/{given.people}", flush=True)
    sample = np.arange(len(labels)) // VIEWS
    (given.out / "dataset.json").write_text(json.dumps({"labels": labels}))
    np.savez_compressed(given.out / "samples.npz", sample=sample, person=sample // EXPRESSIONS)
    np.save(given.out / "depth.npy", np.stack(depths))


if __name__ == "__main__":
    main()
