"""Optional networks of others: where each is published, how large it is, its licence, what it unlocks, and whether a file is the right one.

Nothing here touches the network unless `fetch` is called. What the networks compute is in `talk3d.perception`.

Where the sha256 is known it is held to; where it is not, the first file seen is trusted, its sha256 is kept, and another file is refused afterwards.
"""

import hashlib
import json
import logging
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from talk3d.errors import WeightsError
from talk3d.io.face_models import cache_folder
from talk3d.io.published import read_checkpoint
from talk3d.io.weights import load_strictly
from talk3d.io.writing import whole
from talk3d.types.clip import Progress, silent

logger = logging.getLogger(__name__)

PINS = "sha256.json"
"""Beside the files: sha256 of those that were trusted on first use."""
CHUNK_BYTES = 2**20
TIMEOUT_S = 30


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One file to be had from the internet."""

    path: str
    """Where it goes, below the cache folder."""
    url: str
    size_bytes: int
    """Exact where `sha256` is given, else about; never more than twice this is downloaded."""
    sha256: str | None = None
    """None where its authors publish none: pinned on first use."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """An optional network."""

    name: str
    files: tuple[PublishedFile, ...]
    licence: str
    """Of the weights, which is often narrower than that of the code around them."""
    commercial: bool
    """False if the licence, or that of the data they were learnt from, forbids commercial use or leaves it open."""
    unlocks: str
    """What talk3d can do with it, in a few words."""
    member: str | None = None
    """Key under which the state dict lies in the checkpoint, None if it is the checkpoint itself."""

    @property
    def size_bytes(self) -> int:
        """Of all files together."""
        return sum(file.size_bytes for file in self.files)


def _one(name: str, path: str, url: str, size_bytes: int, sha256: str | None, **rest: Any) -> Published:
    return Published(name=name, files=(PublishedFile(path=path, url=url, size_bytes=size_bytes, sha256=sha256),), **rest)


def _hub(name: str, repository: str, revision: str, model: tuple[int, str | None], **rest: Any) -> Published:
    """A model of the Hugging Face hub: its weights and its config, in a folder of its own."""
    address = f"https://huggingface.co/{repository}/resolve/{revision}"
    weights = PublishedFile(path=f"{name}/pytorch_model.bin", url=f"{address}/pytorch_model.bin", size_bytes=model[0], sha256=model[1])
    config = PublishedFile(path=f"{name}/config.json", url=f"{address}/config.json", size_bytes=4096)
    return Published(name=name, files=(config, weights), **rest)


_ENTRIES = (
    _one(
        "lpips-alex",
        "alexnet-owt-7be5be79.pth",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        244_408_911,
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        licence="BSD-3-Clause; learnt from ImageNet",
        commercial=True,
        unlocks="LPIPS (AlexNet), the perceptual distance of reports, and the loss weights.perceptual of training",
    ),
    _one(
        "lpips-vgg",
        "vgg16-397923af.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        553_433_881,
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        licence="BSD-3-Clause; learnt from ImageNet",
        commercial=True,
        unlocks="LPIPS (VGG16), the perceptual distance of reports by another network",
    ),
    _one(
        "arcface",
        "model_ir_se50.pth",
        "https://github.com/xinntao/facexlib/releases/download/v0.1.0/recognition_arcface_ir_se50.pth",
        175_367_323,
        "a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28",
        licence="MIT code; learnt from MS-Celeb-1M, for research",
        commercial=False,
        unlocks="CSIM, the identity measure of reports, and the loss weights.identity of training",
    ),
    _one(
        "syncnet",
        "syncnet_v2.model",
        "https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
        54_573_114,
        "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",
        licence="MIT code; learnt from BBC broadcasts, for research",
        commercial=False,
        unlocks="LSE-C and LSE-D, the lip synchrony of reports",
    ),
    _one(
        "sync-expert",
        "lipsync_expert.pth",
        "https://huggingface.co/Nekochu/Wav2Lip/resolve/main/lipsync_expert.pth",
        196_000_000,
        None,
        licence="research and personal use only (LRS2)",
        commercial=False,
        unlocks="Wav2Lip's expert of lip synchrony: the loss weights.sync of training",
        member="state_dict",
    ),
    _one(
        "bisenet",
        "79999_iter.pth",
        "https://github.com/xinntao/facexlib/releases/download/v0.2.0/parsing_bisenet.pth",
        53_289_463,
        "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
        licence="MIT code; learnt from CelebAMask-HQ, non-commercial",
        commercial=False,
        unlocks="masks of face, hair, mouth, eyes, neck and clothes",
    ),
    _one(
        "gfpgan",
        "GFPGANv1.3.pth",
        "https://github.com/TencentARC/GFPGAN/releases/download/v1.3.0/GFPGANv1.3.pth",
        348_632_874,
        "c953a88f2727c85c3d9ae72e2bd4846bbaf59fe6972ad94130e23e7017524a70",
        licence="Apache-2.0 but for listed parts; learnt from FFHQ, non-commercial",
        commercial=False,
        unlocks="restored faces at 512 px, the published second stage",
        member="params_ema",
    ),
    _hub(
        "wav2vec2",
        "cpierse/wav2vec2-large-xlsr-53-esperanto",
        "main",
        (1_262_000_000, None),
        licence="Apache-2.0; learnt from Common Voice",
        commercial=True,
        unlocks="--speech wav2vec2, and the published 44-channel windows: --speech ctc44",
    ),
    _hub(
        "hubert",
        "facebook/hubert-large-ls960-ft",
        "main",
        (1_262_000_000, "9cf43abec3f0410ad6854afa4d376c69ccb364b48ddddfd25c4c5aa16398eab0"),
        licence="Apache-2.0; learnt from LibriSpeech",
        commercial=True,
        unlocks="--speech hubert",
    ),
    _one(
        "deepspeech",
        "deepspeech-0_1_0-b90017e8.pb.zip",
        "https://github.com/osmr/deepspeech_features/releases/download/v0.0.1/deepspeech-0_1_0-b90017e8.pb.zip",
        455_000_000,
        None,
        licence="MPL-2.0",
        commercial=True,
        unlocks="--speech deepspeech: 29 channels, as older talking heads have",
    ),
    _one(
        "inception",
        "pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        95_628_359,
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        licence="Apache-2.0; learnt from ImageNet",
        commercial=True,
        unlocks="FID",
    ),
    _one(
        "face-landmarker",
        "face_landmarker.task",
        "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/face_landmarker.task",
        3_758_596,
        "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
        licence="Apache-2.0",
        commercial=True,
        unlocks="better face points: 478 of them, and expression weights",
    ),
)
CATALOGUE: Mapping[str, Published] = {entry.name: entry for entry in _ENTRIES}
"""Every optional network by its name."""


def published(name: str) -> Published:
    """Return an entry of the catalogue.

    Raises:
        WeightsError: there is no such entry.
    """
    if name not in CATALOGUE:
        raise WeightsError(f"there is no network {name!r} in the catalogue: choose one of {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def is_there(entry: Published, folder: Path | None = None) -> bool:
    """Whether all files of a network lie in the cache folder; they are not opened."""
    return all(_place(file, folder).is_file() for file in entry.files)


def find(name: str, folder: Path | None = None) -> Path:
    """Return the checked weights of a network: the file, or the folder where there are several.

    Args:
        name: in the catalogue.
        folder: to look in instead of the user's cache folder.

    Raises:
        WeightsError: a file is not there, or is not the one expected.
    """
    entry = published(name)
    for file in entry.files:
        if not _place(file, folder).is_file():
            size = f"{entry.size_bytes / 1e6:.0f} MB"
            raise WeightsError(f"{name} is not there: talk3d weights fetch {name} ({size}), or put {file.url} at {_place(file, folder)}")
        check(file, folder)
    last = _place(entry.files[-1], folder)
    return last if len(entry.files) == 1 else last.parent


def check(file: PublishedFile, folder: Path | None = None) -> str:
    """Return the sha256 of a file that is there, after holding it to the known or the first seen one.

    Raises:
        WeightsError: it is another file than that.
    """
    path = _place(file, folder)
    found = sha256_of(path)
    _hold(file, found, folder, path)
    return found


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(name: str, folder: Path | None = None, progress: Progress = silent) -> list[Path]:
    """Download what is missing of a network, each file under a temporary name until it is whole and checked.

    Args:
        name: in the catalogue.
        folder: where to, instead of the user's cache folder.
        progress: hears how many MB of how many are there.

    Raises:
        WeightsError: the address cannot be reached, sends something else, or the place cannot be written.
    """
    entry = published(name)
    for file in entry.files:
        if _place(file, folder).is_file():
            check(file, folder)
        else:
            _download(file, folder, progress)
    return [_place(file, folder) for file in entry.files]


def load_published(name: str, module: nn.Module, path: Path | None = None, *, prefix: str = "") -> None:
    """Load the published weights of a network into our module of it, strictly.

    Args:
        name: in the catalogue.
        module: takes every tensor of the checkpoint.
        path: of the file, in place of the one in the cache folder.
        prefix: of the names to take, which is cut off; the rest of the checkpoint is left.

    Raises:
        WeightsError: the file is not there, not the one expected, or does not fit.
    """
    place = find(name) if path is None else Path(path)
    state = read_checkpoint(place)
    member = CATALOGUE[name].member
    if member is not None:
        state = state.get(member, {})
    tensors = {key.removeprefix(prefix): value for key, value in state.items() if isinstance(value, Tensor) and key.startswith(prefix)}
    wanted = module.state_dict()
    counters = {key: wanted[key] for key in wanted.keys() - tensors.keys() if key.endswith(".num_batches_tracked")}  # younger than some files
    load_strictly(module, tensors | counters, place)


def _place(file: PublishedFile, folder: Path | None) -> Path:
    return (folder or cache_folder()) / file.path


def _hold(file: PublishedFile, found: str, folder: Path | None, path: Path) -> None:
    """Refuse a file whose sha256 is not the known one; trust and pin the first one where none is known."""
    pins = _pins(folder)
    expected = file.sha256 or pins.get(file.path)
    if expected is None:
        place = (folder or cache_folder()) / PINS
        with whole(place) as partial:
            partial.write_text(json.dumps(pins | {file.path: found}, indent=2) + "\n", encoding="utf-8")
        logger.info("%s has no published sha256: %s is trusted from now on", path, found)
    elif expected != found:
        known = "published" if file.sha256 else f"first seen (kept in {PINS})"
        raise WeightsError(
            f"{path} is not the {known} file: sha256 {found[:12]}…, expected {expected[:12]}…; delete it and fetch it again from {file.url}"
        )


def _pins(folder: Path | None) -> dict[str, str]:
    place = (folder or cache_folder()) / PINS
    try:
        pins = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        assert isinstance(pins, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise WeightsError(f"{place} is damaged ({error}): delete it, and the files there are trusted anew") from error
    return pins


def _download(file: PublishedFile, folder: Path | None, progress: Progress) -> None:
    path = _place(file, folder)
    by_hand = f"download {file.url} elsewhere and put it at {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            _hold(file, _stream(file, partial, progress), folder, path)
    except urllib.error.URLError as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the answer itself
        raise WeightsError(f"cannot fetch {path.name} ({error.reason}): {by_hand}") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot fetch {path.name} ({error}): {by_hand}") from error


def _stream(file: PublishedFile, partial: Path, progress: Progress) -> str:
    """Write what the address sends, within limits, and return its sha256."""
    digest, done, limit = hashlib.sha256(), 0, 2 * file.size_bytes + CHUNK_BYTES
    request = urllib.request.Request(file.url, headers={"User-Agent": "talk3d"})  # some hosts refuse the usual one
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer, partial.open("wb") as target:
        if file.url.startswith("https:") and not answer.url.startswith("https:"):
            raise ValueError(f"it leads to {answer.url}, which is not encrypted")
        announced = int(answer.headers.get("Content-Length") or 0)
        while chunk := answer.read(CHUNK_BYTES):
            if not done and chunk.lstrip()[:1] == b"<":
                raise ValueError("it sends a web page, not weights")
            done += len(chunk)
            if done > limit:
                raise ValueError(f"it sends more than {limit / 1e6:.0f} MB")
            target.write(chunk)
            digest.update(chunk)
            progress(f"{Path(file.path).name}, MB", round(done / 1e6), round(max(announced, file.size_bytes) / 1e6), {})
    if not done or done < announced:
        raise ValueError(f"it ended after {done} of {announced} bytes")
    return digest.hexdigest()
