"""Errors: typed by what a caller can do about them."""

import pytest

from isopod.world import errors

pytestmark = pytest.mark.row("S35")


@pytest.mark.parametrize(
    ("error", "branch", "retryable"),
    [
        (errors.InvalidArgument("port", 0, "must be above 0"), errors.UsageError, False),
        (errors.NotFound("key", "x"), errors.RefusedError, False),
        (errors.WrongState("gate", "x", "closed", "enter"), errors.RefusedError, False),
        (errors.Exhausted("buffer pool", "all is out"), errors.RefusedError, True),
        (errors.Disconnected("peer"), errors.PeerError, True),
        (errors.DeadlineExceeded("asking", 1.0), errors.PeerError, True),
        (errors.ProtocolViolation("peer", "nonsense"), errors.PeerError, False),
        (errors.BrokenPromise(), errors.BugError, False),
    ],
)
def test_an_error_says_its_area_and_whether_trying_again_may_help(
    error: errors.IsopodError, branch: type[errors.IsopodError], retryable: bool
) -> None:
    assert isinstance(error, branch)
    assert isinstance(error, errors.IsopodError)
    assert error.retryable is retryable
    assert "\n" not in str(error)


def test_an_error_keeps_its_type_and_hint_when_it_travels() -> None:
    for code, kind in errors.tree().items():
        found = errors.from_code(code, "what happened", "what to do")
        assert type(found) is kind
        assert (found.code, found.message, found.hint) == (code, "what happened", "what to do")
