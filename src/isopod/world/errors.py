"""The error tree: every failure isopod reports is one of these.

Split first by who can act::

    IsopodError
    |-- UsageError          the caller asked for something that makes no sense      exit 2
    |   |-- InvalidArgument     a value is malformed or out of range
    |   |-- TooLarge            a proposal is over the size limit
    |   `-- Unsupported         this build or machine cannot do it
    |-- RefusedError        the request is well formed, the state or a policy forbids it   exit 1
    |   |-- NotFound            no object of that name
    |   |   `-- MethodNotFound      the peer serves no such method
    |   |-- AlreadyExists       the name or range is taken
    |   |-- WrongState          the object's life cycle does not allow this now
    |   |-- InUse               something still depends on the object
    |   |-- Exhausted           a bounded resource (addresses, memory, connections) is used up
    |   |-- NotLeader           another node leads the cluster, or none does now; nothing was begun
    |   |-- ForeignCluster      a peer or a folder belongs to another cluster
    |   |-- TokenRefused        a join token is wrong, expired, used up or revoked
    |   |-- IdentityConflict    a node is not the one that its id belongs to
    |   |-- RevisionCompacted   the store forgot the changes that a watch asks for
    |   |-- SessionExpired      the store forgot who sent a command: whether it was applied cannot be told
    |   `-- CommandNotRunnable  the container's command cannot be executed           exit 126 or 127
    |-- PeerError           the other end of a connection                             exit 3
    |   |-- Disconnected        the connection ended before the answer
    |   |   `-- NotStarted          ... and the peer never began the request
    |   |-- LeadershipLost      the leader changed while a proposal was under way: its outcome is unknown
    |   |-- ProtocolViolation   the peer broke the wire protocol
    |   |-- VersionMismatch     no common protocol version
    |   |-- HandshakeFailed     no secured connection: a certificate was refused, or it was no TLS
    |   |-- DeadlineExceeded    no answer in time
    |   `-- Cancelled           the caller withdrew
    |-- UnavailableError    the kernel, a disk or a helper program; may be tried again   exit 4
    |   |-- KernelError         a system call failed
    |   |-- DiskFull            no space or quota left
    |   |-- ToolMissing         a program isopod needs is not installed
    |   |-- RuntimeFailed       the OCI runtime or its supervisor reported a failure
    |   |-- ShardLost           a shard's process died too often and is not started again
    |   |-- JournalFailed       a journal could not make a write durable: it takes no more
    |   `-- AlreadyServing      another daemon owns this data folder
    |-- CorruptError        stored or received data is damaged or hostile             exit 5
    |   |-- BadArchive          an archive entry is unsafe or unreadable
    |   |-- DigestMismatch      data is not what its digest says
    |   |-- JournalDamaged      a journal is damaged where a crash cannot have done it
    |   |-- JournalForeign      a file is no journal, another program's, or a newer isopod's
    |   `-- BadRecord           a stored record cannot be read
    `-- BugError            a promise of isopod's own code was broken                 exit 70
        `-- BrokenPromise       a future whose promise was forgotten unresolved

Whether to try again is said by every class: `temporary` means that the same request may succeed later although the caller changes nothing;
`retryable`, which includes it, that a program may repeat it by itself after a pause (a request that changes something only if it is
idempotent, or was not begun: `NotStarted`, or an `Exhausted` with `retry_after_s`).

Rules: a class takes facts and builds its message; `code` is stable and part of the wire protocol; the user
sees one line `error: MESSAGE` and, where it helps, `hint: WHAT TO DO`. `from_code` rebuilds an error that crossed
the wire. This module imports almost nothing: the lean command line reads it too.
"""

import errno as _errno
import os

_PASSING_ERRNOS = frozenset(
    (_errno.EAGAIN, _errno.EINTR, _errno.ENOMEM, _errno.EBUSY, _errno.EMFILE, _errno.ENFILE, _errno.ENOBUFS, _errno.ETIMEDOUT)
)


