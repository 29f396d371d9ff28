"""From a video to an avatar in one go, resumable at any point; and which unfinished work any command may go on with.

Intermediate products lie in a folder beside the avatar, with a manifest that says which video and settings each came from. A stage is skipped when
its product is there and came from the same video, settings and earlier products; otherwise it is made again. Nothing of another video is ever used.
"""

import dataclasses
import glob
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from talk3d import __version__
from talk3d.apps.check import reviewer
from talk3d.errors import ConfigError, Talk3DError, WeightsError
from talk3d.io.catalogue import sha256_of
from talk3d.io.clips import load_clip
from talk3d.io.weights import load_person, load_prior, prior_file, save_prior
from talk3d.io.writing import whole
from talk3d.models.avatar import Prior
from talk3d.perception.headspace import place_prior
from talk3d.perception.landmarks import load_face_model
from talk3d.stages.personalize import PersonalizeConfig, personalize
from talk3d.stages.track import TrackConfig, track
from talk3d.stages.train import TrainConfig, train
from talk3d.types import Progress, silent


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What the three stages start from, and their settings."""

    prior: str = "builtin"
    """The prior to start from: builtin, or the path of a saved one."""
    face_model: Path | None = None
    """MediaPipe's face_landmarker.task, if it is not in its usual place."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Of tracking."""
    personalize: PersonalizeConfig = field(default_factory=PersonalizeConfig)
    """Of personalisation."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Of training."""


def fingerprint(*parts: Any) -> str:
    """Return a short hash of settings and inputs: equal parts, equal fingerprint.

    Args:
        parts: config dataclasses, plain values, and paths, which count with their content (a folder with its files' names, sizes and times).
    """
    digest = hashlib.sha256(__version__.encode())
    for part in parts:
        digest.update(b"\0")
        if isinstance(part, Path) and part.is_dir():
            states = [(str(file.relative_to(part)), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(part.rglob("*"))]
            digest.update(json.dumps(states).encode())
        elif isinstance(part, Path):
            digest.update(sha256_of(part).encode())
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            digest.update(json.dumps([type(part).__name__, dataclasses.asdict(part)], default=str).encode())
        else:
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:16]


def checkpoint_beside(out: Path, *parts: Any) -> Path:
    """Return where work on `out` keeps its checkpoint; other inputs or settings get another place.

    Args:
        out: the file being made.
        parts: all that its content depends on, see `fingerprint`.
    """
    return out.with_name(f"{out.name}.{fingerprint(*parts)}.checkpoint")


def remove_checkpoints(out: Path) -> None:
    """Remove every checkpoint of `out`, once it is whole."""
    for checkpoint in out.parent.glob(f"{glob.escape(out.name)}.*.checkpoint"):
        checkpoint.unlink()


