"""Checks every shape and type while the tests run, and keeps them deterministic and within one core per worker."""

from jaxtyping import install_import_hook

# As in static checkers, an int is a float too.
install_import_hook("talk3d", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development data that lies beside the checkout; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"the development data is not at {SHARED}")
    return SHARED
