"""A mesh that other programs read, and ONNX graphs that say what the avatar shows."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import trimesh
from trimesh.visual import ColorVisuals

from talk3d.apps.cli import main
from talk3d.errors import ConfigError
from talk3d.io.weights import load_avatar
from talk3d.models.avatar import Avatar
from talk3d.stages.export import export_mesh, export_onnx
from talk3d.types import Driving


def test_the_mesh_is_a_closed_coloured_head(tmp_path: Path) -> None:
    export_mesh(load_avatar("sample"), tmp_path / "head.glb", side=48)
    mesh = trimesh.load(tmp_path / "head.glb", force="mesh", skip_materials=True)
    assert isinstance(mesh, trimesh.Trimesh) and isinstance(mesh.visual, ColorVisuals) and mesh.is_watertight
    assert (np.abs(mesh.vertices) <= 0.2).all() and 0.13 < np.ptp(mesh.vertices[:, 0]) < 0.25  # metres
    colours = np.asarray(mesh.visual.vertex_colors)
    assert len(colours) == len(mesh.vertices) and colours[:, :3].std() > 10 and (colours[:, 3] == 255).all()


def test_other_endings_are_refused(tiny_avatar: Avatar, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"head\.txt is no mesh"):
        export_mesh(tiny_avatar, tmp_path / "head.txt")


def run(path: Path, **inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])


@pytest.mark.parametrize("rest_pose", [None, (0.3, -0.2, 0.1)])
def test_the_graphs_show_what_the_avatar_shows(tiny_avatar: Avatar, tmp_path: Path, rest_pose: tuple[float, float, float] | None) -> None:
    renderer = tiny_avatar.personalized.renderer
    renderer.renderer_config = replace(renderer.renderer_config, rest_pose=rest_pose, throat_y=-0.28)
    tiny_avatar.save(tmp_path / "me.t3d")
    arguments = ["export", str(tmp_path / "me.t3d"), "--onnx", str(tmp_path / "graphs")]
    code = f"import sys; from talk3d.apps.cli import main; sys.exit(main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # tracing does not go with the type hook
    assert done.returncode == 0, done.stderr
    written = [Path(line) for line in done.stdout.split()]
    assert [path.name for path in written] == ["talker.onnx", "renderer.onnx", "avatar.json"]
    assert sorted((tmp_path / "graphs").iterdir()) == sorted(written)
    card = json.loads(written[2].read_text())
    assert card["opset"] == 18 and card["audio_source"] == "logmel64"
    avatar = load_avatar(tmp_path / "me.t3d").eval()
    performance = avatar.performance
    for frame in (1, 4):
        parts = {name: getattr(performance, name)[frame : frame + 1] for name in ("blink", "head_pose", "anchors", "upper_face")}
        driving, camera = Driving(audio=torch.randn(1, 8, 16, 64), **parts), performance.cameras[frame : frame + 1]
        heard = {"audio": driving.audio, **parts}
        assert {name: list(value.shape) for name, value in heard.items()} == card["talker.onnx"]["inputs"]
        planes = run(written[0], **heard)
        held = {} if rest_pose is None else {"head_pose": driving.head_pose}
        found = run(written[1], planes=torch.from_numpy(planes), cam2world=camera.cam2world, intrinsics=camera.intrinsics, **held)
        assert list(found.shape) == card["renderer.onnx"]["outputs"]["rgba"]
        with torch.no_grad():
            delta = avatar.deltaplane(driving)
            expected = avatar.bake().render(driving, camera)
        np.testing.assert_allclose(planes, (avatar.personalized.triplane + delta).planes.detach().numpy(), atol=1e-4)
        pictures = torch.cat([(expected.image + 1) / 2, expected.alpha], 1).clamp(0, 1).numpy()
        assert np.square(found - pictures).mean() < 10**-4.5  # super-resolution may be in bfloat16 there


def test_a_missing_library_is_named(tiny_avatar: Avatar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"ONNX graphs need onnxscript: pip install 'talk3d\[onnx\]'"):
        export_onnx(tiny_avatar, tmp_path / "graphs")
    assert not (tmp_path / "graphs").exists()


def test_the_command_exports_what_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "sample", "--mesh", str(tmp_path / "head.ply"), "--mesh-side", "32"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "head.ply") and (tmp_path / "head.ply").stat().st_size > 1000
    assert main(["export", "sample"]) == 2
    assert main(["export", str(tmp_path / "absent"), "--mesh", str(tmp_path / "head.ply")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "give --mesh head.glb" in errors[0] and "does not exist" in errors[1]
