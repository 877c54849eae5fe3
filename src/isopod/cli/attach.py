"""An attached command: this terminal's keys, signals and size go to it, its output comes here, and its exit code is returned.

One loop over four things: the node's connection, standard input, signals, and the descriptor the oldest unwritten output is for.
It blocks nowhere else, so that a signal always gets through, also while whoever reads our output has stopped reading.

Rules: the node is given room for more output only when what it sent is written, and standard input is read only while the node
has room for it: neither side holds more than a window. The terminal's mode is put back however this ends.
"""

from __future__ import annotations

from isopod.cli.lean import answer, bytes_of, number_of, text_of
from isopod.cli.protocol import ERROR, ITEM, REPLY
from isopod.cli.say import note
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from isopod.cli.lean import Link
    from isopod.cli.protocol import Body, Event

PROXIED: Final = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2")
"""Passed on to the command, unless keys are: then it gets ctrl-c as a key, and these end the client alone."""
FATAL_RAW: Final = ("TERM", "HUP", "QUIT")
STDIN_BYTES: Final = 32 << 10
ROOM_RESERVED_BYTES: Final = 4 << 10
"""Kept free in the node's window by standard input, so that signals and sizes always fit."""
OUTBOX_BYTES_MAX: Final = 256 << 10
INSISTENCE: Final = 3
"""So many SIGINT or SIGTERM make the client leave a command that ignores them."""
UNKNOWN_EXIT_CODE: Final = 255
DETACH_FIRST: Final = b"\x10"
DETACH_SECOND: Final = b"\x11"


def attached(link: Link, method: str, body: Body, *, terminal: bool, stdin: bool) -> int:
    """Run a command attached to this terminal.

    Args:
        link: The node.
        method: container.run, container.start or container.exec.
        body: Its request.
        terminal: The command has a terminal.
        stdin: Standard input is handed on.

    Returns:
        The command's exit code; 0 if the user detached; 128 + N if signal N ended the client.

    Raises:
        IsopodError: It could not be run, or the node went away.
        BrokenPipeError: Nobody reads standard output any more.
    """
    raw = terminal and stdin and console.is_terminal(console.STDIN)
    names = [*(FATAL_RAW if raw else PROXIED), *(("WINCH", "CONT") if terminal else ())]
    session = Session(link, terminal=terminal, stdin=stdin, raw=raw)
    with console.SignalPipe(names) as signals:
        if not raw:
            code = session.run(method, body, signals)
        else:
            with console.RawMode(console.STDIN) as mode:
                session.mode = mode
                code = session.run(method, body, signals)
    if session.farewell:
        note(session.farewell + "\n")
    return code


