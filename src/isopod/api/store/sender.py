"""Sender: operations of one turn of the loop as one command, each command applied once however often it has to be sent.

What is submitted in a turn travels together: the nodes then handle one frame, one proposal and one reply for many operations. While
`commands_max` commands are under way, what is submitted waits and gathers. Each operation is still whole by itself and has its own result.

A command is sent again, with the same number in the same session, until it is answered or its time is over; the store applies it once. Only
one kind of doubt is left: when the time is over, or when the store has forgotten the session, the caller is told so by the error.

It knows nothing of connections: `send` carries a command to the store, by RPC or by a call.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec

from isopod.api.store.messages import (
    COMMAND_BYTES_MAX,
    COMMAND_OPS_MAX,
    KEY_CHARS_MAX,
    LEVEL,
    VALUE_BYTES_MAX,
    ClientCommand,
    ClientOp,
    Opened,
    Outcome,
    Put,
    Refusal,
    SessionClose,
    SessionOpen,
)
from isopod.world import errors
from isopod.world.errors import (
    DeadlineExceeded,
    Disconnected,
    Exhausted,
    InvalidArgument,
    IsopodError,
    NotLeader,
    NotStarted,
    ProtocolViolation,
    SessionExpired,
    TooLarge,
)

Send = Callable[[bytes, float], Awaitable[bytes]]
"""Carries a packed command to the store within so many seconds, and returns the packed outcome."""
PAUSE_FIRST_S: Final = 0.01
PAUSE_MAX_S: Final = 0.25
CLOSE_S: Final = 0.5
"""How long giving a session back may take."""
OPEN_S: Final = 10.0
SWEEP_S: Final = 0.25
"""How often operations that wait are looked at for deadlines."""
OP_BYTES: Final = 64
"""What an operation takes in a command beside its key and value, at most."""
_OPERATION: Final = "an operation of the store"
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(Outcome).decode
_check: Final = msgspec.msgpack.Decoder(ClientCommand).decode


class SenderSettings(NamedTuple):
    """Bounds of a sender.

    Args:
        commands_max: Commands under way at a time.
        ops_max: Operations of one command.
        bytes_max: Of one command's keys and values, about; a larger operation travels alone.
        waiting_max: Operations that wait for their turn.
        waiting_bytes_max: Their bytes.
        attempt_s: How long one attempt may take before another is made.
    """

    commands_max: int = 8
    ops_max: int = 256
    bytes_max: int = 128 << 10
    waiting_max: int = 65_536
    waiting_bytes_max: int = 64 << 20
    attempt_s: float = 2.0


class _Waiting(NamedTuple):
    """Submitted and not yet sent."""

    op: ClientOp
    future: "asyncio.Future[Any]"
    timeout_s: float
    expires_at: float
    n_bytes: int


class _Session:
    """A session of ours that the store knows."""

    __slots__ = ("n_sent", "number", "unanswered")

    def __init__(self, number: int) -> None:
        self.number = number
        self.n_sent = 0
        self.unanswered: dict[int, None] = {}
        """Numbers of commands that were not answered, the oldest first."""


class Sender:
    """Carries operations to the store.

    Args:
        send: How a command gets there.
        chance: Draws from 0 to 1, for pauses.
        settings: Bounds.
        with_session: Open a session, so that commands may be sent again. Without one, a command whose fate is unknown fails.
    """

    def __init__(
        self,
        send: Send,
        chance: Callable[[], float],
        *,
        settings: SenderSettings = SenderSettings(),  # noqa: B008 - an immutable tuple
        with_session: bool = True,
    ) -> None:
        self.n_commands = self.n_ops = self.n_repeats = 0
        self._send = send
        self._chance = chance
        self._settings = settings
        self._with_session = with_session
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = 0
        self._is_due = False
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._n_tasks = 0
        self._session: _Session | None = None
        self._opening: asyncio.Task[_Session] | None = None
        self._sweeping: asyncio.TimerHandle | None = None
        self._failure: IsopodError | None = None
        """Why the last attempt failed."""
        self._is_closed = False

    def submit(self, op: ClientOp, timeout_s: float) -> "asyncio.Future[Any]":
        """Take an operation; its result, or its failure, comes in the future.

        Raises:
            InvalidArgument: A key or value is over its limit.
            Exhausted: Too much waits.
            Disconnected: The sender was closed.
        """
        n_bytes = size_of(op)
        if self._is_closed:
            raise closed()
        settings = self._settings
        if len(self._waiting) >= settings.waiting_max or self._waiting_bytes + n_bytes > settings.waiting_bytes_max:
            raise Exhausted("operations that wait", f"{settings.waiting_max} or {settings.waiting_bytes_max} bytes", retry_after_s=0.1)
        loop = self._loop
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting.append(_Waiting(op, future, timeout_s, loop.time() + timeout_s, n_bytes))
        self._waiting_bytes += n_bytes
        if not self._is_due:
            self._is_due = True
            loop.call_soon(self._flush)
        return future

    async def close(self) -> None:
        """Fail what waits, and give the session back if that goes quickly."""
        if self._is_closed:
            return
        self._is_closed = True
        for waiting in self._waiting:
            _fail(waiting.future, closed())
        self._waiting.clear()
        if self._sweeping is not None:
            self._sweeping.cancel()
        tasks = [*self._tasks.values(), *([self._opening] if self._opening is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            try:
                await self._attempt(pack_ops([SessionClose(self._session.number)]), CLOSE_S)
            except (IsopodError, TimeoutError):
                return  # the store forgets it by itself

    # --- commands -----------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Send what waits, as far as commands may be under way."""
        self._is_due = False
        while self._waiting and len(self._tasks) < self._settings.commands_max:
            batch = self._take()
            number = self._n_tasks
            self._n_tasks += 1
            task = self._loop.create_task(self._deliver(batch), name="store command")
            self._tasks[number] = task
            task.add_done_callback(partial(self._on_done, number, batch))
        if self._waiting and self._sweeping is None:
            self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Fail what waited too long for its turn."""
        now_s = self._loop.time()
        over = [item for item in self._waiting if item.expires_at <= now_s or item.future.done()]
        if over:
            self._waiting = [item for item in self._waiting if item.expires_at > now_s and not item.future.done()]
            self._waiting_bytes = sum(item.n_bytes for item in self._waiting)
        for item in over:
            _fail(item.future, late(_OPERATION, item.timeout_s, self._failure))
        self._sweeping = self._loop.call_later(SWEEP_S, self._sweep) if self._waiting else None

    def _take(self) -> list[_Waiting]:
        """Take the next command's operations: the first ones, of equal deadlines, as many as fit."""
        waiting, settings = self._waiting, self._settings
        timeout_s = waiting[0].timeout_s
        n_bytes = n_ops = 0
        for item in waiting:
            if n_ops and (n_ops >= settings.ops_max or n_bytes + item.n_bytes > settings.bytes_max or item.timeout_s != timeout_s):
                break
            n_bytes += item.n_bytes
            n_ops += 1
        batch = waiting[:n_ops]
        del waiting[:n_ops]
        self._waiting_bytes -= n_bytes
        return batch

    def _on_done(self, number: int, batch: list[_Waiting], task: "asyncio.Task[None]") -> None:
        del self._tasks[number]
        if task.cancelled():  # perhaps before its first step
            for item in batch:
                _fail(item.future, closed())
        if self._waiting and not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._flush)

    async def _deliver(self, batch: list[_Waiting]) -> None:
        """Carry one command to its end, and tell its results."""
        self.n_commands += 1
        self.n_ops += len(batch)
        try:
            results = (await self._carry([item.op for item in batch], batch[0].expires_at, batch[0].timeout_s)).results
            if len(results) != len(batch):
                raise ProtocolViolation("the store", f"{len(results)} results for {len(batch)} operations")
        except IsopodError as error:
            for item in batch:
                _fail(item.future, error)
        else:
            for item, result in zip(batch, results, strict=True):
                future = item.future
                if future.done():
                    continue
                if type(result) is Refusal:
                    future.set_exception(error_of(result))
                else:
                    future.set_result(result)

    async def _carry(self, ops: list[ClientOp], expires_at: float, timeout_s: float) -> Outcome:
        """Have operations done; return the outcome.

        Raises:
            IsopodError: They were not, or nobody knows.
        """
        if not self._with_session:
            return await self._repeat(pack_ops(ops), expires_at, timeout_s, may_repeat=False)
        while True:
            session = self._session or await self._opened(expires_at, timeout_s)
            session.n_sent = seq = session.n_sent + 1
            session.unanswered[seq] = None
            try:
                data = _encode(ClientCommand(LEVEL, session.number, seq, next(iter(session.unanswered)), ops))
                outcome, n_doubts = await self._repeat_counting(data, expires_at, timeout_s)
            finally:
                del session.unanswered[seq]
            refusal = outcome.refusal
            if refusal is None:
                return outcome
            if refusal.code != SessionExpired.code:
                raise error_of(refusal)
            if self._session is session:
                self._session = None
            if n_doubts:
                raise SessionExpired(session.number)

    async def _opened(self, expires_at: float, timeout_s: float) -> _Session:
        """Return the session, opening one if there is none; all who wait share the attempt."""
        if self._opening is None:
            self._opening = self._loop.create_task(self._open(), name="store session")
            self._opening.add_done_callback(self._on_opened)
        try:
            async with asyncio.timeout_at(expires_at):
                return await asyncio.shield(self._opening)
        except TimeoutError:
            raise late(_OPERATION, timeout_s, self._failure) from None

    async def _open(self) -> _Session:
        # Opening twice does no harm: the other one is never used, and forgotten in time.
        outcome = await self._repeat(pack_ops([SessionOpen()]), self._loop.time() + OPEN_S, OPEN_S, may_repeat=True)
        opened = outcome.results[0] if outcome.results else None
        if type(opened) is Refusal:
            raise error_of(opened)
        if type(opened) is not Opened:
            raise ProtocolViolation("the store", "no session where one was asked for")
        self._session = _Session(opened.session)
        return self._session

    def _on_opened(self, task: "asyncio.Task[_Session]") -> None:
        self._opening = None
        if not task.cancelled():
            task.exception()  # whoever waits gets it

    async def _repeat(self, data: bytes, expires_at: float, timeout_s: float, *, may_repeat: bool) -> Outcome:
        outcome, _ = await self._repeat_counting(data, expires_at, timeout_s, may_repeat=may_repeat)
        if outcome.refusal is not None:
            raise error_of(outcome.refusal)
        return outcome

    async def _repeat_counting(self, data: bytes, expires_at: float, timeout_s: float, *, may_repeat: bool = True) -> tuple[Outcome, int]:
        """Send a command until it is answered; return the outcome, and how often it may have been done without our hearing of it."""
        n_failed = n_doubts = 0
        pause_s = PAUSE_FIRST_S
        while True:
            left_s = expires_at - self._loop.time()
            if left_s <= 0:
                raise late(_OPERATION, timeout_s, self._failure if n_failed else None)
            try:
                return await self._attempt(data, min(left_s, self._settings.attempt_s) if may_repeat else left_s), n_doubts
            except IsopodError as error:
                begun = not was_not_begun(error)
                n_doubts += begun
                n_failed += 1
                pause_s = error.retry_after_s or min(PAUSE_MAX_S, PAUSE_FIRST_S * 2 ** (n_failed - 1))
                if not error.retryable or (begun and not may_repeat):
                    raise
                self._failure = error
                if self._loop.time() + pause_s >= expires_at:
                    raise late(_OPERATION, timeout_s, error) from error
            self.n_repeats += 1
            await asyncio.sleep(pause_s * (1 - 0.5 * self._chance()))

    async def _attempt(self, data: bytes, timeout_s: float) -> Outcome:
        raw = await self._send(data, timeout_s)
        try:
            return _decode(raw)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolViolation("the store", f"an outcome that is none: {error}") from None


