"""Show: pictures, an orbit and a mesh of what a prior knows, for eyes to judge. Pretraining draws its sheets with it too."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from talk3d.errors import ConfigError
from talk3d.io.writing import VideoWriter, whole
from talk3d.models.avatar import Prior
from talk3d.models.generator import TriplaneGenerator
from talk3d.models.renderer import TriplaneRenderer
from talk3d.models.stylegan2 import resize_to
from talk3d.ops.compositing import premultiply
from talk3d.ops.geometry import head_camera, orbit, project
from talk3d.ops.rays import camera_rays
from talk3d.types import Camera, Progress, Rendering, Triplane, silent

SURFACE_DENSITY = 14.0
"""Density after softplus at which a mesh is cut: half the light is absorbed within a twentieth of a scene unit."""
DEPTH_SPAN = (2.25, 3.3)
"""Distances that are white and black in pictures of depth, scene units."""
SHEET_YAWS = (0.0, -0.6, 0.6)
"""Sides from which heads of a sheet are seen, radians."""
KNOWN_YAWS = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""Sides from which priors see heads while they learn, radians: what none of them shows has no colour of its own."""
MESH_RADIUS = 0.85
"""Of the ball in which a mesh is cut, halves of the cube's side: a head with its neck and the top of its shoulders."""
METRES = 0.41
"""Of a scene unit, where a head is as large as those of the builtin prior."""


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """What is shown of a prior."""

    num_people: int = 8
    """Random people in the grid, one a row."""
    truncation_psi: float = 0.7
    """How far the one person of orbit, depth and mesh, and the grid's middle columns, are from the average: 0 is the average."""
    orbit_frames: int = 120
    """Frames of the orbit, at 30 a second."""
    mesh_side: int = 192
    """Cells a side of the cube that is searched for the surface; 0 makes no mesh."""
    mesh_format: str = "glb"
    """glb or ply."""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot work."""
        if self.num_people < 1 or self.orbit_frames < 2 or self.mesh_side < 0 or self.mesh_format not in ("glb", "ply"):
            raise ConfigError("show needs at least 1 person, 2 frames, a mesh side of 0 or more, and the format glb or ply")


def show_prior(
    prior: Prior, folder: Path, config: ShowConfig | None = None, *, device: str = "cpu", seed: int = 0, progress: Progress = silent
) -> list[Path]:
    """Write grid.png (random people), person.png (one person's sides, depth and normals), orbit.mp4 and mesh.glb; return what was written.

    Args:
        prior: what to show.
        folder: made if it is not there.
        config: how much.
        device: where to render.
        seed: which people.
        progress: hears what is being made.

    Raises:
        ConfigError: a mesh is asked for and the extra `mesh` is not installed.
        MediaError: the orbit cannot be written.
    """
    config = config or ShowConfig()
    if config.mesh_side:
        _mesh_libraries()
    generator = prior.generator.to(device).eval()
    folder.mkdir(parents=True, exist_ok=True)
    progress("grid", 0, 1, {})
    z = torch.randn(config.num_people, generator.config.z_dim, generator=torch.Generator().manual_seed(seed)).to(device)
    _save(_grid(generator, z, config.truncation_psi), folder / "grid.png")
    ws = _rows(generator, z[:1], config.truncation_psi)
    _save(head_sheet(generator, ws), folder / "person.png")
    written = [folder / "grid.png", folder / "person.png", folder / "orbit.mp4"]
    _write_orbit(generator, ws, written[-1], config.orbit_frames, progress)
    if config.mesh_side:
        progress("mesh", 0, 1, {})
        with torch.no_grad():
            mesh = extract_mesh(generator, generator.triplane(ws), config.mesh_side)
        written.append(folder / f"mesh.{config.mesh_format}")
        write_mesh(mesh, written[-1])
    return written


def _rows(generator: TriplaneGenerator, z: Float[Tensor, "b z"], psi: float) -> Float[Tensor, "b n d"]:
    """Style rows of latents; a conditioned mapping network is told the frontal camera."""
    label = head_camera(torch.zeros(len(z), 3)).to_label().to(z.device) if generator.config.c_dim else None
    with torch.no_grad():
        return generator.mapping(z, label, psi)


def _pictures(generator: TriplaneGenerator, ws: Float[Tensor, "b n d"], angles: tuple[float, float, float]) -> tuple[Rendering, Camera]:
    """Render heads from one side, one by one."""
    camera = head_camera(torch.tensor([angles])).to(ws.device)
    with torch.no_grad():
        parts = [generator.render(row[None], camera) for row in ws]
    names = Rendering.__dataclass_fields__
    joined = Rendering(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
    return joined, Camera(cam2world=camera.cam2world.expand(len(ws), -1, -1), intrinsics=camera.intrinsics.expand(len(ws), -1, -1))


def _grid(generator: TriplaneGenerator, z: Float[Tensor, "b z"], psi: float) -> UInt8[np.ndarray, "h w 3"]:
    """One person a row: three sides without truncation, then from the front with `psi`, half of it, and none of themselves left."""
    columns = [_pictures(generator, _rows(generator, z, 1.0), (yaw, 0.0, 0.0))[0].image for yaw in SHEET_YAWS]
    columns += [_pictures(generator, _rows(generator, z, share), (0.0, 0.0, 0.0))[0].image for share in (psi, psi / 2, 0.0)]
    return tiled(torch.stack(columns, 1))


def head_sheet(generator: TriplaneGenerator, ws: Float[Tensor, "b n d"]) -> UInt8[np.ndarray, "h w 3"]:
    """One head a row: from three sides, then depth and normals from the front."""
    columns = [_pictures(generator, ws, (yaw, 0.0, 0.0)) for yaw in SHEET_YAWS]
    front, camera = columns[0]
    side = front.image.shape[-1]
    shapes = [depth_picture(front, DEPTH_SPAN), normal_picture(front, camera)]
    return tiled(torch.stack([rendering.image for rendering, _ in columns] + [resize_to(shape, side) for shape in shapes], 1))


def tiled(pictures: Float[Tensor, "r c 3 h w"]) -> UInt8[np.ndarray, "H W 3"]:
    """Lay pictures in [-1, 1] out in rows and columns."""
    rows = [torch.cat(list(row), -1) for row in pictures]
    whole = torch.cat(rows, -2).clamp(-1, 1).permute(1, 2, 0)  # h w c
    return ((whole + 1) * 127.5).round().byte().cpu().numpy()


def depth_picture(rendering: Rendering, span: tuple[float, float]) -> Float[Tensor, "b 3 h w"]:
    """Near is bright, far is dark, and nothing is black; `span` is the distance of white and of black, scene units."""
    near, far = span
    brightness = ((far - rendering.depth) / (far - near)).clamp(0, 1) * rendering.raw_alpha
    return (2 * brightness - 1).expand(-1, 3, -1, -1)


def normal_picture(rendering: Rendering, camera: Camera) -> Float[Tensor, "b 3 h w"]:
    """Normals of the visible surface in the camera's eyes: red to the right, green up, blue towards the camera."""
    side = rendering.depth.shape[-1]
    rays = camera_rays(camera, side, 0.0, 1.0)
    distance = rendering.depth.flatten(2).transpose(1, 2)  # b r 1
    points = (rays.origins + distance * rays.directions).transpose(1, 2).unflatten(2, (side, side))  # b 3 h w
    across, down = (F.pad(points.diff(dim=axis), pad, mode="replicate") for axis, pad in ((3, (0, 1, 0, 0)), (2, (0, 0, 0, 1))))
    normal = F.normalize(torch.cross(down, across, dim=1), dim=1)
    axes = camera.cam2world[:, :3, :3] * torch.tensor([1.0, -1.0, -1.0], device=normal.device)  # right, up, backward
    seen = torch.einsum("bij,bihw->bjhw", axes, normal)
    return premultiply(seen, rendering.raw_alpha)


def _save(picture: UInt8[np.ndarray, "h w 3"], path: Path) -> None:
    with whole(path) as partial:
        Image.fromarray(picture).save(partial)


def _write_orbit(generator: TriplaneGenerator, ws: Float[Tensor, "1 n d"], path: Path, num_frames: int, progress: Progress) -> None:
    cameras = orbit(num_frames, yaw_deg=40.0, pitch_deg=16.0, period_frames=num_frames).to(ws.device)
    side = generator.renderer_config.superresolution.output_side
    with torch.no_grad(), VideoWriter(path, side, side, fps=30.0) as writer:
        triplane = generator.triplane(ws)
        for i in range(num_frames):
            image = generator.render_triplane(triplane, ws[:, -1], cameras[i : i + 1]).image
            writer.write(tiled(image[None]))
            progress("orbit", i + 1, num_frames, {})


def _mesh_libraries() -> tuple[Any, Any]:
    """Import what meshes need."""
    try:
        import trimesh
        from skimage.measure import marching_cubes
    except ImportError as error:
        raise ConfigError(f"meshes need {error.name}: pip install 'talk3d[mesh]', or give --mesh-side 0") from error
    return trimesh, marching_cubes


def extract_mesh(renderer: TriplaneRenderer, triplane: Triplane, side: int) -> Any:
    """Cut the surface of one volume by marching cubes: a `trimesh.Trimesh` in scene units, its largest piece, closed, with vertex colours.

    Only a ball in the cube is searched: below and behind the shoulders, which no picture shows, volumes hold whatever they like.

    Args:
        renderer: decodes the planes.
        triplane: one volume.
        side: cells a side of the cube.

    Raises:
        ConfigError: the extra `mesh` is not installed, or the volume is empty.
    """
    trimesh, marching_cubes = _mesh_libraries()
    density = F.pad(_density_grid(renderer, triplane, side), (1, 1, 1, 1, 1, 1))  # empty all round, so that the surface is closed
    if density.max() <= SURFACE_DENSITY:
        raise ConfigError("there is no surface in this volume: show another person, with another --seed")
    cells, faces, _, _ = marching_cubes(density.cpu().numpy(), SURFACE_DENSITY)
    points = ((cells[:, ::-1] - 1 + 0.5) / side - 0.5) * renderer.renderer_config.box_warp  # z y x of padded cells to x y z
    whole = trimesh.Trimesh(points, faces, process=True)
    mesh = max(whole.split(only_watertight=False), key=lambda piece: len(piece.faces))
    if mesh.volume < 0:
        mesh.invert()
    places, normals = (torch.tensor(np.array(x), dtype=torch.float32, device=density.device) for x in (mesh.vertices, mesh.vertex_normals))
    mesh.visual.vertex_colors = _colours(renderer, triplane, places, normals)
    return mesh


def write_mesh(mesh: Any, path: Path) -> None:
    """Write a `trimesh.Trimesh` in scene units in the format of the path's ending; a .glb is life-size by its scene, in metres as glTF has it.

    Args:
        mesh: with vertex colours as screens show them.
        path: ends in .glb, .obj, .ply or .stl.
    """
    if path.suffix.lower() != ".glb":
        with whole(path) as partial:
            mesh.export(partial, file_type=path.suffix[1:].lower())
        return
    shared = np.array(mesh.visual.vertex_colors) / 255
    shared[:, :3] = np.where(shared[:, :3] <= 0.04045, shared[:, :3] / 12.92, ((shared[:, :3] + 0.055) / 1.055) ** 2.4)
    linear = mesh.copy()
    linear.visual.vertex_colors = (shared * 255).round().astype(np.uint8)  # glTF multiplies light by them
    scene = _mesh_libraries()[0].Scene()
    scene.add_geometry(linear, geom_name="head", node_name="head", transform=np.diag([METRES, METRES, METRES, 1.0]))

    def matte(tree: dict[str, Any]) -> None:
        tree["materials"] = [{"name": "skin", "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}]  # else it is metal
        tree["meshes"][0]["primitives"][0]["material"] = 0

    with whole(path) as partial:
        partial.write_bytes(scene.export(file_type="glb", include_normals=True, tree_postprocessor=matte))


def _density_grid(renderer: TriplaneRenderer, triplane: Triplane, side: int) -> Float[Tensor, "z y x"]:
    width = renderer.renderer_config.box_warp
    centres = ((torch.arange(side, device=triplane.planes.device) + 0.5) / side - 0.5) * width
    slabs = []
    for z in centres:  # one slab at a time, for memory's sake
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        points = torch.stack([x, y, z.expand_as(x)], -1).reshape(1, -1, 3)
        ball = SURFACE_DENSITY * (1 + 20 * (MESH_RADIUS - 2 * points[0].norm(dim=-1) / width))
        slabs.append(torch.minimum(F.softplus(renderer.query(triplane, points)[0] - 1).flatten(), ball).view(side, side))
    return torch.stack(slabs)


def _colours(renderer: TriplaneRenderer, triplane: Triplane, points: Float[Tensor, "n 3"], normals: Float[Tensor, "n 3"]) -> UInt8[np.ndarray, "n 4"]:
    """Colours of points of the surface as pictures show them, opaque; what none shows is coloured like the places around it that one does."""
    shown, weight = torch.zeros_like(points), torch.zeros_like(points[:, :1])
    for yaw in KNOWN_YAWS:
        seen, colour = _seen(renderer, triplane, points, normals, yaw)
        shown, weight = shown + seen * colour, weight + seen
    if not weight.any():
        shown, weight = renderer.query(triplane, points[None])[1][0, :, :3], torch.ones_like(weight)
    known = weight[:, 0] > 0
    shown[known] /= weight[known]
    some = known.nonzero()[:, 0]
    some = some[:: len(some) // 500 + 1]
    near = torch.cdist(points[~known], points[some]).clamp(min=1e-3).pow(-8)
    shown[~known] = near @ shown[some] / near.sum(1, keepdim=True)
    return np.pad((shown.clamp(0, 1) * 255).round().byte().cpu().numpy(), ((0, 0), (0, 1)), constant_values=255)


def _seen(
    renderer: TriplaneRenderer, triplane: Triplane, points: Float[Tensor, "n 3"], normals: Float[Tensor, "n 3"], yaw: float
) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 3"]]:
    """Return how squarely a camera looks at points of the surface, 0 where something is in the way, and the colours it sees there."""
    config, camera = renderer.renderer_config, head_camera(torch.tensor([[yaw, 0.0, 0.0]])).to(points.device)
    side = 2 * config.neural_rendering_resolution
    features, alpha, depth = renderer.render_rays(triplane, renderer.rays(camera, side))
    camera = config.in_planes(camera)  # where the points are
    picture = torch.cat([features[..., :3] / alpha.clamp(min=1e-3), depth], -1).mT.unflatten(2, (side, side))  # b c h w
    place = 2 * project(points[None], camera) - 1  # b n 2
    found = F.grid_sample(picture, place[:, None], align_corners=False)[0, :, 0].T  # n c
    towards = camera.cam2world[0, :3, 3] - points
    distance = towards.norm(dim=1, keepdim=True)
    facing = (normals * towards).sum(1, keepdim=True) / distance
    free = (place[0].abs() < 1).all(1, keepdim=True) & (facing > 0.3) & (distance < found[:, 3:] + 0.03)
    return free * facing**8, found[:, :3]
