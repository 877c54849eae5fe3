"""Every error says whether it is temporary and retryable (S34): the whole table, so that a class added later must take a stand here."""

import errno
import inspect

import pytest

from isopod.net.rpc import RpcErrorCode, error_from_number, may_repeat, number_of
from isopod.net.rpc.codes import code_table
from isopod.world import errors

CLASSES = [cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, errors.IsopodError)]
TEMPORARY = {
    errors.WrongState,
    errors.InUse,
    errors.Exhausted,
    errors.Disconnected,
    errors.NotStarted,
    errors.DeadlineExceeded,
    errors.UnavailableError,
    errors.DiskFull,
    errors.AlreadyServing,
    errors.NotLeader,
    errors.LeadershipLost,
}
RETRYABLE = {
    errors.Exhausted,
    errors.Disconnected,
    errors.NotStarted,
    errors.DeadlineExceeded,
    errors.UnavailableError,
    errors.NotLeader,
    errors.LeadershipLost,
}
PERMANENT = {
    errors.TooLarge,
    errors.IsopodError,
    errors.UsageError,
    errors.InvalidArgument,
    errors.Unsupported,
    errors.RefusedError,
    errors.NotFound,
    errors.MethodNotFound,
    errors.AlreadyExists,
    errors.ForeignCluster,
    errors.TokenRefused,
    errors.IdentityConflict,
    errors.CommandNotRunnable,
    errors.RevisionCompacted,
    errors.SessionExpired,
    errors.PeerError,
    errors.ProtocolViolation,
    errors.VersionMismatch,
    errors.HandshakeFailed,
    errors.Cancelled,
    errors.KernelError,
    errors.ToolMissing,
    errors.RuntimeFailed,
    errors.CorruptError,
    errors.BadArchive,
    errors.JournalDamaged,
    errors.JournalFailed,
    errors.JournalForeign,
    errors.DigestMismatch,
    errors.BadRecord,
    errors.BugError,
    errors.ShardLost,
    errors.BrokenPromise,
}
pytestmark = pytest.mark.row("S34")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_class_takes_a_stand(cls: type[errors.IsopodError]) -> None:
    assert (cls in TEMPORARY) != (cls in PERMANENT), f"{cls.__name__}: say here whether it is temporary"
    assert cls.temporary == (cls in TEMPORARY)
    assert cls.retryable == (cls in RETRYABLE)
    assert cls.temporary or not cls.retryable, "what is worth repeating must be able to pass"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_says_the_same_after_the_wire(cls: type[errors.IsopodError]) -> None:
    error = errors.from_code(cls.code, "message", retry_after_s=2.5)
    assert type(error) is cls
    assert (error.temporary, error.retryable, error.retry_after_s) == (cls.temporary, cls.retryable, 2.5)
    assert cls.retry_after_s is None


@pytest.mark.parametrize("number", list(errno.errorcode))
def test_a_system_calls_failure_depends_on_its_number(number: int) -> None:
    passing = {"EAGAIN", "EINTR", "ENOMEM", "EBUSY", "EMFILE", "ENFILE", "ENOBUFS", "ETIMEDOUT"}
    error = errors.from_os_error(OSError(number, "x"), "do", "it")
    if isinstance(error, errors.KernelError):
        assert error.temporary == error.retryable == (errno.errorcode[number] in passing)


def test_an_unknown_code_is_nothing_to_repeat() -> None:
    error = errors.from_code("invented_later", "message")
    assert (error.temporary, error.retryable) == (False, False)


@pytest.mark.parametrize(
    "error,idempotent,expected",
    [
        (errors.Disconnected("x"), True, True),
        (errors.Disconnected("x"), False, False),
        (errors.NotStarted("x"), False, True),
        (errors.Exhausted("x", "1", retry_after_s=0.0), False, True),
        (errors.Exhausted("x", "1"), False, False),
        (errors.Exhausted("x", "1"), True, True),
        (errors.DeadlineExceeded("x", 1), False, False),
        (errors.InUse("volume", "x", "y"), True, False),
        (errors.NotFound("x", "y"), True, False),
        (errors.BugError("x"), True, False),
    ],
)
def test_what_may_be_repeated(error: errors.IsopodError, idempotent: bool, expected: bool) -> None:
    assert may_repeat(error, idempotent=idempotent) is expected


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.row("S17")
@pytest.mark.parametrize("number", list(RpcErrorCode), ids=lambda number: number.name)
def test_numbers_survive_the_way_there_and_back(number: RpcErrorCode) -> None:
    error = error_from_number(number, "message")
    assert type(error) is not errors.IsopodError
    assert number_of(error) == number
    assert error.message == "message"


@pytest.mark.row("S17")
def test_the_references_numbers_are_kept() -> None:
    names = {
        -32601: errors.MethodNotFound("a.b"),
        -32602: errors.InvalidArgument("x", 1, "y"),
        -32603: errors.BugError("x"),
        -32000: errors.UnavailableError("x"),
        -32001: errors.DeadlineExceeded("x", 1),
        -32002: errors.Cancelled("x"),
        -32003: errors.ProtocolViolation("x", "y"),
        -32004: errors.Disconnected("x"),
    }
    for number, error in names.items():
        assert number_of(error) == number
        assert type(error_from_number(number, "m")) is type(error)
    assert error_from_number(-1, "m").code == "-1"


@pytest.mark.row("S17")
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_has_a_number_and_a_row(cls: type[errors.IsopodError]) -> None:
    rows = {row.code: row for row in code_table()}
    assert rows[cls.code].number == number_of(cls) < 0
    assert (rows[cls.code].temporary, rows[cls.code].retryable, rows[cls.code].exit_code) == (cls.temporary, cls.retryable, cls.exit_code)
