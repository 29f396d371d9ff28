"""Pictures and meshes of volumes known in closed form: a ball's depth, normals and mesh; grids are laid out as said; missing libraries are named."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch import nn
from trimesh.visual import ColorVisuals

from talk3d.errors import ConfigError
from talk3d.io.media import scan_video
from talk3d.models.avatar import Prior
from talk3d.models.renderer import RendererConfig, TriplaneRenderer
from talk3d.ops.geometry import head_camera
from talk3d.stages.show import MESH_RADIUS, ShowConfig, depth_picture, extract_mesh, normal_picture, show_prior, tiled, write_mesh
from talk3d.types import Rendering, Triplane

RADIUS, CENTRE = 0.2, torch.tensor([0.1, -0.05, 0.0])
TRIPLANE = Triplane(planes=torch.zeros(1, 3, 2, 4, 4), axes="fixed")


class Ball(TriplaneRenderer):
    """A dense ball, green, and a smaller one far from it."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.renderer_config = RendererConfig(neural_rendering_resolution=32)

    def query(self, triplane: Triplane, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        distance = torch.minimum((points - CENTRE).norm(dim=-1), (points + 0.2).norm(dim=-1) + 0.15)
        density = 15.0 + 400 * (RADIUS - distance)
        features = torch.tensor([0.0, 1.0, 0.0]).expand(*points.shape)
        return density[..., None], features


def test_the_mesh_of_a_ball_is_the_larger_closed_sphere_in_its_place() -> None:
    mesh = extract_mesh(Ball(), TRIPLANE, 64)
    assert mesh.is_watertight and mesh.volume == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.02)
    np.testing.assert_allclose(mesh.center_mass, CENTRE.numpy(), atol=2e-3)
    assert (mesh.visual.vertex_colors == [0, 255, 0, 255]).all()


