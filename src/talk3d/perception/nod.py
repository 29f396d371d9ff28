"""What face points leave constantly wrong, told by the pictures: at the right pose, the head that the prior guesses looks most like them.

A face network misjudges how deep each person's face is, and a face of the wrong depth is nodded in its head space by up to some degrees, the same
in all frames: then turns of the head look like rolls. And a face that is taken for too deep turns too little. The prior has learnt heads from true
cameras, hair, ears and neck included. So it tells, too, where a person's neck bends.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor

from talk3d.models.avatar import Prior
from talk3d.models.stylegan2 import resize_to
from talk3d.ops.compositing import premultiply
from talk3d.ops.geometry import (
    CAMERA_FOCAL,
    HEAD_PIVOT,
    farthest_points,
    head_camera,
    intrinsics_matrix,
    look_at,
    move_camera,
    rotation_from_vector,
    widen_turns,
)
from talk3d.types import Camera, Triplane

NUM_VIEWS, TURNS_VIEWS = 8, 16
"""Frames that are looked at for the nod, and for how far heads turn."""
SIDE = 48
"""Rays a side."""
MOST_RAD = math.radians(8)
"""Larger nods are not looked for."""
SHARE = 0.9
"""Of the nod found that is believed: it errs by about half a degree, the face points by about 2."""
MOST_STRETCH = 0.2
"""Turns that are more than about 20 % wider or narrower are not looked for."""
TURNS_BIAS = 0.013
"""By so much too far turn the heads that look most like a guess: of 14 rendered people whom the prior never saw, with true cameras, -3 to 3 %, with a
standard deviation of 1.4 %."""
KNOWN, STRANGE = 0.09, 0.14
"""Error of the guess, of pictures in [-1, 1] and mattes in [0, 1], up to which its person is known to the prior, and from which they are a stranger
to it. Rendered people whom it never saw err by 0.04 to 0.08, two real ones by 0.18 and 0.29: there the error falls with the nod for reasons other
than the nod."""

THROATS = (-0.38, -0.18)
"""Heights between which a throat is looked for, scene units."""
USUAL_THROAT, PULL = -0.25, 0.05
"""Where it is if nothing tells, and how strongly it is drawn there, error for each squared scene unit."""

SHAPE_SIDE = 128
"""Rays a side that find the guessed head's shape."""
SOLID, LEDGE = 0.95, 0.06
"""Rays more opaque than this meet the head; where it lies so much farther, scene units, two rays on, its edge is seen."""


def choose_views(head_pose: Float[Tensor, "t 3"], count: int = NUM_VIEWS) -> Int[Tensor, " k"]:
    """Return frames, in order, as different in yaw and pitch as can be."""
    return farthest_points(head_pose[:, :2], min(count, len(head_pose))).sort().values


def nodded(cameras: Camera, angle_rad: float) -> Camera:
    """Move cameras round the head's pivot, up by this angle for those in front."""
    turn = rotation_from_vector(cameras.cam2world.new_tensor([-angle_rad, 0.0, 0.0]))
    pivot = cameras.cam2world.new_tensor(HEAD_PIVOT)
    return move_camera(cameras, 1.0, turn, pivot - turn @ pivot)


def find_nod(prior: Prior, image: Float[Tensor, "k 3 h w"], alpha: Float[Tensor, "k 1 h w"], cameras: Camera) -> float:
    """By which angle, radians, cameras should be `nodded` so that the prior's guess of the head looks like the pictures.

    Zero where no guess looks like them: then pictures tell nothing, and what the face points say stays.

    Args:
        prior: with its encoder; without one, its average head is compared.
        image: of one person, [-1, 1], over anything.
        alpha: mattes, [0, 1].
        cameras: right but for a constant nod.
    """
    level, shown = level_views(image, alpha, cameras)

    def error(angle: float) -> float:
        cameras = nodded(level, angle)
        return _strangeness(prior, _guess(prior, shown, cameras), shown, cameras)

    return SHARE * _likeliest(error, MOST_RAD, math.radians(0.3), 0.0)


