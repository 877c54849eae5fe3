"""HttpConnection: one client's connection, from bytes to requests and back.

One request at a time: bytes that follow it wait, unread by the parser, until its response is written; so pipelined requests are answered in
order, and what waits is bounded by one read. The parser (llhttp, strict) is never given a byte beyond the possible end of a message:
a head up to its empty line, a chunked body in pieces that end at each CRLF CRLF. A body of known length does not pass through it at
all. So a message is the same however its bytes were cut.

    input:   head -> (body) -> head ... ; "drop" once the connection is to end
    answer:  a plain function's response is written at once, together with the others of this turn; a coroutine runs in a task

One timer of the wheel per connection: it fires at the earliest deadline there was when it was set, looks what the deadline is by now
(`_next_due`), and is set again. So a request that is answered at once touches no timer.
"""

import asyncio
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any, Final, Literal, cast

import httptools

from isopod.net.http.body import RequestBody
from isopod.net.http.core import Core, Tally
from isopod.net.http.encode import CONTINUE, LENGTH_LINES
from isopod.net.http.intake import Intake, TooMuch
from isopod.net.http.limits import HttpLimits
from isopod.net.http.messages import Answer, HttpError, Request, Response, Upgrade
from isopod.net.http.output import FLUSH_BYTES, Output
from isopod.net.http.reply import Reply, send_stream
from isopod.net.http.syntax import HEAD_END, Facts, check_size, explain_refusal, is_broken, parse_facts, parse_target
from isopod.net.http.timing import Alarm
from isopod.world.errors import BugError, Disconnected

_Input = Literal["head", "body", "drop"]

# Why the transport does not read: bits, since IntFlag costs more than all the rest of a look.
_BUSY: Final = 1
_BODY: Final = 2
_WRITING: Final = 4
_TURN: Final = 8