class BlueBehind(Ball):
    """Blue where z is least."""

    def query(self, triplane: Triplane, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        density, green = super().query(triplane, points)
        return density, torch.where(points[..., 2:] < -0.75 * RADIUS, green.roll(1, -1), green)


def test_what_no_camera_sees_is_coloured_like_what_is_round_it() -> None:
    mesh = extract_mesh(BlueBehind(), TRIPLANE, 32)
    assert (
        (mesh.vertices[:, 2] < -0.8 * RADIUS).any() and (mesh.visual.vertex_colors[:, 0] == 0).all() and (mesh.visual.vertex_colors[:, 2] < 60).all()
    )


def test_cameras_look_where_head_space_lies_in_the_planes() -> None:
    ball = BlueBehind()
    ball.renderer_config = RendererConfig(neural_rendering_resolution=32, head_space=(1.0, 0.0, np.pi, 0.0, 0.0, 0.0, 0.0))  # faces look along -z
    mesh = extract_mesh(ball, TRIPLANE, 32)
    assert (mesh.visual.vertex_colors[mesh.vertices[:, 2] < -0.9 * RADIUS, 2] > 150).all()


def test_a_glb_is_life_size_matte_and_has_the_colours_of_light(tmp_path: Path) -> None:
    mesh = extract_mesh(Ball(), TRIPLANE, 32)
    mesh.visual.vertex_colors = np.full((len(mesh.vertices), 4), (255, 188, 10, 255), np.uint8)
    write_mesh(mesh, tmp_path / "ball.glb")
    content = (tmp_path / "ball.glb").read_bytes()
    tree = json.loads(content[20 : 20 + int.from_bytes(content[12:16], "little")])
    part = tree["meshes"][0]["primitives"][0]
    assert tree["materials"][part["material"]]["pbrMetallicRoughness"]["metallicFactor"] == 0 and "NORMAL" in part["attributes"]
    read = trimesh.load(tmp_path / "ball.glb", force="mesh", skip_materials=True)
    assert isinstance(read, trimesh.Trimesh) and isinstance(read.visual, ColorVisuals)
    np.testing.assert_allclose(read.vertices, mesh.vertices * 0.41, atol=1e-6)
    assert (np.asarray(read.visual.vertex_colors) == (255, 128, 1, 255)).all()  # 188 is half the light


def test_a_surface_cut_by_the_balls_side_is_closed() -> None:
    class Wall(Ball):
        def query(self, triplane: Triplane, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return 15.0 - 400 * points[..., 1:2], torch.zeros(*points.shape)

    mesh = extract_mesh(Wall(), TRIPLANE, 32)  # the lower half of the ball
    assert (
        mesh.is_watertight
        and mesh.volume == pytest.approx(2 / 3 * np.pi * (MESH_RADIUS / 2) ** 3, rel=0.1)
        and mesh.bounds[1, 1] == pytest.approx(0.0, abs=0.02)
    )


def test_an_empty_volume_has_no_mesh() -> None:
    class Nothing(Ball):
        def query(self, triplane: Triplane, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return points[..., :1] * 0, points

    with pytest.raises(ConfigError, match="no surface"):
        extract_mesh(Nothing(), TRIPLANE, 16)


def flat(depth: torch.Tensor, alpha: float = 1.0) -> Rendering:
    nothing = torch.zeros(len(depth), 3, *depth.shape[-2:])
    opaque = torch.full_like(depth, alpha)
    return Rendering(image=nothing, alpha=opaque, raw=nothing, raw_alpha=opaque, features=nothing, depth=depth)


def test_near_is_white_far_is_black_and_so_is_nothing() -> None:
    depth = torch.tensor([2.0, 2.5, 3.0]).expand(1, 1, 3, 3)
    assert depth_picture(flat(depth), (2.0, 3.0))[0, 0, 0].tolist() == [1.0, 0.0, -1.0]
    assert depth_picture(flat(depth, 0.0), (2.0, 3.0)).eq(-1).all()


@pytest.mark.parametrize("yaw", [0.0, 0.7])
def test_a_wall_facing_the_camera_is_blue(yaw: float) -> None:
    camera = head_camera(torch.tensor([[yaw, 0.2, 0.0]]))
    side = 8
    grid = ((torch.arange(side) + 0.5) / side - 0.5) / 4.2647
    slant = (1 + grid[None] ** 2 + grid[:, None] ** 2).sqrt()  # distance along the ray of a wall at distance 1 before the camera
    picture = normal_picture(flat(2.5 * slant[None, None]), camera)
    torch.testing.assert_close(picture, torch.tensor([0.0, 0.0, 1.0])[None, :, None, None].expand(1, 3, side, side), atol=1e-3, rtol=0)


def test_a_wall_leaning_back_at_its_top_has_an_upward_normal() -> None:
    depth = torch.linspace(2.8, 2.4, 8)[:, None].expand(8, 8)[None, None]  # the top row is farther
    normal = normal_picture(flat(depth), head_camera(torch.zeros(1, 3)))[0, :, 4, 4]
    assert normal[1] > 0.2 and normal[2] > 0 and abs(normal[0]) < 0.1


def test_pictures_are_laid_out_in_rows_and_columns() -> None:
    pictures = torch.linspace(-1, 1, 6).view(2, 3, 1, 1, 1).expand(2, 3, 3, 4, 4)
    whole = tiled(pictures)
    assert whole.shape == (8, 12, 3)
    assert whole[::4, ::4, 0].tolist() == [[0, 51, 102], [153, 204, 255]]


def test_everything_is_written(prior: Prior, tmp_path: Path) -> None:
    config = ShowConfig(num_people=2, orbit_frames=3, mesh_side=0)
    written = show_prior(prior, tmp_path / "shown", config)
    assert [path.name for path in written] == ["grid.png", "person.png", "orbit.mp4"]
    for path, size in zip(written, ((6 * 64, 2 * 64), (5 * 64, 64)), strict=False):
        with Image.open(path) as picture:
            assert picture.size == size
    assert scan_video(written[2], 30.0).num_frames == 3
    grid = np.asarray(Image.open(written[0]))
    assert np.array_equal(grid[:64, -64:], grid[64:, -64:]), "without truncation left, everybody is the average"


def test_a_missing_library_is_named_before_any_work(prior: Prior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trimesh", None)
    with pytest.raises(ConfigError, match=r"meshes need trimesh: pip install 'talk3d\[mesh\]'"):
        show_prior(prior, tmp_path / "shown")
    assert not (tmp_path / "shown").exists()


def test_unfit_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 person"):
        ShowConfig(num_people=0)