def pack_ops(ops: list[Any]) -> bytes:  # of operations that a client may ask for
    """Return a command outside of any session."""
    return _encode(ClientCommand(LEVEL, 0, 0, 0, ops))


def size_of(op: ClientOp) -> int:
    """Return about how many bytes an operation takes in a command.

    Raises:
        InvalidArgument: A key, value or number is over its limit.
        TooLarge: The whole is.
    """
    if type(op) is Put:
        key, value = op.key, op.value
        if type(key) is str and 0 < len(key) <= KEY_CHARS_MAX and key.isascii() and type(value) is bytes and len(value) <= VALUE_BYTES_MAX:
            if op.lease < 0:
                raise InvalidArgument("lease", op.lease, "must not be below 0")
            return len(value) + len(key) + OP_BYTES
    # Whatever is not the usual: pack it and read it back, as the store will.
    try:
        data = _encode(ClientCommand(LEVEL, 0, 0, 0, [op]))
        _check(data)
    except UnicodeEncodeError as error:
        raise InvalidArgument("key", repr(error.object)[:80], "it is no Unicode text") from None
    except (msgspec.MsgspecError, OverflowError, TypeError, ValueError) as error:
        why, _, _ = str(error).partition(" - at `$")
        raise InvalidArgument(type(op).__name__, _name_of(op), why) from None
    if len(data) > COMMAND_BYTES_MAX:
        raise TooLarge(type(op).__name__, len(data), COMMAND_BYTES_MAX)
    return len(data)