def find_turns(
    prior: Prior, image: Float[Tensor, "k 3 h w"], alpha: Float[Tensor, "k 1 h w"], cameras: Camera, middle: Float[Tensor, "3 3"]
) -> float:
    """By which factor the head's turns should be widened (`widen_turns`) so that the prior's guess of the head looks like the pictures.

    A face that is taken for too deep seems to turn too little, and skin and light cannot tell. One where no guess looks like the pictures.

    Args:
        prior: with its encoder; without one, its average head is compared.
        image: of one person, [-1, 1], over anything.
        alpha: mattes, [0, 1].
        cameras: right but for how far the head turns.
        middle: from which turns count, head to camera.
    """

    def error(stretch: float) -> float:
        wider = widen_turns(cameras.cam2world, math.exp(stretch), middle.to(cameras.cam2world))
        level, shown = level_views(image, alpha, Camera(cam2world=wider, intrinsics=cameras.intrinsics))
        return _strangeness(prior, _guess(prior, shown, level), shown, level)

    return math.exp(_likeliest(error, MOST_STRETCH, 0.01, TURNS_BIAS))


def find_throat(
    prior: Prior, image: Float[Tensor, "k 3 h w"], alpha: Float[Tensor, "k 1 h w"], cameras: Camera, head_pose: Float[Tensor, "k 3"]
) -> float:
    """Return at which `RendererConfig.throat_y` the head that the prior guesses looks most like the pictures while it turns on its shoulders.

    The usual height where heads hardly turn, and where the prior has no encoder that could guess.

    Args:
        prior: with heads that rest on straight necks (`RendererConfig.rest_pose`).
        image: of one person, [-1, 1], over anything.
        alpha: mattes, [0, 1].
        cameras: of them.
        head_pose: yaw, pitch, roll of the head in them, radians.
    """
    if prior.encoder is None:
        return USUAL_THROAT
    level, shown = level_views(image, alpha, cameras)
    guess = _guess(prior, shown, level)

    def error(height: float) -> float:
        return _strangeness(prior.with_renderer(throat_y=height), guess, shown, level, head_pose) + PULL * (height - USUAL_THROAT) ** 2

    found: Any = minimize_scalar(error, bounds=THROATS, method="bounded", options={"xatol": 0.005})
    return float(found.x)


def _likeliest(error: Callable[[float], float], most: float, tolerance: float, bias: float) -> float:
    """Where the error is least, within `most` of zero and less the bias, as far as the prior knows a person whose guess errs so much."""
    found: Any = minimize_scalar(error, bounds=(-most, most), method="bounded", options={"xatol": tolerance})
    known = min(max((STRANGE - float(found.fun)) / (STRANGE - KNOWN), 0.0), 1.0)
    return known * (float(found.x) - bias)


def guessed_shape(
    prior: Prior, image: Float[Tensor, "k 3 h w"], alpha: Float[Tensor, "k 1 h w"], cameras: Camera
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]] | None:
    """Points of the head that the prior guesses, as far as they are seen from the front, and their normals.

    None where the guess does not look like the pictures: hair and ears of another shape would lead poses astray.

    Args:
        prior: with its encoder; without one, its average head is taken.
        image: of one person, [-1, 1], over anything.
        alpha: mattes, [0, 1].
        cameras: of them.
    """
    side = SHAPE_SIDE
    level, shown = level_views(image, alpha, cameras)
    guess = _guess(prior, shown, level)
    if _strangeness(prior, guess, shown, level) > (KNOWN + STRANGE) / 2:
        return None
    rays = prior.generator.rays(head_camera(torch.zeros(1, 3)), side)
    with torch.no_grad():
        _, opacity, distance = prior.generator.render_rays(guess, rays)
    points = (rays.origins + distance * rays.directions)[0].unflatten(0, (side, side))
    opacity, distance = (values[0, :, 0].unflatten(0, (side, side)) for values in (opacity, distance))
    right, up = points[1:-1, 2:] - points[1:-1, :-2], points[:-2, 1:-1] - points[2:, 1:-1]
    step = (distance[1:-1, 2:] - distance[1:-1, :-2]).abs() + (distance[:-2, 1:-1] - distance[2:, 1:-1]).abs()
    kept = (opacity[1:-1, 1:-1] > SOLID) & (step < LEDGE)
    return points[1:-1, 1:-1][kept], F.normalize(torch.cross(right, up, dim=-1), dim=-1)[kept]


