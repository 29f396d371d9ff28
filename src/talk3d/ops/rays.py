"""From cameras to rays, and from rays to the part of them that can see something."""

import torch
from jaxtyping import Bool
from torch import Tensor

from talk3d.types import Camera, Rays


def camera_rays(camera: Camera, resolution: int, near: float, far: float) -> Rays:
    """Rays through the pixel centres of a square picture, row-major, with unit directions.

    Args:
        camera: b cameras.
        resolution: pixels a side.
        near: distance at which sampling starts, scene units.
        far: distance at which it ends.

    Reference: EG3D (arXiv 2112.07945), ray sampler.
    """
    cam2world, k = camera.cam2world, camera.intrinsics
    centres = (torch.arange(resolution, device=cam2world.device, dtype=cam2world.dtype) + 0.5) / resolution
    w, u = torch.meshgrid(centres, centres, indexing="ij")
    w, u = w.flatten(), u.flatten()
    y = (w - k[:, 1, 2, None]) / k[:, 1, 1, None]
    x = (u - k[:, 0, 2, None] - k[:, 0, 1, None] * y) / k[:, 0, 0, None]
    local = torch.stack([x, y, torch.ones_like(x)], -1)  # b r 3
    directions = torch.nn.functional.normalize(local @ cam2world[:, :3, :3].transpose(1, 2), dim=-1)
    origins = cam2world[:, None, :3, 3].expand_as(directions)
    span = torch.ones_like(directions[..., :1])
    return Rays(origins=origins, directions=directions, near=near * span, far=far * span)


def limit_to_box(rays: Rays, box_warp: float) -> Rays:
    """Span every ray from where it enters the cube of side `box_warp` to where it leaves it.

    Rays that miss it span from the nearest entry to the farthest *entry* of those that hit (the released networks were trained so), or from
    -1 to -2 if none hits.

    Reference: EG3D (arXiv 2112.07945), its renderer's automatic limits.
    """
    inverse = 1 / rays.directions
    low, high = (-box_warp / 2 - rays.origins) * inverse, (box_warp / 2 - rays.origins) * inverse
    forward = inverse >= 0
    enter = torch.where(forward, low, high).amax(-1, keepdim=True)
    leave = torch.where(forward, high, low).amin(-1, keepdim=True)
    hit = enter < leave
    if not hit.any():
        near, far = torch.full_like(enter, -1), torch.full_like(leave, -2)
    else:
        near, far = torch.where(hit, enter, enter[hit].min()), torch.where(hit, leave, enter[hit].max())
    return Rays(origins=rays.origins, directions=rays.directions, near=near, far=far)


def limit_to_occupied(rays: Rays, occupied: Bool[Tensor, "s s s"], box_warp: float, num_probes: int = 64) -> tuple[Rays, Bool[Tensor, "b r"]]:
    """Shrink each ray's span to where it crosses occupied cells of the cube, and say which rays cross any.

    Args:
        rays: rays with a common near and far.
        occupied: cells of the cube of side `box_warp`, indexed [z, y, x].
        box_warp: side of the cube, scene units.
        num_probes: equally spaced looks along each ray.

    Returns:
        The rays with tightened spans (unchanged where nothing is hit) and the hit mask.
    """
    side = occupied.shape[0]
    step = (rays.far - rays.near) / num_probes
    distances = rays.near + step * (torch.arange(num_probes, device=step.device) + 0.5)  # b r p
    points = rays.points(distances)
    cells = ((points / box_warp + 0.5) * side).floor()
    inside = ((cells >= 0) & (cells < side)).all(-1)
    x, y, z = cells.clamp(0, side - 1).long().unbind(-1)
    full = occupied[z, y, x] & inside  # b r p
    hit = full.any(-1)
    first = full.to(torch.uint8).argmax(-1, keepdim=True)
    last = num_probes - 1 - full.flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    near = torch.where(hit[..., None], rays.near + step * first, rays.near)
    far = torch.where(hit[..., None], rays.near + step * (last + 1), rays.far)
    return Rays(origins=rays.origins, directions=rays.directions, near=near, far=far), hit