def error_of(refusal: Refusal) -> IsopodError:
    """Return the error that a refusal stands for."""
    return errors.from_code(refusal.code, refusal.message, refusal.hint)


def closed() -> Disconnected:
    """Return the error of what a closed client is asked for."""
    return Disconnected("the store", "this client was closed")


def late(what: str, timeout_s: float, why: IsopodError | None) -> DeadlineExceeded:
    """Return the error of something that was tried until its time was over, with why the last attempt failed."""
    error = DeadlineExceeded(what, timeout_s)
    if why is not None:
        error.hint = f"the last attempt failed: {why.message}" + (f" ({why.hint})" if why.hint else "")
    return error


def was_not_begun(error: IsopodError) -> bool:
    """Return whether what failed so was certainly not begun."""
    return isinstance(error, NotStarted | NotLeader) or error.retry_after_s is not None


def check_client_command(data: bytes) -> ClientCommand:
    """Return a client's command.

    Raises:
        InvalidArgument: It is none, asks for what only nodes may, or is over a limit.
    """
    if len(data) > COMMAND_BYTES_MAX:
        raise InvalidArgument("command", f"{len(data)} bytes", f"at most {COMMAND_BYTES_MAX}")
    try:
        return _check(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidArgument("command", f"{len(data)} bytes", str(error)) from None


def _name_of(op: ClientOp) -> str:
    return str(getattr(op, "key", None) or getattr(op, "prefix", None) or "")[:80]


def _fail(future: "asyncio.Future[Any]", error: IsopodError) -> None:
    if not future.done():
        future.set_exception(error)


assert SenderSettings().ops_max <= COMMAND_OPS_MAX
