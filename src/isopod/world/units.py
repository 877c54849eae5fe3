"""Sizes and times as people write them, parsed once at the edge.

SIZE: decimal digits with an optional suffix b, k, m, g or t (any case, 1024-based, an "i" or "b" may follow: "64m", "64MiB").
CPUS: a positive decimal number of cores ("0.5", "2").
DURATION: a number with an optional suffix ms, s, m, h ("10", "1.5s", "2m"); plain numbers are seconds.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from isopod.world.errors import InvalidArgument

_SIZE_FACTORS: Final = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DURATION_FACTORS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
SIZE_BYTES_MAX: Final = (1 << 63) - 1
CPUS_MAX: Final = 4096.0


def parse_size(text: str) -> int:
    """Return the number of bytes that `text` names.

    Raises:
        InvalidArgument: Not a size, negative, zero, or over 2^63-1.
    """
    lowered = text.strip().lower()
    digits = lowered.rstrip("bkmgti")
    suffix = lowered[len(digits) :]
    unit = suffix[:1] if suffix in ("", "b") or suffix[1:] in ("", "b", "ib") else None
    if unit is None or not digits.isascii() or not digits.isdigit() or unit not in _SIZE_FACTORS:
        raise _invalid("size", text, "want digits with an optional suffix k, m, g or t", "for example 64m")
    n_bytes = int(digits[:20]) * _SIZE_FACTORS[unit] if len(digits) <= 20 else SIZE_BYTES_MAX + 1
    if not 0 < n_bytes <= SIZE_BYTES_MAX:
        raise _invalid("size", text, "out of range")
    return n_bytes


def parse_cpus(text: str) -> float:
    """Return a number of cores.

    Raises:
        InvalidArgument: Not a number in (0, 4096].
    """
    try:
        cpus = float(text)
    except ValueError:
        raise _invalid("cpus", text, "want a number of cores", "for example 0.5") from None
    if not 0 < cpus <= CPUS_MAX:
        raise _invalid("cpus", text, f"want more than 0 and at most {CPUS_MAX:g}")
    return cpus


def parse_duration(text: str) -> float:
    """Return seconds.

    Raises:
        InvalidArgument: Not a non-negative duration.
    """
    lowered = text.strip().lower()
    digits = lowered.rstrip("msh")
    factor = _DURATION_FACTORS.get(lowered[len(digits) :] or "s")
    try:
        seconds = float(digits) * factor if factor is not None else -1.0
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e12:
        raise _invalid("duration", text, "want a number with an optional suffix ms, s, m or h")
    return seconds


def format_size(n_bytes: int) -> str:
    """Return bytes in the largest unit that leaves at least one whole, with one decimal: 1.5 MiB."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_age(seconds: float) -> str:
    """Return a duration in its one largest unit, for tables: "3 minutes"."""
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count != 1 else ''}"
    count = max(0, int(seconds))
    return f"{count} second{'s' if count != 1 else ''}"


def _invalid(what: str, text: str, why: str, hint: str = "") -> InvalidArgument:
    """Make the error; its module is imported only then, for the lean command line reads sizes, too."""
    from isopod.world.errors import InvalidArgument  # noqa: PLC0415

    return InvalidArgument(what, text, why, hint)
