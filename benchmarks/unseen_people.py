"""Render the people that `benchmarks/prior.py` measures: invented, exact, and never seen in training.

    python benchmarks/unseen_people.py SYNTHETIC_HEADS OUT [--people 50]

SYNTHETIC_HEADS is the folder of the renderer (heads.py, ict_facekit.npz); it needs moderngl, numpy, pillow, matplotlib and EGL, not this package.
OUT becomes a data set in EG3D's layout (pictures with mattes, dataset.json, samples.npz) with depth.npy: distance along the ray in scene
units, 0 where nothing is, float16, n h w. The views of every person come in the order of `VIEWS`.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SEED, FIRST, SIDE = 1, 100_000, 256
FIT = [(0, 0), (-35, 0), (35, 0), (-15, 10), (15, -10)]
"""Yaw and pitch in degrees: the first is the single view, all of them are the five views."""
HELD_OUT = [(-25, 0), (25, 0), (-45, 0), (45, 0), (0, -15), (0, 15)]
"""Views that no fit sees."""
VIEWS = FIT + HELD_OUT
NEAR, FAR = 1.0, 6.0
"""Of the renderer's depth buffer."""


def ray_distance(renderer, focal: float) -> np.ndarray:
    """Read the depth of the picture just rendered as distance along the ray, 0 where nothing is; h w."""
    side = renderer.size * renderer.ssaa
    stored = np.frombuffer(renderer.fbo.read(components=1, attachment=-1, dtype="f4"), np.float32).reshape(side, side)[::-1]
    z = 2 * FAR * NEAR / (FAR + NEAR - (2 * stored - 1) * (FAR - NEAR))
    grid = ((np.arange(side) + 0.5) / side - 0.5) / focal
    distance = np.where(stored < 1, z * np.sqrt(1 + grid[None] ** 2 + grid[:, None] ** 2), 0)
    return distance[:: renderer.ssaa, :: renderer.ssaa]


def main() -> None:
    """Render everybody."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("synthetic_heads", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--people", type=int, default=50)
    given = parser.parse_args()
    sys.path.insert(0, str(given.synthetic_heads))
    from heads import FOCAL, HeadRenderer, background_image, eg3d_label, look_at, random_expression, random_person

    renderer = HeadRenderer(given.synthetic_heads / "ict_facekit.npz", SIDE, 2)
    given.out.mkdir(parents=True, exist_ok=True)
    labels, people, depths = [], [], []
    for index in range(given.people):
        rng = np.random.default_rng([SEED, FIRST + index])
        person = random_person(rng)
        renderer.set_person(person)
        behind = background_image(person, SIDE)
        weights = {} if rng.random() < 0.3 else random_expression(rng, renderer.names)
        for yaw, pitch in VIEWS:
            camera = look_at(math.radians(yaw), math.radians(pitch))
            rgba = renderer.render(weights, camera)
            depths.append(ray_distance(renderer, FOCAL).astype(np.float16))
            alpha = rgba[..., 3:] / 255
            rgb = (rgba[..., :3] * alpha + 255 * behind * (1 - alpha)).round().astype(np.uint8)
            name = f"{len(labels):05d}.png"
            Image.fromarray(np.concatenate([rgb, rgba[..., 3:]], -1)).save(given.out / name)
            labels.append([name, eg3d_label(camera)])
            people.append(index)
        print(f"person {index + 1}/{given.people}", flush=True)
    (given.out / "dataset.json").write_text(json.dumps({"labels": labels}))
    np.savez_compressed(given.out / "samples.npz", sample=people, person=people)
    np.save(given.out / "depth.npy", np.stack(depths))


if __name__ == "__main__":
    main()
