"""Generators out of EG3D's pickles: every way in which they were written, and nothing that is none of theirs."""

import pickle
import pickletools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import talk3d
from talk3d.errors import WeightsError
from talk3d.io.eg3d import import_eg3d
from talk3d.models.generator import TriplaneGenerator
from talk3d.models.superresolution import PUBLISHED
from talk3d.types import Camera

Writer = Callable[..., tuple[Path, TriplaneGenerator]]
SUPERRESOLUTIONS = [name for name in PUBLISHED if not name.startswith("SuperresolutionHybrid8")]
ANOTHER_RUN = "_imported_module_" + "0123456789abcdef" * 2


def same(found: TriplaneGenerator, written: TriplaneGenerator) -> None:
    assert found.config == written.config and not found.training
    mine, theirs = found.state_dict(), written.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(mine[name].dtype == torch.float32 and mine[name].equal(theirs[name]) for name in mine)


@pytest.mark.parametrize("superresolution", SUPERRESOLUTIONS)
def test_every_superresolution_is_known(superresolution: str, write_eg3d: Writer) -> None:
    path, written = write_eg3d(superresolution)
    same(import_eg3d(path), written)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("old_numpy", [True, False])
def test_protocols_and_names_of_numpy(protocol: int, old_numpy: bool, write_eg3d: Writer, make_way: Callable[..., Any]) -> None:
    path, written = write_eg3d(way=make_way(protocol=protocol, old_numpy=old_numpy, easy=protocol % 2 == 0))
    same(import_eg3d(path), written)


