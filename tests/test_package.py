import subprocess
import sys

import pytest

import talk3d


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, talk3d; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'av')))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(talk3d.__all__))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(talk3d, name) is not None
    assert name in dir(talk3d)


def test_every_public_name_has_a_home() -> None:
    assert set(talk3d.__all__) == {"__version__", *talk3d._HOMES}


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'helper'"):
        talk3d.helper  # noqa: B018
