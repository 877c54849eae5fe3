"""Logger: one line per event, with a constant name and facts as keys; JSON for programs, or text for people.

Not the stdlib's logging: no hierarchy, no handlers, no formatting of messages. The event says what happened ("container.started"),
keys say to what. Where the lines go is the caller's `write` (the host's standard error, a list in a test); `isopod.runtime.logsinks` has
sinks that never block and files that rotate, `isopod.runtime.logbridge` takes in what libraries say through `logging`.

Rules: a line is bounded (16 KiB; each text 2 KiB, a traceback 8 KiB), whatever is logged; the values of keys that name secrets
never leave; logging never raises: a line that cannot be written is counted in `n_dropped`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, Literal

import msgspec

from isopod.world.clock import Clock

Level = Literal["debug", "info", "warning", "error"]
LogForm = Literal["json", "text"]
ContextFields = Callable[[], Mapping[str, object]]
"""Returns what holds for whatever runs now: its scheduling group, its shard. Called for each line: quick, and never raises."""
LEVELS: Final[dict[Level, int]] = {"debug": 10, "info": 20, "warning": 30, "error": 40}
REDACTED: Final = "[redacted]"
SECRET_WORDS: Final = (
    "password",
    "passwd",
    "passphrase",
    "secret",
    "token",
    "credential",
    "authorization",
    "cookie",
    "private_key",
    "api_key",
    "apikey",
)
TEXT_CHARS_MAX: Final = 2 << 10
TRACEBACK_CHARS_MAX: Final = 8 << 10
LINE_BYTES_MAX: Final = 16 << 10
ELEMENTS_MAX: Final = 64
DEPTH_MAX: Final = 4
_QUOTED: Final = frozenset(' ="\\')
_AS_THEY_ARE: Final = frozenset((float, bool, type(None)))
_SECOND_NS: Final = 1_000_000_000
_TRACE: Final[ContextVar[str]] = ContextVar("isopod_log_trace", default="")
_COLOURS: Final[Mapping[Level, str]] = {"debug": "2", "info": "32", "warning": "33", "error": "31"}


@contextmanager
def tracing(trace_id: str) -> Iterator[None]:
    """Put `trace` into every line logged inside, in this task and the tasks it starts."""
    token = _TRACE.set(trace_id)
    try:
        yield
    finally:
        _TRACE.reset(token)


def current_trace() -> str:
    """Return the trace that lines are logged under, "" if there is none."""
    return _TRACE.get()


class _Sink:
    """What a logger and all bound to it share."""

    __slots__ = ("clock", "context", "encode", "n_dropped", "stamp", "threshold", "write")

    def __init__(self, write: Callable[[bytes], None], clock: Clock, threshold: int, encode: Callable[[dict[str, object]], bytes]) -> None:
        self.write = write
        self.clock = clock
        self.threshold = threshold
        self.encode = encode
        self.context: ContextFields | None = None
        self.n_dropped = 0
        self.stamp = (-1, "")

    def now_text(self) -> str:
        """Return the wall time as 2026-11-20T08:00:00.000001Z, formatting the seconds once each."""
        second, rest_ns = divmod(self.clock.now_ns(), _SECOND_NS)
        known, text = self.stamp
        if second != known:
            text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
            self.stamp = (second, text)  # one store: another thread sees both or neither
        return f"{text}.{rest_ns // 1000:06d}Z"


class Logger:
    """Writes events as lines.

    Args:
        write: Takes one whole line, the newline included; an OSError from it drops the line.
        clock: Where the lines' wall time comes from.
        level: The least level written.
        form: "json", or "text" for people.
        coloured: Whether text says the level in colour, for a terminal.
        context: Adds fields to each line.
    """

    __slots__ = ("_fields", "_sink")

    def __init__(
        self,
        write: Callable[[bytes], None],
        clock: Clock,
        *,
        level: Level = "info",
        form: LogForm = "json",
        coloured: bool = False,
        context: ContextFields | None = None,
    ) -> None:
        self._sink = _Sink(write, clock, LEVELS[level], _json_encoder() if form == "json" else _text_encoder(coloured=coloured))
        self._sink.context = context
        self._fields: dict[str, object] = {}

    def bind(self, **fields: object) -> "Logger":
        """Return a logger that adds `fields` to each line (and shares everything else)."""
        bound = Logger.__new__(Logger)
        bound._sink = self._sink
        bound._fields = {**self._fields, **{key: _clean(key, value, DEPTH_MAX) for key, value in fields.items()}}
        return bound

    @property
    def level(self) -> Level:
        """The least level written."""
        return next(level for level, threshold in LEVELS.items() if threshold == self._sink.threshold)

    def set_level(self, level: Level) -> None:
        """Write from this level on; it holds for this logger and all that share its sink."""
        self._sink.threshold = LEVELS[level]

    @property
    def n_dropped(self) -> int:
        """Lines that could not be written."""
        return self._sink.n_dropped

    def is_enabled(self, level: Level) -> bool:
        """Return whether lines of that level are written; for callers whose facts are dear."""
        return LEVELS[level] >= self._sink.threshold

    def debug(self, event: str, /, **facts: object) -> None:
        """Log what only someone who searches a fault wants."""
        if self._sink.threshold <= LEVELS["debug"]:
            self._log("debug", event, facts)

    def info(self, event: str, /, **facts: object) -> None:
        """Log a finished operation."""
        if self._sink.threshold <= LEVELS["info"]:
            self._log("info", event, facts)

    def warning(self, event: str, /, **facts: object) -> None:
        """Log what went wrong outside, and was dealt with."""
        if self._sink.threshold <= LEVELS["warning"]:
            self._log("warning", event, facts)

    def error(self, event: str, /, **facts: object) -> None:
        """Log what someone has to look at."""
        self._log("error", event, facts)

    def _log(self, level: Level, event: str, facts: Mapping[str, object]) -> None:
        sink = self._sink
        line: dict[str, object] = {"time": sink.now_text(), "level": level, "event": event}
        if sink.context is not None:
            line.update(sink.context())
        trace = _TRACE.get()
        if trace:
            line["trace"] = trace
        if self._fields:
            line.update(self._fields)
        for key, value in facts.items():
            # What most facts are is taken as it is; everything else is cut, cleaned and made JSON.
            if is_secret(key):
                line[key] = REDACTED
            elif (isinstance(value, str) and len(value) <= TEXT_CHARS_MAX and value.isascii()) or type(value) in _AS_THEY_ARE:
                line[key] = value
            else:
                line[key] = _clean(key, value, DEPTH_MAX)
        packed = sink.encode(line)
        try:
            sink.write(packed)
        except OSError:
            sink.n_dropped += 1


def _json_encoder() -> Callable[[dict[str, object]], bytes]:
    encode = msgspec.json.Encoder().encode

    def pack(line: dict[str, object]) -> bytes:
        packed = encode(line)
        if len(packed) >= LINE_BYTES_MAX:
            # Cutting JSON in the middle would lose the line; its beginning says where it came from.
            packed = encode({"time": line["time"], "level": line["level"], "event": line["event"], "too_long_bytes": len(packed)})
        return packed + b"\n"

    return pack


def _text_encoder(*, coloured: bool) -> Callable[[dict[str, object]], bytes]:
    encode = msgspec.json.Encoder().encode

    def pack(line: dict[str, object]) -> bytes:
        level = str(line["level"])
        shown = f"{level.upper():7}"
        if coloured:
            shown = f"\x1b[{_COLOURS.get(level, '0')}m{shown}\x1b[0m"  # type: ignore[call-overload]  # any text may be asked for
        words = [str(line["time"]), shown, str(line["event"])]
        words += [f"{key}={_word(value, encode)}" for key, value in line.items() if key not in ("time", "level", "event")]
        # A line break or an escape in a text would make one event look like two, or repaint the reader's terminal.
        packed = " ".join(words).encode("utf-8", "backslashreplace")
        if len(packed) >= LINE_BYTES_MAX:
            packed = packed[: LINE_BYTES_MAX - 16] + b"...(too long)"
        return packed + b"\n"

    return pack


def _word(value: object, encode: Callable[[object], bytes]) -> str:
    """Return a value for people: plain words as they are, anything else as JSON, without control characters."""
    if isinstance(value, str) and value and value.isprintable() and _QUOTED.isdisjoint(value):
        return value
    text = encode(value).decode()
    return text if text.isprintable() else text.encode("ascii", "backslashreplace").decode()


@lru_cache(maxsize=4096)
def is_secret(key: str) -> bool:
    """Return whether the value of a key of that name must not be logged."""
    lowered = key.lower().replace("-", "_")
    return any(word in lowered for word in SECRET_WORDS)


def _clean(key: str, value: object, depth: int) -> object:
    """Return a bounded, JSON-ready and secret-free form of a value."""
    if is_secret(key):
        return REDACTED
    if value is None or isinstance(value, bool | int | float):
        return value if not isinstance(value, int) or -(1 << 63) <= value < 1 << 64 else _cut(hex(value), TEXT_CHARS_MAX)
    if isinstance(value, str):
        return _cut(value, TRACEBACK_CHARS_MAX if key == "traceback" else TEXT_CHARS_MAX)
    if depth > 0:
        if isinstance(value, msgspec.Struct):
            value = {name: getattr(value, name) for name in value.__struct_fields__}
        if isinstance(value, Mapping):
            return {str(k)[:256]: _clean(str(k), v, depth - 1) for k, v in list(value.items())[:ELEMENTS_MAX]}
        if isinstance(value, list | tuple):
            return [_clean("", v, depth - 1) for v in value[:ELEMENTS_MAX]]
    return _cut(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value), TEXT_CHARS_MAX)


def _cut(text: str, n_chars_max: int) -> str:
    """Return text of bounded length (a traceback's end matters as much as its beginning) that UTF-8 can carry."""
    if len(text) > n_chars_max:
        half = n_chars_max // 2
        text = f"{text[:half]}...({len(text) - 2 * half} characters)...{text[-half:]}"
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