WAYS: dict[str, dict[str, Any]] = {
    "tuned to a person": {"way": {"tuned": True}},
    "tuned, easy dicts, protocol 2": {"way": {"tuned": True, "protocol": 2, "easy": True}},
    "saved again after loading": {"way": {"decoder_module": ANOTHER_RUN}},
    "released axes": {"axes": "released"},
    "no axes": {"axes": None},
    "other sizes": {"z_dim": 16, "w_dim": 48, "channel_base": 256, "channel_max": 24, "mapping_layers": 3, "neural_rendering_resolution": 33},
    "no camera label": {"c_dim": 0},
    "label ignored": {"c_gen_conditioning_zero": True},
    "label not scaled": {"c_scale": 0.0},
    "clamp": {"conv_clamp": 256.0},
    "automatic limits": {"ray_start": "auto", "ray_end": "auto"},
    "disparity, white": {"disparity_space_sampling": True, "white_back": True},
    "decoder rate": {"decoder_lr_mul": 0.5},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_way_of_writing(way: dict[str, Any], write_eg3d: Writer, make_way: Callable[..., Any]) -> None:
    path, written = write_eg3d(**way | {"way": make_way(**way.get("way", {}))})
    same(import_eg3d(path), written)


def test_the_axes_of_the_user_win(write_eg3d: Writer) -> None:
    path, _ = write_eg3d(axes=None)
    assert import_eg3d(path, plane_axes="fixed").config.renderer.plane_axes == "fixed"


def test_axes_that_do_not_exist_are_refused() -> None:
    """In a process of its own, where the annotations are not checked."""
    code = "import talk3d; talk3d.import_eg3d('absent.pkl', plane_axes='crooked')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ConfigError: plane_axes is 'crooked', it may be 'fixed', 'released' or None" in ran.stderr


def test_without_half_precision_nothing_is_clamped(write_eg3d: Writer) -> None:
    def change(tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> None:
        attributes["superresolution.block1.conv1"] = {"conv_clamp": 256}
        attributes["backbone.synthesis.b32.conv1"] = {"conv_clamp": None}
        attributes[""]["_init_kwargs"]["num_fp16_res"] = 4
        del attributes[""]["_init_kwargs"]["conv_clamp"]

    path, _ = write_eg3d(change=change)
    config = import_eg3d(path).config
    assert config.conv_clamp is None and config.renderer.superresolution.conv_clamp == 256.0


def test_filters_that_the_file_lacks_are_filled_in(write_eg3d: Writer) -> None:
    def change(tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> None:
        for name in [name for name in tensors if name.endswith("resample_filter")]:
            del tensors[name]

    path, written = write_eg3d(change=change)
    same(import_eg3d(path), written)


def lost(tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> None:
    del tensors["backbone.synthesis.b8.conv0.bias"]


def surplus(tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> None:
    tensors["backbone.synthesis.b8.conv0.more"] = torch.ones(3)


def misshapen(tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> None:
    tensors["backbone.synthesis.b8.conv0.bias"] = torch.ones(3)


def refiltered(tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> None:
    tensors["backbone.synthesis.b8.conv1.resample_filter"] += 0.1


def odd_axes(tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> None:
    attributes["renderer"]["plane_axes"] = torch.ones(3, 3, 3)


def other_clamp(tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> None:
    attributes[""]["rendering_kwargs"]["clamp_mode"] = "relu"


def no_rays(tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> None:
    del attributes[""]["rendering_kwargs"]["ray_end"]


def endless_rays(tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> None:
    attributes[""]["rendering_kwargs"]["depth_resolution"] = 10**9


def half_automatic(tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> None:
    attributes[""]["rendering_kwargs"]["ray_end"] = "auto"


def huge_picture(tensors: dict[str, torch.Tensor], attributes: dict[str, dict[str, Any]]) -> None:
    attributes[""]["neural_rendering_resolution"] = 10**6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lost, r"does not fit the model: missing \['backbone.synthesis.b8.conv0.bias'\]"),
        (surplus, r"unexpected \['backbone.synthesis.b8.conv0.more'\]"),
        (misshapen, r"wrong shape \['backbone.synthesis.b8.conv0.bias \(3,\) instead of \(32,\)'\]"),
        (refiltered, "another resampling filter than EG3D's"),
        (odd_axes, "plane_axes are neither"),
        (other_clamp, "clamp_mode=relu, expected softplus"),
        (no_rays, "lacks ray_end"),
        (endless_rays, "depth_resolution=1000000000, expected int from 0 to 1024"),
        (half_automatic, "ray_end=auto, expected float"),
        (huge_picture, "neural_rendering_resolution is 1000000"),
    ],
)
def test_what_is_not_eg3ds_is_refused_in_one_line(change: Callable[..., None], said: str, write_eg3d: Writer) -> None:
    path, _ = write_eg3d(change=change)
    with pytest.raises(WeightsError, match=said) as caught:
        import_eg3d(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_other_classes_are_ignored_beside_the_generator_and_refused_inside(write_eg3d: Writer) -> None:
    path, written = write_eg3d(beside=lambda names: {"D": names.plain_class("training.dual_discriminator", "DualDiscriminator")()})
    same(import_eg3d(path), written)
    path, _ = write_eg3d(beside=lambda names: {"G_ema": names.plain_class("training.other", "Generator")()})
    with pytest.raises(WeightsError, match="Generator"):
        import_eg3d(path)


@pytest.mark.parametrize("root", [None, {}, {"G_ema": None}, {"G": 3}])
def test_a_file_without_generator_says_so(root: Any, tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(root, protocol=4))
    with pytest.raises(WeightsError, match="expected"):
        import_eg3d(tmp_path / "x.pkl")


def test_the_known_generator_gives_the_known_numbers(shared: Path) -> None:
    generator = talk3d.import_eg3d(shared / "fixtures" / "eg3d_tiny128.pkl")
    arrays, weights = (np.load(shared / "fixtures" / f"eg3d_tiny128_{kind}.npz") for kind in ("expected", "weights"))
    expected = {name: torch.from_numpy(arrays[name]).float() for name in arrays.files}
    mine = generator.state_dict()
    assert mine.keys() == set(weights.files) and all(np.array_equal(mine[name].numpy(), weights[name]) for name in mine)
    with torch.no_grad():
        ws = generator.mapping(expected["z"], expected["c"])
        torch.testing.assert_close(ws, expected["ws"], atol=1e-4, rtol=0)
        rendering = generator.render(ws, Camera.from_label(expected["c"]))
    torch.testing.assert_close(rendering.raw, expected["image_raw_fixed_axes"], atol=1e-4, rtol=0)
    torch.testing.assert_close(rendering.depth, expected["image_depth_fixed_axes"], atol=1e-4, rtol=0)
    torch.testing.assert_close(rendering.image, expected["image_fixed_axes"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["own", "known"])
def test_changed_bytes_give_typed_errors_only(kind: str, write_eg3d: Writer, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = write_eg3d()[0] if kind == "own" else request.getfixturevalue("shared") / "fixtures" / "eg3d_tiny128.pkl"
    original = path.read_bytes()
    places = [place for _, _, place in pickletools.genops(original) if place is not None]

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 5), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 10**8))
    def change(changes: list[tuple[int, int, int]], length: int) -> None:
        data = bytearray(original)
        for number, further, value in changes:
            data[min(places[number % len(places)] + further, len(data) - 1)] = value
        (tmp_path / "changed.pkl").write_bytes(data[: length or None])
        try:
            import_eg3d(tmp_path / "changed.pkl")
        except WeightsError as error:
            assert "\n" not in str(error)

    change()
