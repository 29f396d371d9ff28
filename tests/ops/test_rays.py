"""Rays of known cameras, and how spans shrink to what is occupied."""

import math

import numpy as np
import pytest
import torch

from talk3d.ops.geometry import head_camera, intrinsics_matrix, project
from talk3d.ops.rays import camera_rays, limit_to_box, limit_to_occupied
from talk3d.types import Camera, Rays


def identity_camera(focal: float = 1.0) -> Camera:
    return Camera(cam2world=torch.eye(4)[None], intrinsics=intrinsics_matrix(focal)[None])


def straight_ray(near: float = 0.0, far: float = 2.0) -> Rays:
    """From z = -1 along +z through the middle of the cube."""
    return Rays(
        origins=torch.tensor([[[0.01, 0.01, -1.0]]]),
        directions=torch.tensor([[[0.0, 0.0, 1.0]]]),
        near=torch.full((1, 1, 1), near),
        far=torch.full((1, 1, 1), far),
    )


def test_shapes_spans_and_unit_directions() -> None:
    rays = camera_rays(head_camera(torch.randn(3, 3) * 0.3), 5, 2.25, 3.3)
    assert rays.origins.shape == rays.directions.shape == (3, 25, 3) and rays.near.shape == rays.far.shape == (3, 25, 1)
    torch.testing.assert_close(rays.directions.norm(dim=-1), torch.ones(3, 25))
    assert rays.near.unique().tolist() == [2.25] and rays.far.unique().tolist() == pytest.approx([3.3])