class Products:
    """The folder of a build: what was made, from what, and whether it is whole."""

    def __init__(self, folder: Path, video: Path, *, fresh: bool = False) -> None:
        """Open or make the folder.

        Args:
            folder: where the products lie.
            video: what they are made from.
            fresh: throw away what is there.

        Raises:
            ConfigError: the folder holds products of another video, or something else.
        """
        self.folder, self.path = folder, folder / "manifest.json"
        self.manifest: dict[str, Any] = {"video": video.name, "video_sha256": sha256_of(video), "stages": {}}
        if folder.exists():
            earlier = self._earlier()
            if fresh:
                shutil.rmtree(folder)
            elif earlier["video_sha256"] != self.manifest["video_sha256"]:
                raise ConfigError(f"{folder} holds products of another video ({earlier['video']}): give another -o, or --fresh to start over")
            else:
                self.manifest["stages"] = earlier["stages"]
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def _earlier(self) -> dict[str, Any]:
        try:
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            return {"video": str(earlier["video"]), "video_sha256": str(earlier["video_sha256"]), "stages": dict(earlier["stages"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.folder} is there but is no build folder of talk3d: move it away, or give another -o") from error

    def _write(self) -> None:
        with whole(self.path) as partial:
            partial.write_text(json.dumps(self.manifest, indent=2), encoding="utf-8")

    def leave(self) -> None:
        """Remove the folder if nothing was made in it."""
        if set(self.folder.iterdir()) == {self.path}:
            shutil.rmtree(self.folder)

    def checkpoint(self, stage: str) -> Path:
        """Return where a stage keeps its checkpoint."""
        return self.folder / f"{stage}.checkpoint"

    def make(self, stage: str, key: str, product: Path, work: Callable[[], None]) -> bool:
        """Run a stage unless its product is there and was made from the same; return whether it ran.

        Args:
            stage: its name.
            key: fingerprint of everything the product depends on.
            product: the file or folder that `work` leaves when it is whole.
            work: makes the product; goes on from the stage's checkpoint, which is kept only while the key stays the same.
        """
        known = self.manifest["stages"].get(stage, {})
        if known.get("key") == key and known.get("finished") and product.exists():
            return False
        if known.get("key") != key:
            self.checkpoint(stage).unlink(missing_ok=True)
        self.manifest["stages"][stage] = {"key": key, "finished": False}
        self._write()
        work()
        self.manifest["stages"][stage]["finished"] = True
        self._write()
        return True


def placed_prior(prior: str, device: str, face_model: Path | None = None) -> Prior:
    """Load a prior; where it lies in head space is found now if its file does not say.

    Raises:
        WeightsError: no such file, no prior, or its average is no head.
    """
    found = load_prior(prior)
    if prior == "builtin" or "head_space" in found.provenance:
        return found
    return place_prior(found, load_face_model(face_model), device=device)


def place_and_save(prior: Prior, out: Path, device: str, *, exact: bool = False) -> None:
    """Write a prior with its place in head space, or without, if that cannot be found yet, and say so."""
    try:
        prior = place_prior(prior, load_face_model(), device=device)
        print(f"placed in head space; face points are {prior.provenance['head_space']['residual']:.1%} of a head off")
    except WeightsError as error:
        print(f"not placed in head space, which personalize will try again: {error}")
    save_prior(prior, out, exact=exact)


def build(
    video: Path,
    avatar_path: Path,
    config: BuildConfig,
    *,
    device: str = "cpu",
    seed: int = 0,
    fresh: bool = False,
    yes: bool = False,
    progress: Progress = silent,
) -> list[str]:
    """Track, personalize and train, or go on where an earlier call stopped.

    Args:
        video: the person's video.
        avatar_path: where the avatar goes; the intermediate products lie beside it in a folder of the same name that ends in `.build`.
        config: inputs and settings of the stages.
        device: where to compute.
        seed: of all randomness.
        fresh: throw away earlier products.
        yes: go on even if the capture check refuses the video.
        progress: hears every step.

    Returns:
        The names of the stages that ran; the others were finished already.

    Raises:
        Talk3DError: an input is unfit, or the folder holds products of another video.
    """
    products = Products(avatar_path.with_suffix(".build"), video, fresh=fresh)
    clip_path, person_path = products.folder / "clip", products.folder / "person.t3d"
    tracked = fingerprint(products.manifest["video_sha256"], config.track, config.face_model, prior_file("builtin"))
    personalized = fingerprint(tracked, config.personalize, prior_file(config.prior), seed)
    trained = fingerprint(personalized, config.train)

    def make_clip() -> None:
        track(video, config.track, face_model=config.face_model, progress=progress, review=reviewer(video, yes=yes)).save(clip_path)

    def make_person() -> None:
        checkpoint = products.checkpoint("personalize")
        clip, prior = load_clip(clip_path), placed_prior(config.prior, device, config.face_model)
        personalize(clip, prior, config.personalize, device=device, seed=seed, progress=progress, checkpoint=checkpoint).save(person_path)
        checkpoint.unlink(missing_ok=True)

    def make_avatar() -> None:
        checkpoint = products.checkpoint("train")
        person, clip = load_person(person_path), load_clip(clip_path)
        train(person, clip, config.train, device=device, seed=seed, progress=progress, checkpoint=checkpoint).save(avatar_path)

    stages = [
        ("track", tracked, clip_path, make_clip),
        ("personalize", personalized, person_path, make_person),
        ("train", trained, avatar_path, make_avatar),
    ]
    try:
        return [stage for stage, key, product, work in stages if products.make(stage, key, product, work)]
    except Talk3DError:
        products.leave()
        raise