class IsopodError(Exception):
    """The root. `code` is stable, `exit_code` is what the command line returns for it.

    Args:
        message: One line: what failed, and which object.
        hint: What the reader can do next, or "".
    """

    code = "error"
    exit_code = 1
    temporary = False
    """Whether the same request may succeed later without the caller changing it."""
    retryable = False
    """Whether a program may repeat the request by itself, after a pause."""
    retry_after_s: float | None = None
    """How long a peer that was too busy to begin asks one to wait, None if nothing was said."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class UsageError(IsopodError):
    """The caller asked for something that makes no sense."""

    code = "usage"
    exit_code = 2


class InvalidArgument(UsageError):
    """A value is malformed or out of range."""

    code = "invalid_argument"

    def __init__(self, what: str, value: object, why: str, hint: str = "") -> None:
        super().__init__(f"{what} {str(value)!r}: {why}", hint)


class Unsupported(UsageError):
    """This build or this machine cannot do it."""

    code = "unsupported"

    def __init__(self, what: str, why: str, hint: str = "") -> None:
        super().__init__(f"{what} is not supported: {why}", hint)


class TooLarge(UsageError):
    """What was asked to be replicated is over the size limit."""

    code = "too_large"

    def __init__(self, what: str, n_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"{what} of {n_bytes} bytes is over {limit_bytes}", "split it, or keep large data outside of the replicated state")


class RefusedError(IsopodError):
    """The request is well formed, but state or policy forbids it."""

    code = "refused"
    exit_code = 1


class NotFound(RefusedError):
    """No object of that kind and name."""

    code = "not_found"

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        super().__init__(f"no such {kind}: {name}", hint)


class MethodNotFound(NotFound):
    """The peer serves no such method: it is older, or another program."""

    code = "method_not_found"

    def __init__(self, name: str, hint: str = "is the node older than the client?") -> None:
        super().__init__("method", name, hint)


class AlreadyExists(RefusedError):
    """The name, range or path is taken."""

    code = "already_exists"

    def __init__(self, kind: str, name: str, hint: str = "") -> None:
        super().__init__(f"{kind} already exists: {name}", hint)


class WrongState(RefusedError):
    """The object's life cycle does not allow this now."""

    code = "wrong_state"
    temporary = True

    def __init__(self, kind: str, name: str, state: str, wanted: str, *, hint: str = "") -> None:
        super().__init__(f"{kind} {name} is {state}: cannot {wanted}", hint)


class InUse(RefusedError):
    """Something still depends on the object."""

    code = "in_use"
    temporary = True

    def __init__(self, kind: str, name: str, by: str, hint: str = "") -> None:
        super().__init__(f"{kind} {name} is in use by {by}", hint)


class Exhausted(RefusedError):
    """A bounded resource is used up. With `retry_after_s` the request was not begun, and may come again after so many seconds."""

    code = "exhausted"
    temporary = True
    retryable = True

    def __init__(self, what: str, limit: str, hint: str = "", *, retry_after_s: float | None = None) -> None:
        super().__init__(f"{what} exhausted: {limit}", hint)
        self.retry_after_s = retry_after_s


class NotLeader(RefusedError):
    """Only the leader can do it, and this node is not the leader. Nothing was begun, so it may be asked again, best at `leader`."""

    code = "not_leader"
    temporary = True
    retryable = True
    leader: int = 0
    """The node's id, 0 if none is known (or if the error crossed the wire: the hint names it)."""

    def __init__(self, node_id: int, leader: int) -> None:
        hint = f"ask node {leader}" if leader else "no leader is known now: try again, or see `isopod cluster status`"
        super().__init__(f"node {node_id} is not the leader of its cluster", hint)
        self.leader = leader
        self.retry_after_s = 0.05


class ForeignCluster(RefusedError):
    """A peer, a folder or a backup belongs to another cluster than ours.

    Args:
        what: "the folder /srv/n1", "the peer 10.0.0.2:7000".
        theirs: Its cluster's id, "" if that is not known.
        ours: Ours.
    """

    code = "foreign_cluster"

    def __init__(self, what: str, theirs: str, ours: str, hint: str = "") -> None:
        other = f"cluster {theirs}" if theirs else "another cluster"
        super().__init__(f"{what} belongs to {other}, not to {ours}", hint or "check the address and the data folder")


class TokenRefused(RefusedError):
    """A join token was not accepted."""

    code = "token_refused"

    def __init__(self, why: str, hint: str = "make a new one on a member: isopod cluster token create") -> None:
        super().__init__(f"the join token was refused: {why}", hint)


class IdentityConflict(RefusedError):
    """A node is not the one that its id belongs to: a wiped disk, an id that is taken, another id than its folder says."""

    code = "identity_conflict"

    def __init__(self, node_id: int, why: str, hint: str = "") -> None:
        super().__init__(f"node {node_id}: {why}", hint)


class RevisionCompacted(RefusedError):
    """The changes a watch asks for are forgotten: read the state again, and watch from there."""

    code = "revision_compacted"

    def __init__(self, revision: int, compacted: int) -> None:
        hint = "read the keys again, and watch from the revision they were read at"
        super().__init__(f"changes from revision {revision} are forgotten: those kept begin behind {compacted}", hint)


