"""RpcErrorCode: the error tree's codes as the numbers that JSON-RPC users and the reference know, both ways.

On the wire an error is its code as text, which tells more. The numbers are for those who bridge to other protocols, and for reading.
Source: JSON-RPC 2.0, section 5.1 (-32768 to -32000 are the protocol's); -32000 to -32004 are the reference's own.
"""

from enum import IntEnum
from typing import Final

import msgspec

from isopod.world import errors
from isopod.world.errors import IsopodError


class RpcErrorCode(IntEnum):
    """The numbers. What has none of its own is `from_error`'s -32000 less its place in the tree, or a caller's own above -32000."""

    METHOD_NOT_FOUND = -32601
    INVALID_PARAMS = -32602
    INTERNAL_ERROR = -32603
    SERVICE_UNAVAILABLE = -32000
    TIMEOUT = -32001
    CANCELLED = -32002
    SERIALIZATION_ERROR = -32003
    NETWORK_ERROR = -32004
    REFUSED = -32010
    NOT_FOUND = -32011
    ALREADY_EXISTS = -32012
    WRONG_STATE = -32013
    EXHAUSTED = -32014
    CORRUPT = -32015
    UNSUPPORTED = -32016


# The nearest class up the tree decides, so a class added later has a number at once.
_NUMBERS: Final[dict[type[IsopodError], RpcErrorCode]] = {
    IsopodError: RpcErrorCode.INTERNAL_ERROR,
    errors.UsageError: RpcErrorCode.INVALID_PARAMS,
    errors.Unsupported: RpcErrorCode.UNSUPPORTED,
    errors.RefusedError: RpcErrorCode.REFUSED,
    errors.NotFound: RpcErrorCode.NOT_FOUND,
    errors.MethodNotFound: RpcErrorCode.METHOD_NOT_FOUND,
    errors.AlreadyExists: RpcErrorCode.ALREADY_EXISTS,
    errors.WrongState: RpcErrorCode.WRONG_STATE,
    errors.Exhausted: RpcErrorCode.EXHAUSTED,
    errors.PeerError: RpcErrorCode.NETWORK_ERROR,
    errors.ProtocolViolation: RpcErrorCode.SERIALIZATION_ERROR,
    errors.DeadlineExceeded: RpcErrorCode.TIMEOUT,
    errors.Cancelled: RpcErrorCode.CANCELLED,
    errors.UnavailableError: RpcErrorCode.SERVICE_UNAVAILABLE,
    errors.CorruptError: RpcErrorCode.CORRUPT,
    errors.BugError: RpcErrorCode.INTERNAL_ERROR,
}
# What a number alone is taken for: the class it was given for, the most general one first.
_CLASSES: Final[dict[RpcErrorCode, type[IsopodError]]] = {
    **{number: cls for cls, number in reversed(_NUMBERS.items())},
    RpcErrorCode.INTERNAL_ERROR: errors.BugError,
    RpcErrorCode.INVALID_PARAMS: errors.InvalidArgument,
    RpcErrorCode.NETWORK_ERROR: errors.Disconnected,
}


class CodeRow(msgspec.Struct, frozen=True):
    """One error code of the tree."""

    code: str
    number: int
    exit_code: int
    temporary: bool
    retryable: bool


def number_of(error: IsopodError | type[IsopodError]) -> RpcErrorCode:
    """Return the number of an error or of its class."""
    cls = error if isinstance(error, type) else type(error)
    return next(_NUMBERS[base] for base in cls.__mro__ if base in _NUMBERS)


def error_from_number(number: int, message: str) -> IsopodError:
    """Return the error that a number stands for; an unknown number becomes a plain `IsopodError` whose code is the number."""
    try:
        code = _CLASSES[RpcErrorCode(number)].code
    except ValueError:
        code = str(number)
    return errors.from_code(code, message)


def code_table() -> tuple[CodeRow, ...]:
    """Return every code of the tree, in alphabetical order."""
    tree = sorted(errors.tree().items())
    return tuple(CodeRow(code, number_of(cls), cls.exit_code, cls.temporary, cls.retryable) for code, cls in tree)
