"""Learn the offline face descriptor from a data set of heads, and measure how well it tells apart people whom it never saw.

    python benchmarks/likeness.py HEADS UNSEEN [-o likeness.safetensors]

HEADS and UNSEEN are data sets in EG3D's layout with `samples.npz`, several pictures of each person; `benchmarks/unseen_people.py` makes the second.
Without -o the shipped descriptor is measured. Pictures in which no face is found are left out.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from talk3d.io.heads import load_heads
from talk3d.perception.facetemplate import load_template
from talk3d.perception.identity import LIKENESS_PATH, Likeness, face_features, fit_likeness
from talk3d.perception.landmarks import load_face_model, observe_picture


def look(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures over grey, face points, and who it is."""
    heads, model = load_heads(folder), load_face_model()
    pictures, points, people = [], [], []
    for rgba, person in zip(heads.images, heads.person, strict=True):
        alpha = rgba[..., 3:].float() / 255
        picture = (rgba[..., :3] * alpha + 128 * (1 - alpha)).round().byte()
        seen = observe_picture(model, np.ascontiguousarray(picture.numpy()))
        if seen is not None:
            pictures.append(picture)
            points.append(torch.from_numpy(seen.landmarks))
            people.append(int(person))
    return torch.stack(pictures), torch.stack(points), torch.tensor(people)


def features(pictures: torch.Tensor, points: torch.Tensor, template: torch.Tensor) -> torch.Tensor:
    """What is projected."""
    parts = zip(pictures.split(32), points.split(32), strict=True)
    return torch.cat([face_features(some.permute(0, 3, 1, 2).float() / 255, where, template) for some, where in parts])


def main() -> None:
    """Learn, write, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heads", type=Path)
    parser.add_argument("unseen", type=Path)
    parser.add_argument("-o", "--out", type=Path)
    given = parser.parse_args()
    template = load_template(load_face_model().kind).points[:468]
    if given.out:
        pictures, points, people = look(given.heads)
        fit_likeness(features(pictures, points, template), people, given.out)
    pictures, points, people = look(given.unseen)
    describe = Likeness(load_face_model().kind, given.out or LIKENESS_PATH)
    vectors = torch.cat(
        [describe(some.permute(0, 3, 1, 2).float() / 255, where) for some, where in zip(pictures.split(32), points.split(32), strict=True)]
    )
    cosines = (vectors @ vectors.mT).numpy()
    upper = np.triu(np.ones_like(cosines, bool), 1)
    same = (people[:, None] == people).numpy()
    alike, apart = cosines[upper & same], np.sort(cosines[upper & ~same])
    print(
        f"{len(people)} pictures of {len(people.unique())} people: a pair of one person scores higher than one of two people with probability "
        f"{np.searchsorted(apart, alike).mean() / len(apart):.4f}"
    )
    print(
        f"one person: mean {alike.mean():.3f}, 95 % above {np.quantile(alike, 0.05):.3f}; two people: mean {apart.mean():.3f}, "
        f"95 % below {np.quantile(apart, 0.95):.3f}; above 0.6: {(alike > 0.6).mean():.3f} and {(apart > 0.6).mean():.3f}"
    )


if __name__ == "__main__":
    main()
