"""Sessions: what makes a repeated command have its effect once.

A session has a number that the log gave it, and its commands are numbered by their sender. The reply to each is kept until the sender
says that it was answered (`floor`), so a command that comes again is answered again and not applied again. A session that was not used
for an hour of the log's own time is forgotten, with its replies; then nobody can say any more whether a command was applied, and it is
refused.

Pure, as all of the machine: time is the stamp of the batch. Source: Ongaro's dissertation, section 6.3.
"""

from typing import Final, NamedTuple

import msgspec

from isopod.api.store.messages import ClientCommand, Command, Refusal
from isopod.cluster.store.keyspace import MODULUS, part_of

SEQS_MAX: Final = 4096
"""How far a session's commands may run ahead of its floor."""
REPLY_BYTES_MAX: Final = 16 << 20
"""Of one session's replies that were not received."""
ALL_REPLY_BYTES_MAX: Final = 128 << 20


class SavedSession(msgspec.Struct, frozen=True, array_like=True):
    """A session in a snapshot."""

    id: int
    used_ns: int
    floor: int
    replies: list[tuple[int, bytes]]


class SessionLimits(NamedTuple):
    """How many, and how long they live unused."""

    sessions_max: int = 20_000
    idle_ns_max: int = 3_600 * 1_000_000_000


class _Session:
    """One session."""

    __slots__ = ("floor", "id", "n_bytes", "part", "replies", "used_ns")

    def __init__(self, number: int, used_ns: int) -> None:
        self.id = number
        self.used_ns = used_ns
        self.floor = 1
        self.replies: dict[int, bytes] = {}
        self.n_bytes = 0
        self.part = 0
        """What it adds to the digest, when that was last settled."""

    def forget_below(self, floor: int) -> None:
        """Drop replies that were received."""
        self.floor = floor
        for seq in [seq for seq in self.replies if seq < floor]:
            self.n_bytes -= len(self.replies.pop(seq))

    def saved(self) -> SavedSession:
        """Return its form in a snapshot."""
        return SavedSession(self.id, self.used_ns, self.floor, sorted(self.replies.items()))


class Sessions:
    """All sessions, the least recently used first."""

    __slots__ = ("_limits", "_n_bytes", "_n_opened", "_sessions", "_sum", "_touched")

    def __init__(self, limits: SessionLimits) -> None:
        self._limits = limits
        self._sessions: dict[int, _Session] = {}
        self._n_opened = 0
        self._n_bytes = 0
        """Of all replies that are kept."""
        self._touched: dict[int, _Session] = {}
        self._sum = 0

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._sessions)

    def open(self, stamp_ns: int) -> int | Refusal:
        """Make a session; return its number."""
        if len(self._sessions) >= self._limits.sessions_max:
            return Refusal("exhausted", f"sessions exhausted: {self._limits.sessions_max} are open", "close clients that are not used")
        self._n_opened += 1
        session = _Session(self._n_opened, stamp_ns)
        self._sessions[session.id] = self._touched[session.id] = session
        return session.id

    def close(self, number: int) -> int:
        """Forget a session; return how many went."""
        session = self._sessions.pop(number, None)
        if session is None:
            return 0
        self._touched.pop(number, None)
        self._sum -= session.part
        self._n_bytes -= session.n_bytes
        return 1

    def expire(self, stamp_ns: int) -> None:
        """Forget those that were not used for too long."""
        limit_ns = stamp_ns - self._limits.idle_ns_max
        while self._sessions:
            number, session = next(iter(self._sessions.items()))
            if session.used_ns >= limit_ns:
                return
            self.close(number)

    def begin(self, command: Command | ClientCommand, stamp_ns: int) -> bytes | Refusal | None:
        """Return what a command was answered already, or why it is refused; None if it is to be applied."""
        number, seq = command.session, command.seq
        session = self._sessions.pop(number, None)
        if session is None:
            return Refusal(
                "session_expired", f"session {number} is not known any more: what was sent may have been done", "read before writing again"
            )
        self._sessions[number] = self._touched[number] = session
        session.used_ns = stamp_ns
        reply = session.replies.get(seq)
        if reply is not None:
            return reply
        if seq < session.floor or command.floor > seq:
            return Refusal("refused", f"command {seq} of session {number} was answered before: its reply is forgotten")
        if command.floor > session.floor:
            self._n_bytes -= session.n_bytes
            session.forget_below(command.floor)
            self._n_bytes += session.n_bytes
        if seq >= session.floor + SEQS_MAX or session.n_bytes > REPLY_BYTES_MAX or self._n_bytes > ALL_REPLY_BYTES_MAX:
            return Refusal("exhausted", f"session {number} exhausted: too many replies wait to be received", "receive some first")
        return None

    def end(self, command: Command | ClientCommand, reply: bytes) -> None:
        """Keep the reply to a command that was applied; its session may have gone by it."""
        session = self._sessions.get(command.session)
        if session is not None:
            session.replies[command.seq] = reply
            session.n_bytes += len(reply)
            self._n_bytes += len(reply)

    def fold(self) -> int:
        """Settle the digest; return the sum over all sessions."""
        for session in self._touched.values():
            part = part_of(session.saved())
            self._sum += part - session.part
            session.part = part
        self._touched = {}
        self._sum %= MODULUS
        return (self._sum + part_of(("sessions", self._n_opened))) % MODULUS

    def save(self) -> tuple[int, list[SavedSession]]:
        """Return how many were opened, and those that are, in the order of their use."""
        return self._n_opened, [session.saved() for session in self._sessions.values()]

    def load(self, n_opened: int, saved: list[SavedSession]) -> None:
        """Take a snapshot's sessions."""
        self._n_opened = n_opened
        self._sessions = {}
        self._sum = 0
        for item in saved:
            session = _Session(item.id, item.used_ns)
            session.floor = item.floor
            session.replies = dict(item.replies)
            session.n_bytes = sum(map(len, session.replies.values()))
            self._sessions[item.id] = session
        self._n_bytes = sum(session.n_bytes for session in self._sessions.values())
        self._touched = dict(self._sessions)

    def become(self, other: "Sessions") -> None:
        """Take another's content, which gives it up."""
        self._sessions, self._n_opened, self._n_bytes = other._sessions, other._n_opened, other._n_bytes
        self._touched, self._sum = other._touched, other._sum
