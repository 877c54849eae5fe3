"""`top`: who uses this machine, live: the rows of a metrics agent's /top, asked again and again.

On a terminal it draws over itself and hears keys; into a pipe it prints one table (or line of JSON) after another. One loop waits for four
things: the agent's answer, the next time to ask, keys, and signals. The terminal is put back however this ends.

Rules: an agent that cannot be asked ends the command if that happens at the beginning, and is a line above the table later: a view that
stays open for days outlives a restart of the agent.
"""

from __future__ import annotations

from isopod.cli.fetch import Fetch
from isopod.cli.protocol import one_line
from isopod.cli.say import invalid, note, say
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from isopod.cli.parse import Parsed

    Row = dict[str, object]

ADDRESS: Final = "127.0.0.1:8090"
INTERVAL: Final = "2"
INTERVAL_MIN_S: Final = 0.1
INTERVAL_MAX_S: Final = 3600.0
EXIT_INTERRUPTED: Final = 130
SORTS: Final = {
    "cpu": ("cpu_cores",),
    "memory": ("memory_bytes",),
    "network": ("received_bytes_per_s", "sent_bytes_per_s"),
    "disk": ("read_bytes_per_s", "written_bytes_per_s"),
}
KEYS: Final = {"c": "cpu", "m": "memory", "n": "network", "d": "disk"}
ENDINGS: Final = ("INT", "TERM", "HUP")
QUITS: Final = ("q", "Q", "\x03", "\x04")
TITLES: Final = ("NAMESPACE", "NAME", "CPU", "MEMORY", "RECEIVED/S", "SENT/S", "READ/S", "WRITTEN/S", "AGE")
TEXT_COLUMNS: Final = 2
"""So many columns from the left are text; the others are figures and stand to the right."""
NAME_WIDTH_MAX: Final = 48
UNKNOWN: Final = "-"
_ENTER: Final = "\x1b[?1049h\x1b[?25l"
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_TITLE: Final = "\x1b[7m"
_PLAIN: Final = "\x1b[0m"


def main(parsed: Parsed) -> int:
    """Show the view.

    Args:
        parsed: The command line.

    Returns:
        0, or 128 + N if signal N ended it.

    Raises:
        IsopodError: The agent cannot be asked.
    """
    view = _View(parsed)
    view.first()  # before the screen and the signals are taken: what is wrong is said on the terminal as it was
    if parsed.flag("once"):
        view.show()
        return 0
    if not console.is_terminal(console.STDOUT) or view.form == "json":
        with console.SignalPipe(ENDINGS) as signals:
            return view.run(signals)
    view.screen = True
    with console.SignalPipe((*ENDINGS, "WINCH")) as signals:
        try:
            say(_ENTER)
            if not console.is_terminal(console.STDIN):
                return view.run(signals)
            with console.RawMode(console.STDIN):
                return view.run(signals, keys=True)
        finally:
            _leave_screen()


def _leave_screen() -> None:
    try:
        say(_LEAVE)
    except OSError:
        return  # the terminal itself is gone


