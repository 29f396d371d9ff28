"""The constant nod of a clip's cameras and how far its head turns, found with heads that the builtin prior itself paints."""

import math

import pytest
import torch

from talk3d.io.weights import load_prior
from talk3d.models.avatar import Prior
from talk3d.ops.geometry import head_camera, mean_rotation, project, rotation_from_vector, view_angles, widen_turns
from talk3d.perception.nod import SHARE, USUAL_THROAT, choose_views, find_nod, find_throat, find_turns, guessed_shape, level_views, nodded
from talk3d.types import Camera

ANGLES = torch.tensor([[0.0, 0.0, 0.05], [0.35, 0.05, 0.0], [-0.35, 0.0, -0.05], [0.1, -0.15, 0.1]])


@pytest.fixture(scope="module")
def builtin() -> Prior:
    return load_prior()


def beside(cameras: Camera) -> Camera:
    """The same cameras with the head a little off the middle of the picture."""
    intrinsics = cameras.intrinsics.clone()
    intrinsics[:, 0, 2] += 0.02
    intrinsics[:, 1, 2] -= 0.01
    return Camera(cam2world=cameras.cam2world, intrinsics=intrinsics)


def filmed(prior: Prior, head: torch.Tensor, cameras: Camera) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of a head, not premultiplied, and their mattes."""
    with torch.no_grad():
        rendering = prior.generator.render(head, cameras)
    alpha = rendering.alpha.clamp(0, 1)
    return ((rendering.image + 1) / alpha.clamp_min(0.05) - 1).clamp(-1, 1), alpha


def test_the_nod_and_the_turns_of_a_head_that_the_prior_knows_are_found(builtin: Prior):
    cameras = beside(head_camera(ANGLES))
    head = builtin.generator.mapping(torch.randn(1, builtin.generator.config.z_dim)).expand(4, -1, -1)
    picture, alpha = filmed(builtin, head, cameras)
    found = find_nod(builtin, picture, alpha, nodded(cameras, math.radians(-4)))
    assert math.degrees(found) == pytest.approx(4 * SHARE, abs=0.8)
    middle = mean_rotation(cameras.cam2world[:, :3, :3].mT)
    for factor in (0.87, 1.1):
        wrong = Camera(cam2world=widen_turns(cameras.cam2world, factor, middle), intrinsics=cameras.intrinsics)
        found = find_turns(builtin, picture, alpha, wrong, middle)
        assert math.log(found) == pytest.approx(-math.log(factor), abs=0.05)


def test_it_is_found_where_a_neck_bends(builtin: Prior):
    head = builtin.generator.mapping(torch.randn(1, builtin.generator.config.z_dim, generator=torch.Generator().manual_seed(2))).expand(4, -1, -1)
    cameras, resting = beside(head_camera(ANGLES)), builtin.with_renderer(rest_pose=(0.0, 0.0, 0.0))
    for throat_y in (-0.3, -0.2):
        bending = resting.with_renderer(throat_y=throat_y).generator
        with torch.no_grad():
            volumes = bending.renderer_config.bent(bending.triplane(head), ANGLES)
            rendering = bending.render_triplane(volumes, head[:, -1], cameras)
        alpha = rendering.alpha.clamp(0, 1)
        picture = ((rendering.image + 1) / alpha.clamp_min(0.05) - 1).clamp(-1, 1)
        assert find_throat(resting, picture, alpha, cameras, ANGLES) == pytest.approx(throat_y, abs=0.03)
    still = ANGLES * 0
    assert find_throat(resting, picture, alpha, cameras, still) == pytest.approx(USUAL_THROAT, abs=0.02), "heads that do not turn tell nothing"


def test_the_shape_of_a_head_that_the_prior_knows_is_guessed(builtin: Prior):
    """Points lie where other cameras meet the true head, and face the front."""
    cameras = beside(head_camera(ANGLES))
    head = builtin.generator.mapping(torch.randn(1, builtin.generator.config.z_dim, generator=torch.Generator().manual_seed(1)))
    camera = beside(head_camera(torch.zeros(1, 3)))
    with torch.no_grad():
        truth = builtin.generator.render(head, camera)
    found = guessed_shape(builtin, *filmed(builtin, head.expand(4, -1, -1), cameras), cameras)
    assert found is not None
    points, normals = found
    assert len(points) > 2000 and points[:, 2].max() < 0.35
    assert torch.allclose(normals.norm(dim=-1), torch.ones(len(normals)), atol=1e-5) and (normals[:, 2] > -0.2).all()
    place = project(points[None], camera)
    seen = torch.nn.functional.grid_sample(truth.depth, 2 * place[:, None] - 1, align_corners=False)[0, 0, 0]
    away = (points - camera.cam2world[0, :3, 3]).norm(dim=-1)
    assert (seen - away).abs().median() < 0.01


def test_without_an_encoder_the_average_head_is_compared(builtin: Prior):
    bare = Prior(generator=builtin.generator, w_std=builtin.w_std, provenance={})
    cameras = head_camera(ANGLES)
    average = builtin.generator.mapping_network.w_avg.expand(4, builtin.generator.num_ws, -1)
    with torch.no_grad():
        rendering = builtin.generator.render(average, cameras)
    found = find_nod(bare, rendering.image, rendering.alpha.clamp(0, 1), nodded(cameras, math.radians(2)))
    assert math.degrees(found) == pytest.approx(-2 * SHARE, abs=0.3)


def test_of_pictures_that_the_prior_cannot_guess_nothing_is_believed(builtin: Prior):
    stripes = torch.ones(2, 3, 64, 64)
    stripes[..., ::2] = -1
    assert find_nod(builtin, stripes, torch.ones(2, 1, 64, 64), head_camera(ANGLES[:2])) == 0
    assert find_turns(builtin, stripes, torch.ones(2, 1, 64, 64), head_camera(ANGLES[:2]), torch.eye(3)) == 1
    assert guessed_shape(builtin, stripes, torch.ones(2, 1, 64, 64), head_camera(ANGLES[:2])) is None


def test_nodding_lifts_cameras_in_front_and_keeps_their_distance():
    cameras = head_camera(torch.zeros(1, 3))
    lifted = nodded(cameras, 0.1)
    torch.testing.assert_close(view_angles(lifted.cam2world[:, :3, :3]), torch.tensor([[0.0, 0.1, 0.0]]))
    torch.testing.assert_close(lifted.cam2world, head_camera(torch.tensor([[0.0, 0.1, 0.0]])).cam2world)


def test_views_are_as_different_as_can_be_and_never_twice_the_same():
    pose = torch.tensor([[0.0, 0, 0], [0.01, 0, 0], [0.3, 0, 0], [-0.3, 0, 0], [0.02, 0.2, 0]])
    assert choose_views(pose, 4).tolist() == [1, 2, 3, 4]
    assert choose_views(torch.zeros(3, 3), 8).tolist() == [0, 1, 2]


def test_level_views_show_what_a_camera_without_roll_sees():
    turned = beside(head_camera(ANGLES))
    turned.cam2world[:, :3, :3] = turned.cam2world[:, :3, :3] @ rotation_from_vector(torch.tensor([0.0, 0.01, 0.05]))
    points = torch.tensor([[[0.1, 0.05, 0.2], [-0.05, -0.1, 0.3]]]).expand(4, -1, -1)
    steps = (torch.arange(128) + 0.5) / 128
    down, right = torch.meshgrid(steps, steps, indexing="ij")

    def dots(cameras: Camera) -> torch.Tensor:
        """Two bright dots, red and green, where the cameras see the points."""
        seen = project(points, cameras)  # k 2 2
        distance = (right - seen[..., 0, None, None]).square() + (down - seen[..., 1, None, None]).square()
        return torch.cat([2 * (-distance / 0.03**2).exp() - 1, -torch.ones(4, 1, 128, 128)], 1)

    level, shown = level_views(dots(turned), torch.ones(4, 1, 128, 128), turned)
    torch.testing.assert_close(view_angles(level.cam2world[:, :3, :3])[:, 2], torch.zeros(4), atol=1e-5, rtol=0)
    assert (project(torch.tensor([[[0.0, 0.0, 0.2]]]).expand(4, -1, -1), level) - 0.5).abs().max() < 1e-5
    assert (shown[:, :3] - dots(level)).abs().max() < 0.06