def test_central_ray_of_the_identity_camera_is_the_optical_axis() -> None:
    rays = camera_rays(identity_camera(), 3, 0.0, 1.0)
    torch.testing.assert_close(rays.directions[0, 4], torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(rays.origins, torch.zeros(1, 9, 3))


def test_rays_are_row_major_with_x_right_and_y_down() -> None:
    directions = camera_rays(identity_camera(), 2, 0.0, 1.0).directions[0]
    assert directions.sign().tolist() == [[-1, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]]
    torch.testing.assert_close(directions[1] / directions[1, 2], torch.tensor([0.25, -0.25, 1.0]))


def test_skew_and_principal_point_follow_the_pinhole_equations() -> None:
    matrix = torch.tensor([[2.0, 0.3, 0.4], [0.0, 1.5, 0.7], [0.0, 0.0, 1.0]])
    rays = camera_rays(Camera(cam2world=torch.eye(4)[None], intrinsics=matrix[None]), 4, 0.0, 1.0)
    pixels = rays.directions[0] @ matrix.T
    centres = (torch.arange(4) + 0.5) / 4
    expected = torch.stack([centres.repeat(4), centres.repeat_interleave(4)], -1)
    torch.testing.assert_close(pixels[:, :2] / pixels[:, 2:], expected)


def test_points_on_rays_project_back_to_their_pixel_centres() -> None:
    camera = head_camera(torch.tensor([[0.4, -0.2, 0.1], [-0.5, 0.3, 0.0]]))
    rays = camera_rays(camera, 6, 2.0, 3.0)
    centres = (torch.arange(6) + 0.5) / 6
    expected = torch.stack([centres.repeat(6), centres.repeat_interleave(6)], -1).expand(2, -1, -1)
    for distance in (2.0, 2.7):
        torch.testing.assert_close(project(rays.origins + distance * rays.directions, camera), expected, atol=1e-5, rtol=0)


def test_published_labels_give_cameras_that_look_at_the_pivot(shared) -> None:
    fixture = np.load(shared / "fixtures" / "cameras.npz")
    for name, focal, pivot in (("labels_ffhq", 4.2647, (0.0, 0.0, 0.2)), ("labels_talk3d", 3.6, (0.0, 0.05, 0.2))):
        rays = camera_rays(Camera.from_label(torch.from_numpy(fixture[name])), 3, 2.25, 3.3)
        towards = torch.tensor(pivot) - rays.origins[:, 4]
        torch.testing.assert_close(rays.directions[:, 4], towards / towards.norm(dim=-1, keepdim=True), atol=1e-5, rtol=0)
        torch.testing.assert_close(rays.origins[0].norm(dim=-1), torch.full((9,), 2.7), atol=1e-5, rtol=0)
        cosine = (rays.directions[1, 3] @ rays.directions[1, 4]).item()
        assert np.tan(np.arccos(cosine)) == pytest.approx(1 / 3 / focal, rel=1e-4)


def test_span_shrinks_to_the_one_full_cell() -> None:
    occupied = torch.zeros(8, 8, 8, dtype=torch.bool)
    occupied[5, 4, 4] = True  # z in [0.125, 0.25], x and y in [0, 0.125]
    limited, hit = limit_to_occupied(straight_ray(), occupied, 1.0, num_probes=64)
    assert hit.tolist() == [[True]]
    step = 2 / 64
    assert 1.125 - step <= limited.near.item() <= 1.125 and 1.25 <= limited.far.item() <= 1.25 + step


def test_cells_are_indexed_z_y_x() -> None:
    for index in ((5, 4, 4), (4, 5, 4), (4, 4, 5)):
        occupied = torch.zeros(8, 8, 8, dtype=torch.bool)
        occupied[index] = True
        axis = 2 - [i == 5 for i in index].index(True)  # x is the last index
        origin = torch.full((3,), 0.01)
        origin[axis] = -1.0
        direction = torch.zeros(3)
        direction[axis] = 1.0
        rays = Rays(origins=origin.view(1, 1, 3), directions=direction.view(1, 1, 3), near=torch.zeros(1, 1, 1), far=torch.full((1, 1, 1), 2.0))
        limited, hit = limit_to_occupied(rays, occupied, 1.0)
        assert hit.all() and limited.near.item() == pytest.approx(1.125, abs=2 / 64)


def test_two_full_cells_are_spanned_together_and_a_miss_stays_whole() -> None:
    occupied = torch.zeros(8, 8, 8, dtype=torch.bool)
    occupied[2, 4, 4] = occupied[6, 4, 4] = True
    limited, hit = limit_to_occupied(straight_ray(), occupied, 1.0)
    assert hit.all() and limited.near.item() == pytest.approx(0.75) and limited.far.item() == pytest.approx(1.375)
    aside = Rays(**{**vars(straight_ray()), "origins": torch.tensor([[[0.4, 0.4, -1.0]]])})
    limited, hit = limit_to_occupied(aside, occupied, 1.0)
    assert not hit.any() and (limited.near.item(), limited.far.item()) == (0.0, 2.0)


def test_a_full_cube_is_left_where_rays_cross_it() -> None:
    rays = camera_rays(head_camera(torch.zeros(1, 3)), 4, 2.25, 3.3)
    limited, hit = limit_to_occupied(rays, torch.ones(4, 4, 4, dtype=torch.bool), 1.0)
    assert hit.all()
    inside = (rays.origins.unsqueeze(-2) + (2.25 + 1.05 / 64 * (torch.arange(64) + 0.5))[:, None] * rays.directions.unsqueeze(-2)).abs().amax(
        -1
    ) < 0.5
    torch.testing.assert_close((limited.far - limited.near).squeeze(-1), inside.sum(-1) * 1.05 / 64)


def test_the_cube_is_as_large_as_the_box() -> None:
    limited, _ = limit_to_occupied(straight_ray(), torch.ones(4, 4, 4, dtype=torch.bool), 0.5)
    assert (limited.near.item(), limited.far.item()) == pytest.approx((0.75, 1.25))


def box_rays(origins: list[list[float]], directions: list[list[float]]) -> Rays:
    toward = torch.nn.functional.normalize(torch.tensor([directions], dtype=torch.float32), dim=-1)
    zero = torch.zeros(1, len(origins), 1)
    return Rays(origins=torch.tensor([origins], dtype=torch.float32), directions=toward, near=zero, far=zero)


def test_rays_are_limited_to_where_they_cross_the_cube() -> None:
    """Straight through, through a corner at 45 degrees, from inside, along an axis with negative zeros."""
    rays = box_rays([[0.1, 0.2, 3.0], [-3.0, 0.0, -2.5], [0.0, 0.0, 0.0], [0.5, 0.5, 2.0]], [[-0.0, 0.0, -1], [1, 0, 1], [0, 2, 0], [-0.0, -0.0, -1]])
    rays.origins[0, 3] -= 0.01
    limited = limit_to_box(rays, 2.0)
    assert limited.near[0, :, 0].tolist() == pytest.approx([2.0, 2 * math.sqrt(2), -1.0, 0.99])
    assert limited.far[0, :, 0].tolist() == pytest.approx([4.0, 3.5 * math.sqrt(2), 1.0, 2.99])
    assert limited.origins is rays.origins and limited.directions is rays.directions


def test_rays_that_miss_the_cube_span_from_the_nearest_entry_to_the_farthest_entry() -> None:
    rays = box_rays([[0, 0, 3.0], [0, 0, 5.0], [0, 4.0, 3.0]], [[0, 0, -1]] * 3)
    limited = limit_to_box(rays, 1.0)
    assert limited.near[0, :, 0].tolist() == pytest.approx([2.5, 4.5, 2.5])
    assert limited.far[0, :, 0].tolist() == pytest.approx([3.5, 5.5, 4.5])


def test_if_all_rays_miss_the_cube_they_look_backwards() -> None:
    limited = limit_to_box(box_rays([[0, 4.0, 3.0]], [[0, 0, -1]]), 1.0)
    assert limited.near.item() == -1 and limited.far.item() == -2


def test_limits_of_a_camera_touch_the_faces_of_the_cube() -> None:
    rays = limit_to_box(camera_rays(head_camera(torch.tensor([[0.4, 0.2, 0.0]])), 9, 0.0, 0.0), 0.7)
    hit = rays.far - rays.near < 3
    for distance in (rays.near, rays.far):
        points = rays.origins + distance * rays.directions
        reach = points.abs().amax(-1)[hit[..., 0] & (reach_of_middle(rays) < 0.35)]
        assert len(reach) > 10
        torch.testing.assert_close(reach, torch.full_like(reach, 0.35), atol=1e-5, rtol=0)


def reach_of_middle(rays: Rays) -> torch.Tensor:
    return (rays.origins + (rays.near + rays.far) / 2 * rays.directions).abs().amax(-1)
