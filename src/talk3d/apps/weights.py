"""The commands `talk3d weights …`: published files of others, made into ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from talk3d.apps.commands import Input, check_input, check_output
from talk3d.io.published import import_checkpoint


def import_weights(
    file: Input, /, out: Annotated[Path | None, arg(aliases=["-o"], metavar="PATH")] = None, axes: Literal["auto", "fixed", "released"] = "auto"
) -> None:
    """Turn a generator of EG3D (.pkl) into a prior, or a checkpoint of Talk3D (.pt) into a file of ours; nothing in the file is run.

    Args:
        file: the published file.
        out: the new file; beside the old one, with the ending .t3d, if none is given.
        axes: the order of the planes' axes; auto takes what the file says. The corrected public generator of 512 pixels needs fixed.
    """
    check_input(file, "a published file")
    place = file.with_suffix(".t3d") if out is None else out
    check_output(place)
    found = import_checkpoint(file, place, plane_axes=None if axes == "auto" else axes)
    if found["kind"] == "prior":
        what = (
            f"a prior of {found['parameters']:,} parameters, {found['pixels']} pixels, {found['plane_axes']} axes: talk3d personalize --prior {place}"
        )
    else:
        what = f"Talk3D's deltaplane network and encoders, {found['parameters']:,} numbers{''.join(f', with its {part}' for part in found['also'])}"
    print(f"{place}: {what}\nsha256 of {found['source']}: {found['source_sha256']}")


COMMANDS: dict[str, Callable[..., None]] = {"import": import_weights}
"""What follows `talk3d weights`."""
