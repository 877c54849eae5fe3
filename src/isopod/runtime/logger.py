"""Logger: one JSON line per event, with a constant name and facts as keys.

Not the stdlib's logging: no hierarchy, no handlers, no formatting of messages. The event says what happened ("container.started"),
keys say to what. Where the lines go is the caller's `write` (the host's standard error, a list in a test).

Rules: a line is bounded (16 KiB; each text 2 KiB, a traceback 8 KiB), whatever is logged; the values of keys that name secrets
never leave; logging never raises: a line that cannot be written is counted in `n_dropped`.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

from isopod.world.clock import Clock

Level = Literal["debug", "info", "warning", "error"]
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
_SECOND_NS: Final = 1_000_000_000


class _Sink:
    """What a logger and all bound to it share."""

    __slots__ = ("clock", "encoder", "n_dropped", "second", "second_text", "threshold", "write")

    def __init__(self, write: Callable[[bytes], None], clock: Clock, threshold: int) -> None:
        self.write = write
        self.clock = clock
        self.threshold = threshold
        self.encoder = msgspec.json.Encoder()
        self.n_dropped = 0
        self.second = -1
        self.second_text = ""

    def now_text(self) -> str:
        """Return the wall time as 2026-11-20T08:00:00.000001Z, formatting the seconds once each."""
        second, rest_ns = divmod(self.clock.now_ns(), _SECOND_NS)
        if second != self.second:
            self.second = second
            self.second_text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self.second_text}.{rest_ns // 1000:06d}Z"


class Logger:
    """Writes events as JSON lines.

    Args:
        write: Takes one whole line, the newline included; an OSError from it drops the line.
        clock: Where the lines' wall time comes from.
        level: The least level written.
    """

    __slots__ = ("_fields", "_sink")

    def __init__(self, write: Callable[[bytes], None], clock: Clock, *, level: Level = "info") -> None:
        self._sink = _Sink(write, clock, LEVELS[level])
        self._fields: dict[str, object] = {}

    def bind(self, **fields: object) -> "Logger":
        """Return a logger that adds `fields` to each line (and shares everything else)."""
        bound = Logger.__new__(Logger)
        bound._sink = self._sink
        bound._fields = {**self._fields, **{key: _clean(key, value, DEPTH_MAX) for key, value in fields.items()}}
        return bound

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
        line.update(self._fields)
        for key, value in facts.items():
            line[key] = _clean(key, value, DEPTH_MAX)
        packed = _encode(sink.encoder, line)
        try:
            sink.write(packed)
        except OSError:
            sink.n_dropped += 1


def _encode(encoder: msgspec.json.Encoder, line: dict[str, object]) -> bytes:
    packed = encoder.encode(line)
    if len(packed) >= LINE_BYTES_MAX:
        # Cutting JSON in the middle would lose the line; its beginning says where it came from.
        packed = encoder.encode({"time": line["time"], "level": line["level"], "event": line["event"], "too_long_bytes": len(packed)})
    return packed + b"\n"


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
