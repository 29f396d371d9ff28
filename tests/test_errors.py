"""One family of errors, which a caller can catch as a whole or one by one."""

import pytest

from talk3d import errors

FAMILY = [errors.MediaError, errors.TrackingError, errors.WeightsError, errors.ShapeError, errors.ConfigError]


def test_the_family_is_complete() -> None:
    found = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert found == {errors.Talk3DError, *FAMILY}


@pytest.mark.parametrize("kind", FAMILY)
def test_each_is_caught_by_the_base_and_not_by_its_siblings(kind: type[errors.Talk3DError]) -> None:
    assert kind.__bases__ == (errors.Talk3DError,) and kind.__doc__
    with pytest.raises(errors.Talk3DError, match="what to do"):
        raise kind("what to do")


def test_programming_errors_are_not_among_them() -> None:
    assert errors.Talk3DError.__bases__ == (Exception,)
    assert not issubclass(AssertionError, errors.Talk3DError)