class DetachFilter:
    """Finds ctrl-p ctrl-q among keys. A lone ctrl-p is held back until the next key."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """Return what to hand on, and whether the keys were found (what follows them is dropped)."""
        data = self._held + data
        self._held = b""
        before, found, _ = data.partition(DETACH_FIRST + DETACH_SECOND)
        if found:
            return before, True
        if data.endswith(DETACH_FIRST):
            self._held = DETACH_FIRST
            data = data[:-1]
        return data, False


class Session:
    """One attached call, from its request to its end."""

    def __init__(self, link: Link, *, terminal: bool, stdin: bool, raw: bool) -> None:
        self.mode: console.RawMode | None = None
        """The raw mode to enter again after a stop."""
        self.farewell = ""
        """What to tell the user once the terminal is itself again."""
        self._link: Final = link
        self._terminal: Final = terminal
        self._stdin_open = stdin
        self._keys: Final = DetachFilter() if raw else None
        self._output: Final[list[tuple[int, memoryview, int]]] = []
        self._code: int | None = None
        self._call = 0
        self._started = ""
        self._is_exec = False
        self._n_interrupts = 0

    def run(self, method: str, body: Body, signals: console.SignalPipe) -> int:
        """Make the call and serve it to its end; see `attached`."""
        self._is_exec = method == "container.exec"
        self._call = self._link.begin(method, body, None)
        try:
            while self._code is None:
                self._turn(signals)
        except OSError:
            raise
        except Exception as error:
            from isopod.world.errors import PeerError

            self._flush(signals)
            if isinstance(error, PeerError) and self._started:
                error.hint = f"{self._started} may go on running: isopod ps -a; isopod logs {self._started}"
            raise
        return self._flush(signals) or self._code

    def _turn(self, signals: console.SignalPipe) -> None:
        readers = [signals.fd]
        protocol = self._link.protocol
        has_room = protocol.room(self._call) >= STDIN_BYTES + ROOM_RESERVED_BYTES and len(protocol.outbox) < OUTBOX_BYTES_MAX
        if self._stdin_open and has_room:
            readers.append(console.STDIN)
        writers = [self._output[0][0]] if self._output else []
        events, readable, writable = self._link.turn(None, readers, writers)
        for event in events:
            if event[1] == self._call:
                self._take(event)
        if writable:
            self._write()
        if signals.fd in readable:
            for number in signals.take():
                self._signal(number)
        if console.STDIN in readable and self._code is None:
            self._read()

    def _take(self, event: Event) -> None:
        kind, call, body, n_bytes = event
        if kind == ITEM:
            what = text_of(body, "type")
            if what in ("stdout", "stderr"):
                data = bytes_of(body, "data")
                self._output.append((console.STDERR if what == "stderr" else console.STDOUT, memoryview(data), n_bytes))
                return
            if what == "started":
                self._started = text_of(body, "name") or text_of(body, "id")
            self._link.protocol.consumed(call, n_bytes)
        elif kind == REPLY:
            ran = answer(event)
            code = number_of(ran, "exit_code")
            self._code = UNKNOWN_EXIT_CODE if code is None else code & 0xFF
            if ran.get("oom_killed") is True:
                self.farewell = f"note: {text_of(ran, 'name')} used more memory than its limit and was killed"
        elif kind == ERROR:
            if self._n_interrupts and not self._started:
                self._code = 130
                return
            answer(event)

    def _write(self) -> None:
        """Write as much of the oldest output as surely does not block."""
        fd, data, n_bytes = self._output[0]
        n_safe = len(data) if console.is_regular(fd) else console.PIPE_BYTES_SAFE
        try:
            taken = console.write(fd, data[:n_safe])
        except OSError:
            if fd == console.STDOUT:
                raise
            taken = len(data)  # nobody listens to stderr: that ends no command
        if taken < len(data):
            self._output[0] = (fd, data[taken:], n_bytes)
            return
        del self._output[0]
        self._link.protocol.consumed(self._call, n_bytes)

    def _flush(self, signals: console.SignalPipe) -> int:
        """Write what is left; return 128 + N if signal N came meanwhile, for then the user wants to leave."""
        while self._output:
            readable, writable = console.wait([signals.fd], [self._output[0][0]], None)
            if writable:
                self._write()
            if readable:
                for number in signals.take():
                    if number not in _numbers("WINCH", "CONT"):
                        return 128 + number
        return 0

    def _read(self) -> None:
        """Hand on what was typed."""
        data = console.read(console.STDIN, STDIN_BYTES)
        if not data:
            self._stdin_open = False
            self._send({"type": "stdin_end"})
            return
        if self._keys is not None:
            data, detach = self._keys.feed(data)
            if detach:
                self._detach()
        if data:
            self._send({"type": "stdin", "data": data})

    def _detach(self) -> None:
        self._code = 0
        name = self._started or "the container"
        if self._is_exec:
            self.farewell = f"\ndetached from the command in {name}"
        else:
            self.farewell = f"\ndetached: {name} keeps running; its output: isopod logs -f {name}; end it: isopod stop {name}"

    def _signal(self, number: int) -> None:
        if number in _numbers("WINCH", "CONT"):
            if self.mode is not None and number in _numbers("CONT"):
                self.mode.apply()
            rows, columns = console.terminal_size(console.STDOUT, console.STDIN)
            if rows:
                self._send({"type": "resize", "rows": rows, "columns": columns})
            return
        if self.mode is not None:
            self._code = 128 + number
            return
        if number in _numbers("INT", "TERM"):
            self._n_interrupts += 1
        if self._n_interrupts >= INSISTENCE:
            self._code = 128 + number
            self.farewell = f"left: {self._started or 'the container'} goes on; end it: isopod kill {self._started}".rstrip()
        elif self._started:
            self._send({"type": "signal", "number": number})
        elif number in _numbers("INT", "TERM"):
            self._link.protocol.cancel(self._call)

    def _send(self, item: Body) -> None:
        protocol = self._link.protocol
        if protocol.room(self._call) > 0:
            protocol.send_item(self._call, item)


def _numbers(*names: str) -> list[int | None]:
    return [console.signal_number(name) for name in names]
