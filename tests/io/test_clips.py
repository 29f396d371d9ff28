"""Clips written and read back bit for bit, and refused in one line when something is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from talk3d.errors import MediaError, ShapeError
from talk3d.io.clips import load_clip, read_openface_blink, save_clip
from talk3d.ops.geometry import head_camera
from talk3d.types import AudioFeatures, Clip, FaceMasks, FaceTrack, Waveform, WideViews


def make_clip(count: int = 6) -> Clip:
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    track = FaceTrack(
        cameras=head_camera(0.1 * torch.randn(count, 3, generator=generator)),
        head_pose=torch.randn(count, 3, generator=generator),
        landmarks=torch.randn(count, 468, 2, generator=generator),
        anchors=torch.randn(count, 6, generator=generator),
        blink=torch.rand(count, 1, generator=generator),
        upper_face=torch.randn(count, 5, generator=generator),
        confidence=torch.ones(count, 1),
        crop=rng.normal(size=(count, 2, 3)),
    )
    return Clip(
        frames=rng.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8),
        fps=25.0,
        waveform=Waveform(samples=torch.randn(count * 640, generator=generator).clamp(-1, 1), sample_rate_hz=16000),
        audio=AudioFeatures(values=torch.randn(count, 16, 64, generator=generator), fps=25.0, source="logmel64"),
        track=track,
        masks=FaceMasks(person=rng.integers(0, 255, (count, 8, 8), dtype=np.uint8), source="drawn"),
        source="päth/of a video.mp4",
        source_sha256="0" * 64,
        num_training_frames=count - 1,
        check={"warnings": ["quiet"], "true_fps": 24.99},
    )


def test_wide_views_come_back_and_older_clips_have_none(tmp_path: Path):
    rng = np.random.default_rng(1)
    pictures, mattes = rng.integers(0, 255, (2, 8, 8, 3), dtype=np.uint8), rng.integers(0, 255, (2, 8, 8), dtype=np.uint8)
    wide = WideViews(frames=torch.tensor([1, 4]), pictures=pictures, mattes=mattes, beyond=mattes > 99)
    replace(make_clip(), wide=wide).save(tmp_path / "wide.clip")
    again = load_clip(tmp_path / "wide.clip").wide
    assert again is not None and torch.equal(again.frames, wide.frames)
    for name in ("pictures", "mattes", "beyond"):
        found, kept = getattr(again, name), getattr(wide, name)
        assert np.array_equal(found, kept) and found.dtype == kept.dtype
    make_clip().save(tmp_path / "plain.clip")
    assert load_clip(tmp_path / "plain.clip").wide is None


def test_everything_comes_back_as_it_was(tmp_path: Path):
    clip = make_clip()
    clip.save(tmp_path / "one.clip")
    again = load_clip(tmp_path / "one.clip")
    assert np.array_equal(again.frames, clip.frames)
    assert isinstance(again.frames, np.memmap)
    assert np.array_equal(again.masks.person, clip.masks.person)
    assert np.array_equal(again.track.crop, clip.track.crop)
    assert again.track.crop.dtype == np.float64
    for name in ("head_pose", "landmarks", "anchors", "blink", "upper_face", "confidence"):
        assert torch.equal(getattr(again.track, name), getattr(clip.track, name))
    assert torch.equal(again.track.cameras.to_label(), clip.track.cameras.to_label())
    assert torch.equal(again.audio.values, clip.audio.values)
    assert torch.equal(again.waveform.samples, clip.waveform.samples)
    for name in ("fps", "source", "source_sha256", "num_training_frames", "check"):
        assert getattr(again, name) == getattr(clip, name)
    assert (again.audio.source, again.masks.source) == ("logmel64", "drawn")
    assert [path.name for path in tmp_path.iterdir()] == ["one.clip"]
    assert again.masks.parts is None


def test_clips_of_before_cheeks_were_followed_have_them_at_rest(tmp_path: Path):
    clip = make_clip()
    clip.save(tmp_path / "old.clip")
    tensors = load_file(tmp_path / "old.clip" / "track.safetensors")
    save_file(tensors | {"upper_face": tensors["upper_face"][:, :4].contiguous()}, tmp_path / "old.clip" / "track.safetensors")
    again = load_clip(tmp_path / "old.clip")
    assert again.track.upper_face[:, :4].equal(clip.track.upper_face[:, :4]) and not again.track.upper_face[:, 4].any()


def test_parts_and_wide_features_come_back(tmp_path: Path):
    clip = make_clip()
    parts = np.random.default_rng(1).integers(0, 19, clip.masks.person.shape, dtype=np.uint8)
    wide = torch.randn(2 * clip.num_frames + 14, 100).unfold(0, 16, 2).transpose(1, 2)  # a view, as the speech networks give it
    masks, audio = replace(clip.masks, parts=parts), replace(clip.audio, values=wide, source="hubert:0123456789ab")
    replace(clip, masks=masks, audio=audio).save(tmp_path / "one.clip")
    again = load_clip(tmp_path / "one.clip")
    assert again.masks.parts is not None and np.array_equal(again.masks.parts, parts)
    assert torch.equal(again.audio.values, wide) and again.audio.source == audio.source


def test_what_a_track_may_lack_is_kept_where_it_is_there(tmp_path: Path):
    clip = make_clip()
    count = clip.num_frames
    assert load_clip_again(clip, tmp_path / "bare").track.gaze is None
    eyes, gaze, expression = torch.rand(count, 2), torch.rand(count, 2), torch.rand(count, 52)
    full = replace(
        clip,
        track=replace(clip.track, eyes_shut=eyes, gaze=gaze, expression=expression),
    )
    again = load_clip_again(full, tmp_path / "full")
    assert torch.equal(again.track.eyes_shut, eyes)
    assert torch.equal(again.track.gaze, gaze)
    assert torch.equal(again.track.expression, expression)


def load_clip_again(clip: Clip, path: Path) -> Clip:
    save_clip(clip, path)
    return load_clip(path)


def test_blinks_of_openface_are_cut_off_and_halved(tmp_path: Path):
    (tmp_path / "au.csv").write_text("frame, timestamp, AU45_r, AU45_c\n1, 0.0, 0.5, 0\n2, 0.04, 3.1, 1\n3, 0.08, -0.1, 0\n")
    assert read_openface_blink(tmp_path / "au.csv").tolist() == [[0.25], [1.0], [0.0]]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "nobody.csv").write_text("frame, AU45_r\n")
    (tmp_path / "empty.csv").write_text("")
    for name in ("other.csv", "missing.csv", "nobody.csv", "empty.csv"):
        with pytest.raises(MediaError, match="AU45_r"):
            read_openface_blink(tmp_path / name)


def test_a_clip_is_replaced_even_by_itself_and_nothing_else_is(tmp_path: Path):
    save_clip(make_clip(), tmp_path / "one")
    loaded = load_clip(tmp_path / "one")
    save_clip(replace(loaded, num_training_frames=2), tmp_path / "one")
    assert len({file.stat().st_mode for file in (tmp_path / "one").iterdir()}) == 1, "whoever may read one file of a clip may read all"
    assert load_clip(tmp_path / "one").num_training_frames == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    with pytest.raises(MediaError, match="not a clip"):
        save_clip(make_clip(), tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep"


def test_what_is_missing_damaged_or_newer_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(MediaError, match="is not a clip"):
        load_clip(tmp_path)
    save_clip(make_clip(), tmp_path / "clip")
    facts = json.loads((tmp_path / "clip" / "clip.json").read_text())
    (tmp_path / "clip" / "clip.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(MediaError, match="newer"):
        load_clip(tmp_path / "clip")
    (tmp_path / "clip" / "clip.json").write_text("{")
    with pytest.raises(MediaError, match="damaged"):
        load_clip(tmp_path / "clip")
    (tmp_path / "clip" / "clip.json").write_text(json.dumps(facts))
    (tmp_path / "clip" / "track.safetensors").write_bytes(b"short")
    with pytest.raises(MediaError, match="damaged") as caught:
        load_clip(tmp_path / "clip")
    assert "\n" not in str(caught.value)
    save_clip(make_clip(), tmp_path / "other")
    np.save(tmp_path / "other" / "frames.npy", np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(ShapeError, match="as many"):
        load_clip(tmp_path / "other")


def test_an_unwritable_place_is_an_error_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(MediaError, match="cannot write"):
        save_clip(make_clip(), tmp_path / "file" / "clip")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_clip_mapped_from_disk_is_written_piece_by_piece(tmp_path: Path):
    make_clip(300).save(tmp_path / "one.clip")
    loaded = load_clip(tmp_path / "one.clip")
    part = replace(loaded, masks=FaceMasks(person=np.asfortranarray(loaded.masks.person), source="drawn"))
    part.save(tmp_path / "two.clip")
    for name in ("frames.npy", "masks.npy", "track.safetensors"):
        assert (tmp_path / "one.clip" / name).read_bytes() == (tmp_path / "two.clip" / name).read_bytes()
    loaded.save(tmp_path / "one.clip")
    assert np.array_equal(load_clip(tmp_path / "one.clip").frames, loaded.frames)