def _guess(prior: Prior, shown: Float[Tensor, "k 4 h w"], cameras: Camera) -> Triplane:
    """The head that the prior guesses from level views."""
    generator = prior.generator
    with torch.no_grad():
        w = generator.mapping_network.w_avg[None]
        if prior.encoder is not None:
            w = w + prior.encoder(shown[None, :, :3], shown[None, :, 3:], generator.renderer_config.in_planes(cameras))
        return generator.triplane(w[:, None].expand(-1, generator.num_ws, -1))


def _strangeness(
    prior: Prior, guess: Triplane, shown: Float[Tensor, "k 4 h w"], cameras: Camera, head_pose: Float[Tensor, "k 3"] | None = None
) -> float:
    """How far the prior's guess of the head is from the pictures of level views: mean absolute difference of colours, and of mattes."""
    generator = prior.generator
    planes = Triplane(planes=guess.planes.expand(len(cameras), -1, -1, -1, -1), axes=guess.axes)
    planes = generator.renderer_config.bent(planes, head_pose)
    with torch.no_grad():
        features, opacity, _ = generator.render_found(planes, generator.rays(cameras, SIDE), None)
    found = torch.cat([2 * features[..., :3] - 1, opacity], -1).mT.unflatten(2, (SIDE, SIDE))  # k 4 s s
    different = (found - resize_to(shown, SIDE)).abs()
    return float(different[:, :3].mean() + different[:, 3].mean())


def level_views(image: Float[Tensor, "k 3 h w"], alpha: Float[Tensor, "k 1 h w"], cameras: Camera) -> tuple[Camera, Float[Tensor, "k 4 h w"]]:
    """Show the pictures as cameras at the same places see them that look at the head's pivot without roll, as priors and encoders know heads.

    Returns:
        These cameras, and pictures premultiplied over black with their mattes.
    """
    centre = cameras.cam2world[:, :3, 3]
    backward = F.normalize(centre - centre.new_tensor(HEAD_PIVOT), dim=-1)
    yaw, pitch = torch.atan2(backward[:, 0], backward[:, 2]), torch.asin(backward[:, 1])
    cam2world = look_at(torch.stack([yaw, pitch, torch.zeros_like(yaw)], -1))
    cam2world[:, :3, 3] = centre
    level = Camera(cam2world=cam2world, intrinsics=intrinsics_matrix(CAMERA_FOCAL).to(centre).expand(len(centre), 3, 3))
    side = image.shape[-1]
    steps = (torch.arange(side) + 0.5) / side
    down, right = torch.meshgrid(steps, steps, indexing="ij")
    rays = torch.stack([right, down, torch.ones_like(right)], -1).reshape(-1, 3) @ torch.linalg.inv(level.intrinsics).mT  # k n 3
    seen = rays @ (cam2world[:, :3, :3].mT @ cameras.cam2world[:, :3, :3]) @ cameras.intrinsics.mT
    grid = (2 * seen[..., :2] / seen[..., 2:] - 1).unflatten(1, (side, side))
    both = F.grid_sample(torch.cat([image, alpha], 1), grid, padding_mode="border", align_corners=False)
    return level, torch.cat([premultiply(both[:, :3], both[:, 3:]), both[:, 3:]], 1)
