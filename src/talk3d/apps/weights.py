"""The commands `talk3d weights …`: which optional networks there are, fetching them, and checking those that are there."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from talk3d.apps.build import place_and_save
from talk3d.apps.commands import Input, check_input, check_output, resolve_device
from talk3d.apps.terminal import Display
from talk3d.errors import WeightsError
from talk3d.io.catalogue import CATALOGUE, Published, fetch, find, is_there, published
from talk3d.io.face_models import cache_folder
from talk3d.io.published import import_checkpoint
from talk3d.io.weights import load_prior
from talk3d.perception.bisenet import load_bisenet
from talk3d.perception.identity import load_identity
from talk3d.perception.inception import load_inception
from talk3d.perception.landmarks import load_face_model
from talk3d.perception.lipsync import load_sync_expert, load_syncnet
from talk3d.perception.perceptual import load_lpips
from talk3d.perception.restoration import load_restoration
from talk3d.perception.speech import load_speech

LOADERS: dict[str, Callable[[], object]] = {
    "lpips-alex": lambda: load_lpips("alex"),
    "lpips-vgg": lambda: load_lpips("vgg"),
    "arcface": load_identity,
    "syncnet": load_syncnet,
    "sync-expert": load_sync_expert,
    "bisenet": load_bisenet,
    "gfpgan": load_restoration,
    "inception": load_inception,
    "face-landmarker": load_face_model,
    "wav2vec2": lambda: load_speech("wav2vec2"),
    "hubert": lambda: load_speech("hubert"),
    "deepspeech": lambda: load_speech("deepspeech"),
}
"""Loads a network strictly, which is what `verify` does with the ones that are there."""
Names = Annotated[list[str], Positional, arg(metavar="NAME …")]


def list_weights() -> None:
    """Show every optional network: whether it is there, its size, what it unlocks, its licence, and where its files come from and go."""
    print(f"optional networks, in {cache_folder()}; a file may also be put there by hand\n")
    for entry in CATALOGUE.values():
        state = "there" if is_there(entry) else "-"
        print(f"{entry.name:17}{state:6}{entry.size_bytes / 1e6:5.0f} MB  {entry.unlocks}")
        print(f"{'':33}licence: {_licence(entry)}")
        for file in entry.files:
            print(f"{'':33}{file.path} from {file.url}")
    print("\nfetch with: talk3d weights fetch NAME …")


def fetch_weights(names: Names, /) -> None:
    """Download networks into the cache folder and check them.

    Args:
        names: as `talk3d weights list` shows them.
    """
    if not names:
        raise WeightsError("nothing to fetch: give names that talk3d weights list shows")
    entries = [published(name) for name in names]
    for entry in entries:
        print(f"{entry.name}: {entry.size_bytes / 1e6:.0f} MB, licence: {_licence(entry)}")
    with Display() as display:
        for entry in entries:
            for path in fetch(entry.name, progress=display):
                display.note(f"{path}: there, checked")


def verify_weights(names: Annotated[list[str], Positional, arg(metavar="[NAME …]")] = [], /) -> None:  # noqa: B006, tyro's way
    """Check the networks that are there: that they are the right files, and that every tensor fits our networks.

    Args:
        names: which ones; all that are there if none is named.
    """
    chosen = [published(name) for name in names] or [entry for entry in CATALOGUE.values() if is_there(entry)]
    if not chosen:
        print(f"no optional network is in {cache_folder()}: see talk3d weights list")
    bad = []
    for entry in chosen:
        try:
            find(entry.name)
            if entry.name in LOADERS:
                LOADERS[entry.name]()
            print(f"{entry.name}: good")
        except WeightsError as error:
            bad.append(entry.name)
            print(f"{entry.name}: {error}")
    if bad:
        raise WeightsError(f"{', '.join(bad)} cannot be used: see above")


def import_weights(
    file: Input, /, out: Annotated[Path | None, arg(aliases=["-o"], metavar="PATH")] = None, axes: Literal["auto", "fixed", "released"] = "auto"
) -> None:
    """Turn a generator of EG3D (.pkl) into a prior, or a checkpoint of Talk3D (.pt) into a file of ours; nothing in the file is run.

    A prior is also placed in head space, for which its average head is rendered.

    Args:
        file: the published file.
        out: the new file; beside the old one, with the ending .t3d, if none is given.
        axes: the order of the planes' axes; auto takes what the file says. The corrected public generator of 512 pixels needs fixed.
    """
    check_input(file, "a published file")
    place = file.with_suffix(".t3d") if out is None else out
    check_output(place, file)
    found = import_checkpoint(file, place, plane_axes=None if axes == "auto" else axes)
    if found["kind"] == "prior":
        place_and_save(load_prior(place), place, resolve_device("auto"), exact=True)
        what = (
            f"a prior of {found['parameters']:,} parameters, {found['pixels']} pixels, {found['plane_axes']} axes: talk3d personalize --prior {place}"
        )
    else:
        what = f"Talk3D's deltaplane network and encoders, {found['parameters']:,} numbers{''.join(f', with its {part}' for part in found['also'])}"
    print(f"{place}: {what}\nsha256 of {found['source']}: {found['source_sha256']}")


def _licence(entry: Published) -> str:
    return entry.licence if entry.commercial or "commercial" in entry.licence else f"{entry.licence}; not for commercial use"


COMMANDS: dict[str, Callable[..., None]] = {"list": list_weights, "fetch": fetch_weights, "verify": verify_weights, "import": import_weights}
"""What follows `talk3d weights`."""
