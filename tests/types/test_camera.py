import pytest
import torch

from talk3d.errors import ShapeError
from talk3d.ops.geometry import head_camera
from talk3d.ops.rays import camera_rays
from talk3d.types import Camera, Rays


def cameras(count: int) -> Camera:
    label = torch.arange(25 * count, dtype=torch.float32).reshape(count, 25)
    return Camera.from_label(label)


def test_labels_survive_the_round_trip() -> None:
    label = torch.randn(4, 25)
    assert torch.equal(Camera.from_label(label).to_label(), label)


def test_labels_are_row_major_matrix_then_intrinsics() -> None:
    camera = cameras(1)
    assert camera.cam2world[0, 0, 3] == 3
    assert camera.intrinsics[0, 0, 2] == 18


def test_indexing_keeps_matrices_together() -> None:
    camera = cameras(5)
    assert len(camera) == 5
    assert torch.equal(camera[1:3].to_label(), camera.to_label()[1:3])
    assert torch.equal(camera[torch.tensor([4, 0])].to_label(), camera.to_label()[[4, 0]])
    assert camera[2].cam2world.shape == (4, 4)


def test_moving_keeps_values() -> None:
    assert torch.equal(cameras(2).to("cpu").to_label(), cameras(2).to_label())


def test_labels_of_other_length_are_refused() -> None:
    unhooked = Camera.from_label.__func__.__wrapped__  # under the hook the shape annotation would speak first
    with pytest.raises(ShapeError, match="25 numbers, got 24"):
        unhooked(Camera, torch.zeros(1, 24))


def test_points_of_rays_lie_as_far_from_their_origins_as_asked() -> None:
    origins, directions = torch.randn(2, 4, 3), torch.nn.functional.normalize(torch.randn(2, 4, 3), dim=-1)
    distances = 1 + torch.rand(2, 4, 5)
    points = Rays(origins=origins, directions=directions, near=distances[..., :1], far=distances[..., -1:]).points(distances)
    for k in range(5):
        torch.testing.assert_close(points[:, :, k], origins + distances[:, :, k, None] * directions)


@pytest.mark.parametrize(("step", "row", "column"), [(1, 0, 0), (3, 0, 2), (4, 3, 1)])
def test_every_few_rows_and_columns_are_seen_by_a_camera_of_their_own(step: int, row: int, column: int) -> None:
    camera = head_camera(torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.1, 0.0]]))
    whole = camera_rays(camera, 12, 1.0, 2.0).directions.unflatten(1, (12, 12))
    part = camera_rays(camera.every(step, row, column, 12), 12 // step, 1.0, 2.0).directions.unflatten(1, (12 // step, 12 // step))
    torch.testing.assert_close(part, whole[:, row::step, column::step], atol=1e-6, rtol=0)
