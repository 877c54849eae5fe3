"""Which gRPC status an error of the tree is, and in what words it travels.

The reference maps not-implemented, not-found, already-exists and a bad configuration to their statuses and all else to INTERNAL. Where gRPC
has a truer word than INTERNAL it is used here: a client that treats all it does not know as a failure sees no difference.

Source: https://grpc.github.io/grpc/core/md_doc_statuscodes.html; the names are those of `grpc.StatusCode`, which is not imported here.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from isopod.world import errors as e
from isopod.world.errors import IsopodError

DETAILS_BYTES_MAX: Final = 1000
"""The text travels as a header, percent-encoded: at most three times as long. From 8 KiB of headers on gRPC refuses some by chance."""
CODE_KEY: Final = "isopod-code"
"""The trailing metadata's key for the stable code of the error."""

_STATUSES: Final[Mapping[type[IsopodError], str]] = {
    e.Unsupported: "UNIMPLEMENTED",
    e.MethodNotFound: "UNIMPLEMENTED",
    e.UsageError: "INVALID_ARGUMENT",
    e.NotFound: "NOT_FOUND",
    e.AlreadyExists: "ALREADY_EXISTS",
    e.Exhausted: "RESOURCE_EXHAUSTED",
    e.TokenRefused: "PERMISSION_DENIED",
    e.NotLeader: "UNAVAILABLE",
    e.RefusedError: "FAILED_PRECONDITION",
    e.DeadlineExceeded: "DEADLINE_EXCEEDED",
    e.Disconnected: "UNAVAILABLE",
    e.LeadershipLost: "ABORTED",
    e.Cancelled: "CANCELLED",
    e.DiskFull: "RESOURCE_EXHAUSTED",
    IsopodError: "INTERNAL",
}
"""The nearest ancestor counts."""


class Status(NamedTuple):
    """What a failed call ends with."""

    name: str
    details: str
    code: str


def status_of(error: IsopodError) -> Status:
    """Return the status of an error: its name, one line that says what to do too, and the stable code."""
    cls: type[IsopodError] = type(error)
    if error.temporary and isinstance(error, e.UnavailableError) and cls not in _STATUSES:
        name = "UNAVAILABLE"
    else:
        name = next(_STATUSES[each] for each in cls.__mro__ if each in _STATUSES)
    details = describe(error)[:DETAILS_BYTES_MAX].encode("utf-8", "replace")[:DETAILS_BYTES_MAX].decode("utf-8", "ignore")
    return Status(name, details, error.code)


def describe(error: IsopodError) -> str:
    """Return an error as one line, its hint in brackets."""
    return f"{error.message} ({error.hint})" if error.hint else error.message


def is_answer(error: IsopodError) -> bool:
    """Whether an error is told in a reply whose `success` is false, and not by a status: the request was understood, its object is known,
    and what was asked could not be done."""
    return isinstance(error, e.RefusedError | e.UnavailableError) and not isinstance(error, e.NotFound | e.AlreadyExists)