class SessionExpired(RefusedError):
    """The store forgot a session, and with it whether a command that was sent before was applied."""

    code = "session_expired"

    def __init__(self, session: int) -> None:
        super().__init__(f"session {session} is not known any more: what was sent may have been done", "read before writing again")


class CommandNotRunnable(RefusedError):
    """The command cannot be executed in the container (exit 126: found but not runnable, 127: not found)."""

    code = "command_not_runnable"
    exit_code = 127

    def __init__(self, command: str, why: str, *, exit_code: int = 127) -> None:
        super().__init__(f"cannot run {command!r}: {why}", "check the spelling and that the image contains it")
        self.exit_code = exit_code


class PeerError(IsopodError):
    """The other end of a connection failed."""

    code = "peer"
    exit_code = 3


class Disconnected(PeerError):
    """The connection ended before the answer."""

    code = "disconnected"
    temporary = True
    retryable = True

    def __init__(self, peer: str, why: str = "connection closed", hint: str = "") -> None:
        super().__init__(f"{peer}: {why}", hint)


class NotStarted(Disconnected):
    """The connection ended, or never was, and the peer certainly did not begin the request."""

    code = "not_started"


class LeadershipLost(PeerError):
    """The leader changed while a proposal was under way: it may have been applied, or may still be."""

    code = "leadership_lost"
    temporary = True
    retryable = True

    def __init__(self, node_id: int, term: int) -> None:
        super().__init__(
            f"node {node_id} lost its leadership of term {term}: the outcome of what was proposed is unknown", "read before writing again"
        )


class ProtocolViolation(PeerError):
    """The peer broke the wire protocol; its connection is closed."""

    code = "protocol_violation"

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"{peer} broke the protocol: {why}")


class VersionMismatch(PeerError):
    """No protocol version in common."""

    code = "version_mismatch"

    def __init__(self, peer: str, ours: str, theirs: str) -> None:
        super().__init__(f"{peer} speaks protocol {theirs}, we speak {ours}", "use the same isopod on both ends")


class HandshakeFailed(PeerError):
    """No secured connection came about, and trying again with the same certificates will not help."""

    code = "handshake_failed"

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"no TLS with {peer}: {why}", "check both ends' certificates, authorities and names")


class DeadlineExceeded(PeerError):
    """No answer in time."""

    code = "deadline_exceeded"
    temporary = True
    retryable = True

    def __init__(self, what: str, limit_s: float) -> None:
        super().__init__(f"{what} took longer than {limit_s:g} s")


class Cancelled(PeerError):
    """The caller withdrew the request."""

    code = "cancelled"

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} was cancelled")


class UnavailableError(IsopodError):
    """The kernel, a disk or a helper program failed; trying again may help."""

    code = "unavailable"
    exit_code = 4
    temporary = True
    retryable = True


class KernelError(UnavailableError):
    """A system call failed. Whether to try again depends on `errno`: a busy kernel may pass, a missing permission will not.

    Args:
        action: What was attempted, in words.
        target: The object it was attempted on.
        errno: The error number.
    """

    code = "kernel"
    temporary = False
    retryable = False

    def __init__(self, action: str, target: str, errno: int, hint: str = "") -> None:
        super().__init__(f"cannot {action} {target}: {os.strerror(errno)}", hint)
        self.errno = errno
        self.temporary = self.retryable = errno in _PASSING_ERRNOS


class DiskFull(UnavailableError):
    """No space or quota left."""

    code = "disk_full"
    retryable = False

    def __init__(self, path: str) -> None:
        super().__init__(f"no space left on the file system of {path}", "free some space: `isopod rm`, `isopod rmi`")


class ToolMissing(UnavailableError):
    """A program or file that isopod needs is not installed."""

    code = "tool_missing"
    temporary = False
    retryable = False

    def __init__(self, tool: str, package: str) -> None:
        super().__init__(f"{tool} is not installed", f"install it: apt-get install {package}")


class RuntimeFailed(UnavailableError):
    """The OCI runtime or its supervisor reported a failure."""

    code = "runtime_failed"
    temporary = False
    retryable = False

    def __init__(self, action: str, target: str, why: str) -> None:
        super().__init__(f"{action} {target}: {why}")


class ShardLost(UnavailableError):
    """A shard's process died too often, and is not started again."""

    code = "shard_lost"
    temporary = False
    retryable = False

    def __init__(self, shard: int, why: str = "its process died too often") -> None:
        super().__init__(f"shard {shard} is lost: {why}", "see the log for why it died; start the program again")


