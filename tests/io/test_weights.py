"""Weights on disk: exact round trips, atomic writes, and one-line errors for every damaged file."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from talk3d.errors import Talk3DError, WeightsError
from talk3d.io.weights import (
    config_from_json,
    config_to_json,
    load_avatar,
    load_person,
    load_prior,
    load_strictly,
    load_tensors,
    pack_state,
    save_avatar,
    save_tensors,
    unpack_state,
)
from talk3d.models.avatar import Avatar, Performance, PersonalizedGenerator, Prior
from talk3d.models.encoder import Encoder
from talk3d.models.generator import TriplaneGenerator
from talk3d.ops.geometry import head_camera
from talk3d.presets import BUILTIN256, TINY, TINY_AVATAR, TINY_ENCODER
from talk3d.types import Driving


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "thing.safetensors"
    save_tensors(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bool)}, {"kind": "thing", "number": 3})
    return path


def test_tensors_and_header_come_back(saved: Path) -> None:
    tensors, header = load_tensors(saved, "thing")
    assert tensors["a"].equal(torch.arange(6.0).view(2, 3)) and tensors["b"].dtype == torch.bool
    assert header == {"kind": "thing", "number": 3}
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_shared_strided_and_learnt_tensors_can_be_saved(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    learnt = nn.Parameter(torch.ones(2))
    save_tensors(tmp_path / "x", {"whole": whole, "same": whole, "turned": whole.T, "learnt": learnt}, {"kind": "thing"})
    tensors, _ = load_tensors(tmp_path / "x", "thing")
    assert tensors["turned"].equal(whole.T) and tensors["same"].equal(whole) and not tensors["learnt"].requires_grad


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def scribble(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("no weights, just words\n" * 20)


def broken_header(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path, metadata={"talk3d": "{not json"})


@pytest.mark.parametrize("damage", [truncate, scribble, empty, text, broken_header])
def test_damaged_files_are_refused_in_one_line(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(WeightsError, match="is no saved thing, or a damaged one") as caught:
        load_tensors(saved, "thing")
    assert saved.name in str(caught.value) and "\n" not in str(caught.value)


def foreign(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path)


def other_kind(path: Path) -> None:
    save_tensors(path, {"a": torch.ones(1)}, {"kind": "prior"})


def list_header(path: Path) -> None:
    save_file({"a": torch.ones(1)}, path, metadata={"talk3d": "[1]"})


@pytest.mark.parametrize(("make", "found"), [(foreign, "something else"), (other_kind, "prior"), (list_header, "something else")])
def test_files_of_another_kind_are_named(tmp_path: Path, make: Callable[[Path], None], found: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(WeightsError, match=f"holds {found}, expected a talk3d avatar"):
        load_tensors(tmp_path / "x", "avatar")


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_what_is_no_file_is_said_so(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="is not a file: give the path of a saved avatar"):
        load_tensors(tmp_path / name, "avatar")


def test_an_unwritable_place_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "missing" / "x", tmp_path / "folder"):
        with pytest.raises(WeightsError, match="cannot write") as caught:
            save_tensors(target, {"a": torch.ones(1)}, {"kind": "thing"})
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failing_write_keeps_the_old_file_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(WeightsError, match="disk full"):
        save_tensors(saved, {"a": torch.zeros(100)}, {"kind": "thing"})
    assert saved.read_bytes() == before and [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_header_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(WeightsError, match="damaged"):
        load_tensors(tmp_path / "x", "thing")


def test_strict_loading_copies_and_widens() -> None:
    module = nn.Linear(2, 3)
    load_strictly(module, {"weight": torch.full((3, 2), 0.5, dtype=torch.float16), "bias": torch.ones(3)}, "x")
    assert module.weight.eq(0.5).all() and module.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"weight": torch.ones(3, 2)}, r"missing \['bias'\]"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(3), "more": torch.ones(1)}, r"unexpected \['more'\]"),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(3)}, r"wrong shape \['weight \(2, 3\) instead of \(3, 2\)'\]"),
    ],
)
def test_strict_loading_says_what_does_not_fit_and_changes_nothing(tensors: dict[str, torch.Tensor], said: str) -> None:
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    with pytest.raises(WeightsError, match=said):
        load_strictly(module, tensors, "x")
    assert module.weight.equal(before)


@dataclass(frozen=True, kw_only=True)
class Inner:
    pair: tuple[int, int] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@pytest.mark.parametrize("config", [Outer(inner=Inner(pair=(3, 4)), kind="b"), BUILTIN256, TINY_AVATAR])
def test_configs_come_back_from_json(config: object) -> None:
    assert config_from_json(type(config), json.loads(json.dumps(config_to_json(config))), "x") == config


@pytest.mark.parametrize("values", [{"inner": {"pair": [1, 2]}, "more": 1}, {}, {"inner": {"pair": 3}}, {"inner": 4}, {"inner": {"trio": []}}])
def test_configs_of_another_version_are_refused(values: object) -> None:
    with pytest.raises(WeightsError, match="incompatible version"):
        config_from_json(Outer, values, "x")


def test_states_are_packed_and_unpacked_with_the_optimiser() -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.Adam([{"params": [module.weight], "betas": (0.0, 0.99)}, {"params": [module.bias], "lr": 0.1}])
    module(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {
        "module": module.state_dict(),
        "adam": optimizer.state_dict(),
        "numbers": [1, 2.5, None, "x", True],
        "by number": {3: {"t": torch.ones(2)}},
    }
    tensors, skeleton = pack_state(state)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # as a file would
    back = unpack_state(tensors, json.loads(json.dumps(skeleton)))
    assert back["numbers"] == [1, 2.5, None, "x", True] and back["by number"][3]["t"].equal(torch.ones(2))
    assert back["module"]["weight"].equal(module.weight)
    other = nn.Linear(3, 2)
    other.load_state_dict(back["module"])
    fresh = torch.optim.Adam([{"params": [other.weight]}, {"params": [other.bias]}])
    fresh.load_state_dict(back["adam"])
    x = torch.randn(4, 3)
    for net, opt in ((module, optimizer), (other, fresh)):
        opt.zero_grad()
        net(x).square().sum().backward()
        opt.step()
    assert other.weight.equal(module.weight) and other.bias.equal(module.bias)


@pytest.fixture
def prior() -> Prior:
    torch.manual_seed(3)
    return Prior(generator=TriplaneGenerator(TINY).eval(), w_std=0.7, provenance={"dataset": "none", "steps": 0})


@pytest.fixture
def person(prior: Prior) -> PersonalizedGenerator:
    ws = prior.generator.mapping(torch.randn(1, 8))
    return PersonalizedGenerator.from_generator(prior.generator, ws, {"source_sha256": "abc", "frames": [1, 2]})


@pytest.fixture
def avatar(person: PersonalizedGenerator) -> Avatar:
    person.occupied[:5] = False
    made = Avatar(
        personalized=person,
        config=TINY_AVATAR,
        performance=Performance(
            cameras=head_camera(torch.randn(4, 3) * 0.2),
            blink=torch.rand(4, 1),
            head_pose=torch.randn(4, 3),
            anchors=torch.rand(4, 6),
            upper_face=torch.randn(4, 5) / 20,
        ),
        background=torch.rand(3, 64, 64) * 2 - 1,
        audio_source="logmel64",
        fps=30.0,
        provenance={"source_sha256": "abc", "train": {"steps": 3}},
    )
    for layer in made.predictor.out.values():
        assert isinstance(layer, nn.Conv2d)
        nn.init.normal_(layer.weight, std=2.0)
    return made.eval()


def halves(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def test_avatars_of_before_cheeks_were_followed_have_them_at_rest(avatar: Avatar, tmp_path: Path) -> None:
    save_avatar(avatar, tmp_path / "new.t3d")
    with safe_open(tmp_path / "new.t3d", "pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = "performance.upper_face"
    save_file(tensors | {name: tensors[name][:, :4].contiguous()}, tmp_path / "old.t3d", header)
    again = load_avatar(tmp_path / "old.t3d").performance.upper_face
    assert again[:, :4].equal(avatar.performance.upper_face[:, :4]) and not again[:, 4].any()


def test_a_prior_comes_back_within_half_precision(prior: Prior, tmp_path: Path) -> None:
    prior.save(tmp_path / "prior.safetensors")
    back = load_prior(tmp_path / "prior.safetensors")
    assert back.generator.config == TINY and back.w_std == 0.7 and back.provenance == prior.provenance and not back.training
    for name, value in prior.generator.state_dict().items():
        assert back.generator.state_dict()[name].equal(halves(value)), name


def test_a_priors_encoder_comes_back_with_it(prior: Prior, tmp_path: Path) -> None:
    prior.encoder = Encoder(TINY_ENCODER, 16).eval()
    prior.save(tmp_path / "prior.safetensors")
    back = load_prior(tmp_path / "prior.safetensors").encoder
    assert back is not None and back.config == TINY_ENCODER and not back.training
    for name, value in prior.encoder.state_dict().items():
        assert back.state_dict()[name].equal(halves(value)), name


def test_a_person_comes_back_within_half_precision(person: PersonalizedGenerator, tmp_path: Path) -> None:
    person.save(str(tmp_path / "person.safetensors"))
    back = load_person(tmp_path / "person.safetensors")
    assert back.provenance == person.provenance and back.renderer.renderer_config == TINY.renderer
    assert back.identity.equal(halves(person.identity)) and back.occupied.equal(person.occupied) and back.w.equal(halves(person.w))
    camera = head_camera(torch.zeros(1, 3))
    with torch.no_grad():
        torch.testing.assert_close(back.render(back.triplane, camera).raw, person.render(person.triplane, camera).raw, atol=0.02, rtol=0)


def test_an_avatar_gives_the_same_frames_and_performance(avatar: Avatar, tmp_path: Path) -> None:
    avatar.save(tmp_path / "avatar.safetensors")
    back = load_avatar(tmp_path / "avatar.safetensors")
    assert (back.fps, back.audio_source, back.provenance, back.config) == (30.0, "logmel64", avatar.provenance, TINY_AVATAR)
    assert back.personalized.provenance == avatar.personalized.provenance and not back.training
    torch.testing.assert_close(back.performance.cameras.to_label(), avatar.performance.cameras.to_label())
    for name in ("blink", "head_pose", "anchors", "upper_face"):
        assert getattr(back.performance, name).equal(getattr(avatar.performance, name))
    torch.testing.assert_close(back.background, avatar.background, atol=1e-3, rtol=0)
    driving = Driving(
        audio=torch.randn(2, 8, 16, 64),
        blink=torch.rand(2, 1),
        head_pose=torch.randn(2, 3),
        anchors=torch.rand(2, 6),
        upper_face=torch.randn(2, 5) / 20,
    )
    with torch.no_grad():
        mine, theirs = (model.render(driving, avatar.performance.cameras[:2]) for model in (avatar, back))
        silent = avatar.personalized.render(avatar.personalized.triplane, avatar.performance.cameras[:1]).image
    assert (mine.image - theirs.image).abs().mean() < 0.1 * (mine.image[:1] - silent).abs().mean()
    assert (mine.image - theirs.image).abs().mean() < 0.02
    back.save(tmp_path / "again.safetensors")
    assert load_tensors(tmp_path / "again.safetensors", "avatar")[0]["personalized.identity"].equal(avatar.personalized.identity.half())


def test_each_reader_refuses_the_other_files(prior: Prior, person: PersonalizedGenerator, avatar: Avatar, tmp_path: Path) -> None:
    prior.save(tmp_path / "prior")
    person.save(tmp_path / "person")
    avatar.save(tmp_path / "avatar")
    readers = {"prior": load_prior, "person": load_person, "avatar": load_avatar}
    for name, read in readers.items():
        for other in readers.keys() - {name}:
            with pytest.raises(WeightsError, match=f"holds {other}, expected a talk3d {name}"):
                read(tmp_path / other)


@pytest.mark.parametrize("change", ["config", "weights"])
def test_a_file_of_another_version_is_refused_in_one_line(prior: Prior, tmp_path: Path, change: str) -> None:
    prior.save(tmp_path / "prior")
    tensors, header = load_tensors(tmp_path / "prior", "prior")
    if change == "config":
        header["config"]["colour"] = "red"
    else:
        del tensors["backbone.mapping.w_avg"]
    save_tensors(tmp_path / "prior", tensors, header)
    with pytest.raises(WeightsError, match="incompatible version" if change == "config" else "does not fit the model") as caught:
        load_prior(tmp_path / "prior")
    assert "\n" not in str(caught.value)


def test_saving_where_nothing_can_be_written_is_an_error(avatar: Avatar, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot write"):
        save_avatar(avatar, tmp_path / "missing" / "avatar")


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="give the path of a saved avatar"):
        load_avatar(tmp_path / "avatar")


def test_the_builtin_prior_is_a_head() -> None:
    prior = load_prior()
    assert prior.generator.config == BUILTIN256 and prior.w_std > 0
    ws = prior.generator.mapping(torch.zeros(1, 256) + 1e-3, truncation_psi=0.0)
    with torch.no_grad():
        rendering = prior.generator.render(ws, head_camera(torch.zeros(1, 3)), neural_rendering_resolution=24)
    alpha = rendering.raw_alpha[0, 0]
    assert alpha[12, 12] > 0.9 and alpha[0, 0] < 0.1  # solid in the middle, nothing in the corner
    assert 2.3 < rendering.depth[0, 0, 12, 12] < 2.9


def test_headers_must_be_complete(tmp_path: Path) -> None:
    path = tmp_path / "half.t3d"
    save_tensors(path, {"x": torch.zeros(1)}, {"kind": "avatar", "config": {}, "fps": 25.0})
    with pytest.raises(WeightsError, match="lacks audio_source, person, provenance, renderer"):
        load_tensors(path, "avatar")


def loop_of(path: Path) -> object:
    """Read a checkpoint as training does."""
    tensors, header = load_tensors(path, "checkpoint")
    return unpack_state(tensors, header["skeleton"])


@pytest.fixture
def files(prior: Prior, person: PersonalizedGenerator, avatar: Avatar, tmp_path: Path) -> dict[str, Path]:
    for kind, thing in (("prior", prior), ("person", person), ("avatar", avatar)):
        thing.save(tmp_path / kind)
    tensors, skeleton = pack_state({"a": [torch.ones(3), {"b": 2}], "c": 3})
    save_tensors(tmp_path / "checkpoint", tensors, {"kind": "checkpoint", "step": 4, "skeleton": skeleton})
    return {kind: tmp_path / kind for kind in READERS}


READERS: dict[str, Callable[[Path], object]] = {"prior": load_prior, "person": load_person, "avatar": load_avatar, "checkpoint": loop_of}
ODD = [None, True, 0, -1, 7, 2**31, 2**63, 0.5, float("nan"), "", "auto", [], {}, [[1]], {"a": 1}]


def refused_or_read(read: Callable[[Path], object], path: Path) -> None:
    try:
        read(path)
    except Talk3DError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("kind", READERS)
def test_changed_bytes_give_typed_errors_only(kind: str, files: dict[str, Path]) -> None:
    original = files[kind].read_bytes()
    header_end = 8 + int.from_bytes(original[:8], "little")

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, header_end), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 50))
    def change(changes: list[tuple[int, int]], lost: int) -> None:
        data = bytearray(original)
        for place, value in changes:
            data[place] = value
        files[kind].write_bytes(data[: len(data) - max(0, lost - 40)])
        refused_or_read(READERS[kind], files[kind])

    change()


def places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inner for place in [(*path, key), *places(part, (*path, key))]]


@pytest.mark.parametrize("kind", READERS)
def test_changed_headers_give_typed_errors_only(kind: str, files: dict[str, Path]) -> None:
    tensors, header = load_tensors(files[kind], kind)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 1000), st.sampled_from(ODD)), min_size=1, max_size=2), st.none() | st.integers(0, 1000))
    def change(changes: list[tuple[int, object]], shrunk: int | None) -> None:
        changed = json.loads(json.dumps(header))
        for number, value in changes:
            *outer, last = places(changed)[number % len(places(changed))]
            within = changed
            for key in outer:
                within = within[key]
            within[last] = json.loads(json.dumps(value))  # a copy: the odd ones must not come to hold themselves
        names = sorted(tensors)
        odd = {names[shrunk % len(names)]: torch.zeros(2)} if shrunk is not None else {}
        save_tensors(files[kind], tensors | odd, changed)
        refused_or_read(READERS[kind], files[kind])

    change()


def test_settings_of_a_giant_are_refused_before_one_is_made(files: dict[str, Path]) -> None:
    for kind, name in (("prior", "z_dim"), ("prior", "mapping_layers"), ("person", "plane_resolution")):
        tensors, header = load_tensors(files[kind], kind)
        usual = header["config"][name]
        header["config"][name] = 2**20
        save_tensors(files[kind], tensors, header)
        with pytest.raises(WeightsError, match="far larger than its tensors"):
            READERS[kind](files[kind])
        header["config"][name] = 2**30
        save_tensors(files[kind], tensors, header)
        with pytest.raises(WeightsError, match="1073741824 stands where int is expected"):
            READERS[kind](files[kind])
        header["config"][name] = usual
        save_tensors(files[kind], tensors, header)


def test_an_avatar_must_fit_together(files: dict[str, Path]) -> None:
    whole, header = load_tensors(files["avatar"], "avatar")
    for change, said in (
        ({"performance.blink": torch.zeros(2, 1)}, "the performance in .*does not fit"),
        ({"background": torch.zeros(5)}, "background of three colours"),
    ):
        save_tensors(files["avatar"], whole | change, header)
        with pytest.raises(WeightsError, match=said):
            load_avatar(files["avatar"])
    header["config"]["deltaplane"]["plane_resolution"] = 64
    save_tensors(files["avatar"], whole, header)
    with pytest.raises(WeightsError, match="moves other planes than its person has"):
        load_avatar(files["avatar"])


@pytest.mark.parametrize(
    "values",
    [{"inner": {"pair": [1, 2]}, "rate": "fast"}, {"inner": {"pair": [1]}}, {"inner": {"pair": [1, 2.5]}}, {"inner": {}, "kind": "c"}],
)
def test_settings_of_the_wrong_kind_are_refused(values: object) -> None:
    with pytest.raises(WeightsError, match="incompatible version"):
        config_from_json(Outer, values, "x")
