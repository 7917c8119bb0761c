"""What is missing is skipped by a developer's tests and fails those of CI."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from tests.integration import tools

pytestmark = pytest.mark.integration


@pytest.fixture(params=["no program", "an old program", "no package"])
def require(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Asks for something that is not there."""
    monkeypatch.setitem(tools.PROGRAMS, "no-such-program", ("--version", 1))
    monkeypatch.setitem(tools.PROGRAMS, "bash", ("--version", 1000))
    ways = {
        "no program": partial(tools.require_program, "no-such-program"),
        "an old program": partial(tools.require_program, "bash"),
        "no package": partial(tools.require_package, "no_such_package"),
    }
    return ways[request.param]


def test_a_test_is_skipped_in_plain_words(require: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of a developer, who need not have every language."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="is not installed"):
        require()


def test_a_test_fails_in_ci(require: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would be skipped there for ever, and nobody would know."""
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"is not installed.* in CI everything must run"):
        require()