class JournalFailed(UnavailableError):
    """A journal could not make a write durable. What it held back may be lost, so it takes no more: the process has to start again."""

    code = "journal_failed"
    temporary = False
    retryable = False

    def __init__(self, folder: str, why: str) -> None:
        hint = "check the disk (dmesg), then start again: what was acknowledged is there"
        super().__init__(f"the journal in {folder} failed: {why}", hint)


class AlreadyServing(UnavailableError):
    """Another daemon owns this data folder."""

    code = "already_serving"
    retryable = False

    def __init__(self, root: str, pid: int) -> None:
        who = f"another isopod node (pid {pid})" if pid else "another isopod node"
        super().__init__(f"{who} owns {root}", "stop it first, or give this one --root and --run-root")


class CorruptError(IsopodError):
    """Stored or received data is damaged or hostile."""

    code = "corrupt"
    exit_code = 5


class BadArchive(CorruptError):
    """An archive entry is unsafe or unreadable.

    Args:
        entry: The entry's name as the archive spells it, or the archive's own name.
        why: What is wrong with it.
    """

    code = "bad_archive"

    def __init__(self, entry: str, why: str) -> None:
        super().__init__(f"archive entry {entry!r}: {why}")
        self.entry = entry


class DigestMismatch(CorruptError):
    """Data is not what its digest says.

    Args:
        what: What was read ("layer 2 of busybox:latest").
        wanted: The digest it was announced with.
        found: The digest of what came.
    """

    code = "digest_mismatch"

    def __init__(self, what: str, wanted: str, found: str) -> None:
        super().__init__(f"{what}: want {wanted}, found {found}", "the archive is damaged or was changed: fetch it again")


class JournalDamaged(CorruptError):
    """A journal is damaged, and not as a crash leaves it: records that were acknowledged may be unreadable.

    Args:
        path: The file.
        offset: Where in it, in bytes.
        why: What is wrong there.
        lsn: The record's sequence number, or the one expected there; 0 if none is concerned.
    """

    code = "journal_damaged"

    def __init__(self, path: str, offset: int, why: str, *, lsn: int = 0, hint: str = "") -> None:
        place = f"{path} at byte {offset}" + (f" (lsn {lsn})" if lsn else "")
        super().__init__(f"{place}: {why}", hint or "`isopod journal repair FOLDER` says what can be saved and what would be lost")
        self.path = path
        self.offset = offset
        self.lsn = lsn


class JournalForeign(CorruptError):
    """A file or folder is not a journal that this program may use: another format, another owner's, or a newer version."""

    code = "journal_foreign"

    def __init__(self, path: str, why: str, hint: str = "") -> None:
        super().__init__(f"{path}: {why}", hint or "check the folder, and that this isopod is not older than the one that wrote it")


class BadRecord(CorruptError):
    """A stored record cannot be read."""

    code = "bad_record"

    def __init__(self, path: str, why: str, hint: str = "") -> None:
        super().__init__(f"record {path}: {why}", hint)


class BugError(IsopodError):
    """A promise of isopod's own code was broken."""

    code = "bug"
    exit_code = 70

    def __init__(self, what: str) -> None:
        super().__init__(f"internal error: {what}", "this is a bug in isopod; the node's log has the details")


class BrokenPromise(BugError):
    """A future can never get its value: its promise was forgotten unresolved."""

    code = "broken_promise"

    def __init__(self) -> None:
        super().__init__("a promise was forgotten before it was resolved")


def tree() -> dict[str, type[IsopodError]]:
    """Return every error class by its code."""
    found: dict[str, type[IsopodError]] = {}
    queue: list[type[IsopodError]] = [IsopodError]
    while queue:
        cls = queue.pop(0)
        found[cls.code] = cls
        queue.extend(cls.__subclasses__())
    return found


def from_code(code: str, message: str, hint: str = "", exit_code: int | None = None, *, retry_after_s: float | None = None) -> IsopodError:
    """Rebuild an error that crossed the wire. An unknown code becomes a plain `IsopodError` with that code."""
    cls = tree().get(code, IsopodError)
    error = cls.__new__(cls)
    IsopodError.__init__(error, message, hint)
    if cls is IsopodError:
        error.code = code
    if exit_code is not None:
        error.exit_code = exit_code
    if retry_after_s is not None:
        error.retry_after_s = retry_after_s
    return error


def from_os_error(error: OSError, action: str, target: str) -> UnavailableError:
    """Wrap an `OSError` once, at the boundary, into the tree."""
    if error.errno in (_errno.ENOSPC, _errno.EDQUOT):
        return DiskFull(target)
    return KernelError(action, target, error.errno or 0)