class _View:
    """What is shown, and how."""

    def __init__(self, parsed: Parsed) -> None:
        self.screen = False
        self.form: Final = parsed.value("format", "table")
        self._sort = parsed.value("sort", "cpu")
        self._interval_s: Final = _interval_s(parsed.value("interval", INTERVAL))
        told = console.environment("ISOPOD_PULSE_LISTEN") or console.environment("KATA_PULSE_LISTEN")
        self._address: Final = parsed.value("address") or told or ADDRESS
        self._authorization: Final = _authorization(parsed.value("token-file"), parsed.value("basic-file"))
        self._body = b""
        self._rows: list[Row] = []
        self._trouble = ""

    def first(self) -> None:
        """Ask for the first time; what fails then is raised."""
        fetch = Fetch(self._address, "/top?format=json", self._authorization)
        try:
            while True:
                console.wait([fetch.reads], fetch.writes, max(0.0, fetch.until_s - console.monotonic_s()) + 0.01)
                body = fetch.advance()
                if body is not None:
                    return self._take(body)
        finally:
            fetch.close()

    def show(self) -> None:
        """Print what is known, or draw it."""
        say(self._frame() if self.screen else self._printed())

    def run(self, signals: console.SignalPipe, *, keys: bool = False) -> int:
        """Show what is known, and ask again and again, until a key or a signal ends it."""
        self.show()
        next_s = console.monotonic_s() + self._interval_s
        fetch: Fetch | None = None
        try:
            while True:
                until_s = next_s if fetch is None else fetch.until_s + 0.01
                readers = [signals.fd, *([console.STDIN] if keys else ()), *([fetch.reads] if fetch else ())]
                ready, _ = console.wait(readers, fetch.writes if fetch else [], max(0.0, until_s - console.monotonic_s()))
                if signals.fd in ready and (code := self._signalled(signals.take())):
                    return code
                if keys and console.STDIN in ready and (left := self._key()) is not None:
                    return left
                if fetch is None and console.monotonic_s() >= next_s:
                    fetch = self._begun()
                    next_s = console.monotonic_s() + self._interval_s
                elif fetch is not None:
                    fetch = self._advanced(fetch)
        finally:
            if fetch is not None:
                fetch.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _begun(self) -> Fetch | None:
        try:
            return Fetch(self._address, "/top?format=json", self._authorization)
        except Exception as error:  # noqa: BLE001  looked at below
            self._failed(error)
            return None

    def _advanced(self, fetch: Fetch) -> Fetch | None:
        """Go on with a request; return it while it is not over."""
        try:
            body = fetch.advance()
            if body is None:
                return fetch
            self._take(body)
            self._trouble = ""
            self.show()
        except BrokenPipeError:
            fetch.close()
            raise
        except Exception as error:  # noqa: BLE001  looked at below
            self._failed(error)
        fetch.close()
        return None

    def _failed(self, error: Exception) -> None:
        """Say what went wrong, once; anything but a failure of the agent's is raised."""
        from isopod.world.errors import IsopodError

        if not isinstance(error, IsopodError):
            raise error
        is_new = self._trouble != error.message
        self._trouble = error.message
        if self.screen:
            self.show()
        elif is_new:
            note(f"note: {one_line(error.message)}; trying again\n")

    def _take(self, body: bytes) -> None:
        import json

        try:
            document = json.loads(body)
            rows = document["sandboxes"]
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            from isopod.world.errors import ProtocolViolation

            raise ProtocolViolation(f"the metrics agent at {self._address}", "what it says at /top is no table of sandboxes") from None
        self._body, self._rows = body, rows

    def _signalled(self, numbers: list[int]) -> int:
        resized = console.signal_number("WINCH")
        for number in numbers:
            if number != resized:
                return 128 + number
        if self.screen:
            self.show()
        return 0

    def _key(self) -> int | None:
        """Act on keys; return an exit code if they end the view."""
        data = console.read(console.STDIN, 64)
        if not data:
            return 0
        for key in data.decode("latin-1"):
            if key in QUITS:
                return EXIT_INTERRUPTED if key == "\x03" else 0
            self._sort = KEYS.get(key, self._sort)
        self.show()
        return None

    def _printed(self) -> str:
        if self.form == "json":
            return self._body.decode("utf-8", "replace").rstrip("\n") + "\n"
        return "".join(line.rstrip() + "\n" for line in table(self._ordered()))

    def _frame(self) -> str:
        """Return what draws the screen anew: each line over the old one, then nothing below."""
        height, width = console.terminal_size(console.STDOUT)
        height, width = height or 24, width or 80
        title, *lines = table(self._ordered()[: max(0, height - 3)])
        drawn = [self._summary()[:width], self._trouble_line()[:width], f"{_TITLE}{title[:width]:<{width}}{_PLAIN}"]
        drawn += [line[:width] for line in lines]
        return "\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in drawn[:height]) + "\x1b[J"

    def _summary(self) -> str:
        cores = sum(_weight(row, SORTS["cpu"]) for row in self._rows if row.get("cpu_cores") is not None)
        memory = sum(_weight(row, SORTS["memory"]) for row in self._rows if row.get("memory_bytes") is not None)
        n_up = sum(row.get("up") is True for row in self._rows)
        used = f"{cores:.2f} cores, {_size(memory)}"
        return f"isopod top  {len(self._rows)} sandboxes, {n_up} up  {used}  by {self._sort}  {one_line(self._address)}"

    def _trouble_line(self) -> str:
        return one_line(f"! {self._trouble}") if self._trouble else "keys: c cpu  m memory  n network  d disk  q quit"

    def _ordered(self) -> list[Row]:
        keys = SORTS[self._sort]
        return sorted(self._rows, key=lambda row: (-_weight(row, keys), _text(row, "namespace"), _text(row, "name"), _text(row, "id")))


def table(rows: list[Row]) -> list[str]:
    """Return rows as lines of text, titles first.

    Args:
        rows: As the agent says them; what is no figure where one belongs is shown as unknown.
    """
    cells = [TITLES, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(TITLES))]
    return [
        "  ".join(
            cell.ljust(width) if column < TEXT_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def _cells(row: Row) -> tuple[str, ...]:
    name = _text(row, "name") or _text(row, "id")[:12]
    age = _number(row, "age_s")
    return (
        one_line(_text(row, "namespace"))[:NAME_WIDTH_MAX] or UNKNOWN,
        one_line(name)[:NAME_WIDTH_MAX] or UNKNOWN,
        UNKNOWN if (cores := _number(row, "cpu_cores")) is None else f"{cores:.3f}",
        *(
            UNKNOWN if (figure := _number(row, key)) is None else _size(figure)
            for key in ("memory_bytes", *SORTS["network"], *SORTS["disk"])
        ),
        ("" if row.get("up") is True else "down ") + (UNKNOWN if age is None else f"{age:.0f}s"),
    )


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    return value if isinstance(value, str) else ""


def _number(row: Row, key: str) -> float | None:
    value = row.get(key)
    is_figure = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_figure and 0 <= value < 1e30 else None  # type: ignore[operator,arg-type]  # it is a figure


def _weight(row: Row, keys: tuple[str, ...]) -> float:
    """Return what a row is ordered by; what is not known comes behind zero."""
    known = [value for value in (_number(row, key) for key in keys) if value is not None]
    return sum(known) if known else -1.0


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f}{unit}" if unit == "B" else f"{n_bytes:.1f}{unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f}TiB"


def _interval_s(text: str) -> float:
    from isopod.world.units import parse_duration

    seconds = parse_duration(text)
    if not INTERVAL_MIN_S <= seconds <= INTERVAL_MAX_S:
        raise invalid("--interval", text, f"want {INTERVAL_MIN_S} to {INTERVAL_MAX_S:.0f} seconds")
    return seconds


def _authorization(token_file: str, basic_file: str) -> str:
    """Return what says who asks, "" for nobody."""
    if token_file and basic_file:
        raise invalid("--basic-file", basic_file, "a token and a password do not go together")
    if basic_file:
        import binascii

        line = _first_line(basic_file)
        if not line.partition(b":")[1] or line.startswith(b":"):
            raise invalid("--basic-file", basic_file, "want USER:PASSWORD as its first line")
        return f"Basic {binascii.b2a_base64(line, newline=False).decode()}"
    if not token_file:
        return ""
    token = _first_line(token_file).decode("latin-1")
    if not token or not token.isascii() or not token.isprintable():
        raise invalid("--token-file", token_file, "what it holds is no token")
    return f"Bearer {token}"


def _first_line(path: str) -> bytes:
    try:
        data = console.read_small_file(path)
    except OSError as error:
        from isopod.world.errors import from_os_error

        raise from_os_error(error, "read", path) from error
    if data is None:
        from isopod.world.errors import NotFound

        raise NotFound("file", path)
    return data.partition(b"\n")[0].strip()