class HttpConnection(asyncio.Protocol):
    """The server's end of one connection.

    Args:
        core: What it shares with the server's others.
        tally: The counts of its listener.
    """

    # Instances with more than thirty attributes in a dict are slow to reach into (CPython 3.11), and large.
    __slots__ = (
        "_alarm",
        "_buffer",
        "_closing_due",
        "_core",
        "_facts",
        "_handler_due",
        "_has_begun",
        "_head",
        "_head_at",
        "_idle_s",
        "_input",
        "_intake",
        "_is_busy",
        "_is_cancelled",
        "_is_complete",
        "_is_half_closed",
        "_is_last",
        "_is_lost",
        "_is_overdue",
        "_limits",
        "_method",
        "_n_dropped",
        "_number",
        "_output",
        "_parser",
        "_pauses",
        "_peer",
        "_position",
        "_rest",
        "_scanned",
        "_scheme",
        "_since",
        "_sockname",
        "_tally",
        "_target",
        "_task",
        "_transport",
    )

    def __init__(self, core: Core, tally: Tally) -> None:
        self._core = core
        self._tally = tally
        self._limits = core.limits
        self._number = core.next_number()
        self._transport: asyncio.Transport = _NO_TRANSPORT
        self._peer: object = ""
        self._scheme = "http"
        self._sockname: Any = None  # what the socket's family calls an address
        self._parser: httptools.HttpRequestParser | None = None
        self._is_complete = False  # set by the parser at a message's end
        self._head = b""  # the last one, if it may come again, and what it says
        self._method = self._target = ""
        self._rest = b""  # of the last head, from its version on
        self._facts: Facts | None = None
        # Input.
        self._input: _Input = "head"
        self._buffer = b""
        self._position = 0  # what is before was used
        self._scanned = 0  # of a head that is not whole
        self._head_at: float | None = None  # when it began
        self._intake: Intake | None = None  # of the present request's body, and of one that is thrown away
        self._n_dropped = 0
        self._pauses = 0
        # Answers.
        self._output = Output(_NO_TRANSPORT, tally)
        self._is_busy = False
        self._task: asyncio.Task[None] | None = None
        self._has_begun = False  # of the task
        self._is_cancelled = False
        self._handler_due = inf
        self._is_overdue = False
        self._is_half_closed = False
        self._is_last = False  # no request after the present one
        self._is_lost = False
        self._closing_due = inf
        # Time.
        self._since = 0.0
        self._idle_s = core.limits.head_s
        self._alarm = Alarm(core.wheel, core.time, self._on_alarm)

    # -- what the transport calls ----------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = transport = cast("asyncio.Transport", transport)  # the port's promise; uvloop's are not subclasses
        self._output.transport = transport
        core = self._core
        self._peer = transport.get_extra_info("peername") or ""
        if transport.get_extra_info("ssl_object") is not None:
            self._scheme = "https"
        self._since = core.time()
        is_full = core.is_full
        core.connections[self._number] = self
        self._tally.n_accepted += 1
        self._tally.n_connections += 1
        if is_full or core.is_draining:
            self._reject()
        else:
            self._alarm.arm(self._since + self._idle_s)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._tally.n_bytes_received += len(data)
        if self._position == len(self._buffer):
            end = data.find(HEAD_END)
            if (
                end > 0 and self._input == "head" and not self._is_busy and not self._pauses and end == len(data) - 4
            ):  # exactly one head, and nothing before it: most requests
                self._on_head(data)
                return
            self._buffer = data
        else:
            self._buffer = self._buffer[self._position :] + data
        self._scanned = max(0, self._scanned - self._position)
        self._position = 0
        self._advance()

    def eof_received(self) -> bool:
        """See `asyncio.Protocol`: a peer may shut down its side and still wait for its answer, for a while."""
        is_whole = self._is_busy and (self._intake is None or self._intake.is_complete)
        if not is_whole or self._input == "drop":
            return False
        self._is_last = True
        self._is_half_closed = True
        self._expect_progress()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._is_lost = True
        self._input = "drop"
        self._leave()
        if self._intake is not None:
            self._intake.body.fail(Disconnected(str(self._peer) or "client"))
        self._output.lose()
        self.cancel()

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        now = self._core.time()
        self._output.pause(now)
        self._pause(_WRITING)
        self._alarm.arm(now + self._limits.write_s)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._output.resume()
        self._since = self._core.time()
        self._resume(_WRITING)

    # -- what the parser calls -------------------------------------------------------------------------------------------------------

    def on_body(self, data: bytes) -> None:
        """A piece of a chunked body."""
        if self._intake is not None:
            self._intake.take(data)

    def on_message_complete(self) -> None:
        """The end of a message."""
        self._is_complete = True
        if self._intake is not None and self._input == "body":
            self._intake.end()

    # -- what the body calls ---------------------------------------------------------------------------------------------------------

    def want_body(self) -> None:
        """See `body.Flow`."""
        if self._intake is not None and self._intake.is_expecting:
            self._intake.is_expecting = False
            if self._handler_due < inf:  # else the answer has begun, and a 100 would stand in the middle of it
                self._output.write(CONTINUE)
            self._watch_body()

    def pause_body(self) -> None:
        """See `body.Flow`."""
        self._pause(_BODY)

    def resume_body(self) -> None:
        """See `body.Flow`."""
        self._watch_body()
        self._resume(_BODY)

    # -- what a request asks -----------------------------------------------------------------------------------------------------------

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See `asyncio.BaseTransport`. The own address is kept: asking is a system call."""
        if name != "sockname":
            return self._transport.get_extra_info(name, default)
        if self._sockname is None:
            self._sockname = self._transport.get_extra_info(name, default)
        return self._sockname

    # -- what the server calls -------------------------------------------------------------------------------------------------------

    def begin_drain(self) -> None:
        """See `core.Peer`."""
        self._is_last = True
        if not self._is_busy and self._input == "head" and self._position == len(self._buffer):
            self._finish()

    def cancel(self) -> None:
        """See `core.Peer`."""
        self._is_cancelled = True
        # A task that has not begun is cancelled when it has (`_exchange`): the coroutines in its hands would else never be awaited.
        if self._task is not None and self._has_begun:
            self._task.cancel()

    def force(self) -> None:
        """See `core.Peer`."""
        self.cancel()
        self._transport.abort()

    # -- input -----------------------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Use what was received, as far as it goes."""
        if self._output.is_collecting:
            return
        self._output.is_collecting = True
        try:
            self._advance_all()
        finally:
            self._output.is_collecting = False
            self._output.flush()

    def _advance_all(self) -> None:
        n_heads = 0
        while self._position < len(self._buffer):
            kind = self._input
            if kind == "head":
                if self._is_busy:
                    self._pause(_BUSY)
                    return
                if self._pauses & _WRITING:
                    return
                if n_heads >= self._limits.pipelined_max:
                    self._pause(_TURN)
                    self._core.loop.call_soon(self._resume, _TURN)
                    return
                n_heads += 1
                if not self._next_head():
                    return
            elif kind == "body":
                self._advance_body()
            else:
                self._drop()

    def _next_head(self) -> bool:
        """Answer the next request; return whether its head was whole."""
        buffer, position = self._buffer, self._position
        while buffer.startswith(b"\r\n", position):  # RFC 9112 section 2.2: empty lines before a request are skipped
            position = self._position = position + 2
            self._scanned = 0
        end = buffer.find(HEAD_END, max(position, self._scanned - 3))
        if end < 0:
            self._check_beginning()
            return False
        end += 4
        head = buffer if position == 0 and end == len(buffer) else buffer[position:end]
        self._position = end
        self._scanned = 0
        self._head_at = None
        self._on_head(head)
        return True

    def _check_beginning(self) -> None:
        """Refuse a head that is not whole, but too long or broken; else see that it does not take for ever."""
        limits = self._limits
        head = self._buffer[self._position :]
        if not head:
            return
        if is_broken(head):
            self._refuse(HttpError(400, "a malformed request"))
        elif len(head) > limits.target_bytes_max and b"\r\n" not in head[: limits.target_bytes_max + 32]:
            self._refuse(HttpError(414, f"a request target of more than {limits.target_bytes_max} bytes"))
        elif len(head) > limits.head_bytes_max:
            self._refuse(HttpError(431, f"a head of more than {limits.head_bytes_max} bytes"))
        else:
            self._scanned = len(self._buffer)
            if self._head_at is None:
                self._head_at = self._core.time()
                self._alarm.arm(self._head_at + limits.head_s)

    def _on_head(self, head: bytes) -> None:
        """Answer the request that this head begins."""
        facts = self._facts
        if facts is not None and head == self._head:  # the very request before this one: there is nothing new to learn from it
            request = Request(self._method, self._target, facts.headers, facts.version, b"", self._peer, self._scheme, self)
            self._dispatch(request, facts)
            return
        self._head = b""
        parser = self._parser
        if parser is None:
            parser = self._parser = httptools.HttpRequestParser(self)
        self._is_complete = False
        is_switching = False
        try:
            parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            is_switching = True
            self._parser = None
        except httptools.HttpParserError:
            self._refuse(explain_refusal(head))
            return
        limits = self._limits
        # The request line has two spaces: llhttp sees that there are no less, `parse_target` that there are no more.
        target_end = head.rfind(b" ", 0, head.find(b"\r\n"))
        if target_end < 0 or head[0] <= _SPACE:  # llhttp skips line ends of any kind before the line
            self._refuse(HttpError(400, "a malformed request"))
            return
        method, _, target = head[:target_end].decode("latin-1").partition(" ")
        try:
            if facts is None or head[target_end:] != self._rest:
                self._rest = head[target_end:]
                facts = self._facts = None
                facts = self._facts = parse_facts(self._rest, limits)
            if len(head) > self._core.looked_bytes:
                check_size(head, target, limits)
            if self._is_complete is facts.has_body and not is_switching:
                raise HttpError(400, "a malformed request")  # llhttp and we must see the same message
            if is_switching and facts.is_chunked:
                raise HttpError(400, "an Upgrade with a chunked body")
            if not target.startswith("/") or "#" in target or " " in target or method == "CONNECT":
                target = parse_target(method, target, facts.host)
        except HttpError as error:
            self._refuse(error)
            return
        if facts.is_plain:
            self._head, self._method, self._target = head, method, target
        body = self._begin_body(facts) if facts.has_body else b""
        self._dispatch(Request(method, target, facts.headers, facts.version, body, self._peer, self._scheme, self), facts)

    def _begin_body(self, facts: Facts) -> RequestBody:
        self._intake = Intake(self, self._limits, facts, self._parser)
        self._input = "body"
        if not facts.is_chunked:
            self._parser = None  # it would wait for the body
        return self._intake.body

    def _advance_body(self) -> None:
        intake = self._intake
        assert intake is not None
        try:
            self._position = intake.advance(self._buffer, self._position)
        except HttpError as error:
            self._refuse(error)
            return
        except TooMuch:
            self._finish()
            return
        if intake.is_complete:
            self._input = "head"
            if not self._is_busy:
                self._intake = None
                self._since = self._core.time()

    def _drop(self) -> None:
        self._n_dropped += len(self._buffer) - self._position
        self._position = len(self._buffer)
        if self._n_dropped > self._limits.discard_bytes_max:
            self._transport.abort()

    def _refuse(self, error: HttpError) -> None:
        """Answer what cannot be a request, or its body; nothing more is understood on this connection."""
        self._tally.n_refused += 1
        self._core.logger.debug("http.refused", status=error.status, why=error.message, peer=str(self._peer))
        self._is_last = True
        if self._is_busy:
            if self._intake is not None:
                self._intake.body.fail(error)
            self._input = "drop"
            self._position = len(self._buffer)
            return
        if self._input == "head":
            self._write_refusal(error)
        self._finish(lingers=True)

    def _write_refusal(self, error: HttpError) -> None:
        reply = Reply.of(self._core, "GET", self._core.failure(None, error), _REFUSED, is_last=True)
        self._write_reply(reply)

    def _reject(self) -> None:
        """One connection too many."""
        self._tally.n_rejected += 1
        if len(self._core.connections) > 2 * self._limits.connections_max:
            self._transport.abort()
            return
        self._write_refusal(HttpError(503, "too many connections" if not self._core.is_draining else "shutting down"))
        self._finish(lingers=True)

    # -- answers ---------------------------------------------------------------------------------------------------------------------

    def _dispatch(self, request: Request, facts: Facts) -> None:
        core = self._core
        began_ns = core.now_ns()
        try:
            answer = core.handler(request)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the root of every handler
            answer = core.failure(request, error)
        if type(answer) is Response and type(answer.body) is bytes:
            self._write_whole(request, answer, answer.body, facts)
            self._idle_s = core.limits.idle_s
            self._tally.observe(core.now_ns() - began_ns)
            if self._intake is not None or self._is_last:
                self._end_exchange()
            return
        self._is_busy = True
        self._handler_due = core.time() + self._limits.handler_s
        self._watch_body()
        self._task = core.spawn(self._number, self, self._exchange(request, answer, facts, began_ns))
        self._alarm.arm(self._handler_due)

    def _write_whole(self, request: Request, response: Response, body: bytes, facts: Facts) -> None:
        """Write a response whose body is there."""
        core = self._core
        now = self._since = core.time()
        if now >= core.date_until_s:
            core.tick(now)
        if facts.is_simple and (self._intake is None or self._intake.is_complete) and not self._is_last and request.method != "HEAD":
            self._reply_simple(request, response, body, facts)
        else:
            self._write_reply(self._reply(request, response, facts))

    def _reply_simple(self, request: Request, response: Response, body: bytes, facts: Facts) -> None:
        """Write a whole response if nothing about it is special: what `_reply` would write, with less ado."""
        core = self._core
        status = response.status
        try:
            lines, prefix = core.plain_lines.get(response.headers), core.prefixes.get(status)
        except TypeError:  # not what a Response holds; `Reply` says what is wrong
            lines = prefix = None
        if lines is None or prefix is None or status in _BODILESS:
            self._write_reply(self._reply(request, response, facts))
            return
        tally = self._tally
        tally.by_class[status // 100] += 1
        n_bytes = len(body)
        length = LENGTH_LINES[n_bytes] if n_bytes < len(LENGTH_LINES) else b"content-length: %d\r\n" % n_bytes
        if n_bytes > FLUSH_BYTES:
            self._output.write(b"".join([prefix, length, lines]), body)
            return
        data = b"".join([prefix, length, lines, body])
        if self._output.is_collecting:
            self._output.write(data)
        else:
            tally.n_bytes_sent += len(data)
            self._transport.write(data)

    def _reply(self, request: Request, response: Response, facts: Facts) -> Reply:
        """Return what to write; sets whether it is the connection's last."""
        is_last = (
            self._is_last or not facts.keep_alive or self._core.is_draining or (self._intake is not None and not self._intake.can_discard())
        )
        reply = Reply.of(self._core, request.method, response, facts, is_last=is_last, request=request)
        self._is_last = reply.is_last
        return reply

    def _write_reply(self, reply: Reply) -> None:
        self._count(reply.status)
        if isinstance(reply.body, bytes) and reply.body:
            self._output.write(reply.head, reply.body)
        else:
            self._output.write(reply.head)

    async def _exchange(self, request: Request, answer: Answer | Awaitable[Answer], facts: Facts, began_ns: int) -> None:
        """Wait for a handler's answer and send it."""
        core = self._core
        self._has_begun = True
        if self._is_cancelled and self._task is not None:
            core.loop.call_soon(self._task.cancel)
        try:
            try:
                settled = answer if isinstance(answer, Response | Upgrade) else await answer
            except asyncio.CancelledError:
                settled = self._take_back_cancellation(request)
            except Exception as error:  # noqa: BLE001 - the root of every handler
                settled = self._fail(request, error)
            self._handler_due = inf
            if self._is_lost:
                pass
            elif type(settled) is Response and type(settled.body) is bytes:
                self._write_whole(request, settled, settled.body, facts)
            else:
                await self._send(request, settled, facts)
        except BaseException:
            self._transport.abort()
            raise
        finally:
            self._task = None
            self._has_begun = False
            core.tasks.pop(self._number, None)
            self._tally.observe(core.now_ns() - began_ns)
        self._end_exchange()

    async def _send(self, request: Request, answer: object, facts: Facts) -> None:
        """Send what a handler gave, if it is not a whole response."""
        if isinstance(answer, Upgrade):
            await self._output.wait_writable()
            self._switch(request, answer, facts)
            return
        if not isinstance(answer, Response):
            answer = self._core.failure(request, TypeError(f"the handler returned {type(answer).__name__}, not a Response"))
        reply = self._reply(request, answer, facts)
        if isinstance(reply.body, bytes):
            self._write_reply(reply)
            return
        self._count(reply.status)
        if not await send_stream(self, reply, self._core, request):
            self._transport.abort()

    def _take_back_cancellation(self, request: Request) -> Response:
        """Return the answer of a handler that took too long; raise if it was cancelled for another reason."""
        task = asyncio.current_task()
        assert task is not None
        if not task.cancelling():  # by nobody: something it waited for was
            return self._core.failure(request, BugError("the handler ended as if it was cancelled"))
        if not self._is_overdue or self._is_lost:
            raise asyncio.CancelledError
        task.uncancel()
        return Response.error(504, f"no answer within {self._limits.handler_s:g} s", code="deadline_exceeded")

    def _fail(self, request: Request, error: Exception) -> Response:
        if self._is_lost and isinstance(error, Disconnected):
            return Response(500)  # nobody's fault, and nobody's to read
        return self._core.failure(request, error)

    def _end_exchange(self) -> None:
        """The response is written: go on with what waits."""
        self._is_busy = False
        self._handler_due = inf
        if self._is_lost:
            return
        if self._is_last:
            self._finish()
            return
        intake = self._intake
        if intake is not None:
            if intake.is_complete:
                self._intake = None
            else:
                intake.discard()
                self._watch_body()
        self._since = self._core.time()
        self._idle_s = self._limits.idle_s
        self._alarm.arm(self._since + self._idle_s)
        if self._pauses:
            self._resume(_BUSY | _BODY)

    def _switch(self, request: Request, upgrade: Upgrade, facts: Facts) -> None:
        """Hand the connection to another protocol."""
        core = self._core
        if not facts.wants_upgrade or (self._intake is not None and not self._intake.is_complete):
            hint, fields = "ask for it with Connection: upgrade, and no body", (("upgrade", upgrade.protocol),)
            refusal = HttpError(426, f"this resource speaks {upgrade.protocol}", hint, headers=fields)
            self._write_reply(self._reply(request, core.failure(request, refusal), facts))
            return
        try:
            head = Reply.switching(upgrade)
        except Exception as error:  # noqa: BLE001 - the handler's own headers
            self._write_reply(self._reply(request, core.failure(request, error), facts))
            return
        self._count(101)
        self._output.write(head)
        self._tally.n_upgrades += 1
        self._hand_over(upgrade, self._buffer[self._position :])

    def _hand_over(self, upgrade: Upgrade, leftover: bytes) -> None:
        core, transport = self._core, self._transport
        self._input, self._buffer, self._position = "drop", b"", 0
        self._is_lost = True  # for all that is HTTP
        if transport.is_closing():
            return
        try:
            protocol = upgrade.takeover(transport, leftover)
        except Exception as error:  # noqa: BLE001 - the root of the other protocol
            core.report(None, error)
            transport.abort()
            self._leave()
            return
        transport.set_protocol(protocol)
        self._leave()
        self._tally.n_connections += 1
        core.upgraded[self._number] = (transport, upgrade, self._tally)
        if self._pauses:
            transport.resume_reading()
        if core.is_draining and upgrade.on_drain is not None:
            upgrade.on_drain()

    def _count(self, status: int) -> None:
        self._tally.by_class[min(status // 100, 5)] += 1

    # -- output ----------------------------------------------------------------------------------------------------------------------

    def write(self, *pieces: bytes) -> None:
        """Send pieces of a response. For `reply`."""
        self._output.write(*pieces)
        if self._is_half_closed:
            self._expect_progress()

    def note_sent(self, n_bytes: int) -> None:
        """Count what was sent past `write`. For `reply`."""
        self._tally.n_bytes_sent += n_bytes
        if self._is_half_closed:
            self._expect_progress()

    @property
    def transport(self) -> asyncio.Transport:
        """What a file is sent to."""
        return self._transport

    @property
    def is_lost(self) -> bool:
        """Whether there is nobody to write to any more."""
        return self._is_lost

    async def wait_writable(self) -> None:
        """Wait until the peer has taken enough of what was written, or is gone."""
        await self._output.wait_writable()

    def _finish(self, *, lingers: bool = False) -> None:
        """Close after what was written has gone; a peer that may still be sending gets time to read it."""
        if self._is_lost or self._closing_due < inf:
            return
        self._output.flush()
        is_sending = lingers or self._input != "head" or self._position < len(self._buffer)
        self._input = "drop"
        self._position = len(self._buffer)
        now = self._core.time()
        transport = self._transport
        if is_sending and transport.can_write_eof() and not transport.is_closing():
            # Closing with bytes unread would reset the connection, and the peer would lose our answer.
            self._closing_due = now + self._limits.linger_s
            transport.write_eof()
            self._pauses = 0
            transport.resume_reading()
        else:
            self._closing_due = now + self._limits.write_s
            self._output.begin_pace(now)
            transport.close()
        self._alarm.arm(self._closing_due)

    def _pause(self, why: int) -> None:
        if not self._pauses and not self._transport.is_closing():
            self._transport.pause_reading()
        self._pauses |= why

    def _resume(self, why: int) -> None:
        """Read again, unless there is another reason not to, after what was received already."""
        if not self._pauses & why:
            return
        self._pauses &= ~why
        if self._is_lost:
            return
        self._advance()
        if not self._pauses and not self._transport.is_closing():
            self._transport.resume_reading()

    def _expect_progress(self) -> None:
        """Give an answer to a peer that has shut down its side, or is gone: a write would tell which."""
        self._handler_due = self._core.time() + self._limits.half_closed_s
        self._alarm.arm(self._handler_due)

    # -- time ------------------------------------------------------------------------------------------------------------------------

    def _watch_body(self) -> None:
        """Begin to look at the pace of the body, unless the peer is not to send."""
        intake = self._intake
        if intake is not None and not intake.is_complete and not intake.is_expecting:
            now = self._core.time()
            intake.pace.begin(now, intake.n_bytes)
            self._alarm.arm(now + self._limits.body_s)

    def _on_alarm(self) -> None:
        now = self._core.time()
        due, expire = self._next_due()
        if due <= now:
            expire()
            due, _ = self._next_due()
        if not self._is_lost and due < inf:
            self._alarm.arm(max(due, now))

    def _next_due(self) -> tuple[float, Callable[[], None]]:
        """Return the earliest deadline as things are now, and what is to happen then."""
        limits = self._limits
        if self._closing_due < inf:
            return self._closing_due, self._on_closing_late
        due, expire = self._handler_due, self._on_handler_late
        if self._pauses & _WRITING and self._output.pace.since + limits.write_s < due:
            due, expire = self._output.pace.since + limits.write_s, self._on_write_look
        pace = None if self._intake is None or self._pauses & _BODY or self._input != "body" else self._intake.pace
        if pace is not None and pace.is_on and pace.since + limits.body_s < due:
            due, expire = pace.since + limits.body_s, self._on_body_look
        if not self._is_busy and self._input == "head" and not self._pauses & _WRITING:
            since = self._since + self._idle_s if self._head_at is None else self._head_at + limits.head_s
            if since < due:
                due, expire = since, self._on_idle if self._head_at is None else self._on_head_late
        return due, expire

    def _on_closing_late(self) -> None:
        """Cut the connection, unless a slow peer is still taking what was written before it was closed."""
        now = self._core.time()
        if self._transport.get_write_buffer_size() and self._output.is_taken(now, self._limits.bytes_per_s_min):
            self._closing_due = now + self._limits.write_s
        else:
            self._transport.abort()

    def _on_idle(self) -> None:
        self._finish()

    def _on_head_late(self) -> None:
        self._refuse(HttpError(408, f"the request's head took longer than {self._limits.head_s:g} s"))

    def _on_handler_late(self) -> None:
        self._handler_due = inf
        if self._task is None:
            return
        if self._is_overdue:  # it was told already, and goes on
            self._transport.abort()
        self._is_overdue = True
        self._is_last = True
        self._handler_due = self._core.time() + self._limits.linger_s
        self.cancel()

    def _on_body_look(self) -> None:
        limits, intake = self._limits, self._intake
        if intake is not None and not intake.pace.look(self._core.time(), intake.n_bytes, limits.bytes_per_s_min):
            intake.pace.end()
            self._refuse(HttpError(408, f"the request's body came slower than {limits.bytes_per_s_min} bytes a second"))

    def _on_write_look(self) -> None:
        if not self._output.is_taken(self._core.time(), self._limits.bytes_per_s_min):
            self._tally.n_refused += 1
            self._core.logger.debug("http.stalled", peer=str(self._peer))
            self._transport.abort()

    def _leave(self) -> None:
        """Give up what the server holds of this connection."""
        self._alarm.cancel()
        if self._core.connections.pop(self._number, None) is not None:
            self._tally.n_connections -= 1
            self._core.on_gone()


_NO_TRANSPORT: Final = asyncio.Transport()
_SPACE: Final = 0x20
_BODILESS: Final = frozenset((204, 304))
_REFUSED: Final = parse_facts(b" HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n", HttpLimits())
