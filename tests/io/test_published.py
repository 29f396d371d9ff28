"""Published checkpoints: tensors come out whatever the layout, and become files of ours to the bit."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from talk3d.errors import Talk3DError, WeightsError
from talk3d.io.published import import_checkpoint, import_talk3d, load_talk3d, read_checkpoint, read_state_dict, spread_of
from talk3d.io.weights import load_prior
from talk3d.models.avatar import RELEASED
from talk3d.models.conditioning import Conditioner
from talk3d.models.deltaplane import DeltaplanePredictor
from talk3d.models.generator import TriplaneGenerator

STATE = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.tensor([1.5, 2.5]).half()}
WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "archive": torch.save,
    "legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "pickle": lambda state, path: path.write_bytes(pickle.dumps(state, protocol=4)),
    "safetensors": save_file,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_state_dicts_of_every_layout(layout: str, tmp_path: Path) -> None:
    WRITERS[layout](STATE, tmp_path / "x.pth")
    found = read_state_dict(tmp_path / "x.pth")
    assert found.keys() == STATE.keys() and all(found[name].equal(STATE[name]) and found[name].dtype == STATE[name].dtype for name in STATE)


@pytest.mark.parametrize("layout", ["archive", "legacy"])
def test_nested_checkpoints_lose_only_their_optimizer(layout: str, tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    adam = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    adam.step()
    scheduler = torch.optim.lr_scheduler.StepLR(adam, 3)
    whole = {"params_ema": STATE, "optimizer": adam, "scheduler": scheduler, "optimizer_state": adam.state_dict(), "step": 7}
    WRITERS[layout](whole, tmp_path / "x.pth")
    found = read_checkpoint(tmp_path / "x.pth")
    assert found.keys() == {"params_ema", "optimizer_state", "step"} and found["step"] == 7
    assert found["params_ema"]["a.weight"].equal(STATE["a.weight"]) and found["optimizer_state"]["param_groups"][0]["lr"] == 0.001
    with pytest.raises(WeightsError, match="holds optimizer_state, params_ema, step beside tensors"):
        read_state_dict(tmp_path / "x.pth")


def test_whole_modules_are_refused_by_name(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"x\.pth: it wants the global torch\.nn\.modules\.linear\.Linear") as caught:
        read_checkpoint(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def checkpoint(**more: Any) -> dict[str, Any]:
    conditioner, predictor = Conditioner(RELEASED.conditioning), DeltaplanePredictor(RELEASED.deltaplane)
    adam = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    names = ("audio_net", "audio_att_net", "blink_encoder", "camera_encoder")
    encoders = {name: conditioner.get_submodule(name).state_dict() for name in names}
    return {
        "deltaplane_predictor": predictor.state_dict(),
        **encoders,
        "null_vector": conditioner.null_vector,
        "epoch": 3,
        "iter": 1200,
        "optimizer": adam,
        "scheduler": torch.optim.lr_scheduler.StepLR(adam, 10),
        **more,
    }


@pytest.mark.parametrize("pictures", ["none", "superresolution", "restoration"])
def test_talk3d_comes_back_and_converts_to_the_bit(pictures: str, tmp_path: Path) -> None:
    tuned = {"superresolution": {"block0.conv0.bias": torch.randn(3)}, "restoration": {"stylegan_decoder.constant_input.weight": torch.randn(2)}}
    whole = checkpoint(**({"superresolution": tuned[pictures]} if pictures != "none" else {}))
    torch.save(whole, tmp_path / "3_1200.pt")
    summary = import_checkpoint(tmp_path / "3_1200.pt", tmp_path / "out.safetensors")
    assert summary["kind"] == "Talk3D" and summary["also"] == ([pictures] if pictures != "none" else [])
    for parts in (import_talk3d(tmp_path / "3_1200.pt"), load_talk3d(tmp_path / "out.safetensors")):
        assert not parts.predictor.training and not parts.conditioner.training
        for name, value in parts.predictor.state_dict().items():
            assert value.equal(whole["deltaplane_predictor"][name]), name
        for name, value in parts.conditioner.state_dict().items():
            part, _, rest = name.partition(".")
            assert value.equal(whole[part][rest] if rest else whole[part].detach()), name
        assert (parts.provenance["epoch"], parts.provenance["iter"]) == (3, 1200)
        for kind, tensors in tuned.items():
            held = getattr(parts, kind)
            assert held.keys() == (tensors.keys() if kind == pictures else set()) and all(held[name].equal(tensors[name]) for name in held)
    assert load_talk3d(tmp_path / "out.safetensors").provenance["source_sha256"] == summary["source_sha256"]


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in checkpoint().items() if name not in names}


def test_what_is_no_talk3d_says_why(tmp_path: Path) -> None:
    for whole, said in (
        (without("audio_net"), "lacks the tensors of audio_net"),
        (without("null_vector"), "makes no sense"),
        (checkpoint(superresolution={"x": torch.ones(1)}), "neither EG3D's nor GFPGAN"),
        (checkpoint(blink_encoder={"x": torch.ones(1)}), "its conditioning does not fit the model"),
        ([1, 2], "a dict is expected"),
    ):
        torch.save(whole, tmp_path / "x.pt")
        with pytest.raises(WeightsError, match=said) as caught:
            import_checkpoint(tmp_path / "x.pt", tmp_path / "out")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_generator_becomes_a_prior_to_the_bit(write_eg3d: Callable[..., tuple[Path, TriplaneGenerator]], tmp_path: Path) -> None:
    path, written = write_eg3d(axes=None)
    summary = import_checkpoint(path, tmp_path / "prior.safetensors", plane_axes="fixed")
    prior = load_prior(tmp_path / "prior.safetensors")
    mine, theirs = prior.generator.state_dict(), written.state_dict()
    assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)
    assert prior.generator.config.renderer.plane_axes == summary["plane_axes"] == "fixed" == prior.provenance["plane_axes"]
    assert prior.provenance["source_sha256"] == summary["source_sha256"] and len(summary["source_sha256"]) == 64
    assert summary["kind"] == "prior" and summary["pixels"] == 128 and json.dumps(summary)
    assert prior.w_std == pytest.approx(summary["w_std"]) and prior.w_std > 0


def test_the_spread_is_that_of_mapped_latents(write_eg3d: Callable[..., tuple[Path, TriplaneGenerator]]) -> None:
    _, generator = write_eg3d(c_dim=0)
    with torch.no_grad():
        rows = generator.mapping(torch.randn(4000, 24))[:, 0]
    expected = (rows - rows.mean(0)).square().mean().sqrt()
    assert spread_of(generator) == pytest.approx(float(expected), rel=0.03)
    _, labelled = write_eg3d()
    assert spread_of(labelled, 100) == spread_of(labelled, 100) > 0


def test_an_unwritable_place_is_an_error(write_eg3d: Callable[..., tuple[Path, TriplaneGenerator]], tmp_path: Path) -> None:
    path, _ = write_eg3d()
    with pytest.raises(Talk3DError, match="cannot write"):
        import_checkpoint(path, tmp_path / "missing" / "out")


def test_names_of_the_published_networks(shared: Path, tmp_path: Path) -> None:
    """A checkpoint with exactly the published names and sizes is read."""
    sizes = json.loads((shared / "fixtures" / "state_dict_keys.json").read_text())
    parts = ("deltaplane_predictor", "blink_encoder", "camera_encoder", "audio_net", "audio_att_net")
    whole: dict[str, Any] = {part: {name: torch.zeros(size) for name, size in sizes[f"talk3d_{part}"].items()} for part in parts}
    whole["null_vector"] = torch.zeros(1, 1, 64)
    torch.save(whole, tmp_path / "x.pt")
    assert import_talk3d(tmp_path / "x.pt").predictor.training is False
