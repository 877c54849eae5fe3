"""Signals by name, as images write them ("SIGQUIT", "QUIT", "3", "SIGRTMIN+3").

The container's numbers, not this interpreter's: Linux's generic ones, which all machines isopod runs on share. Source: signal(7).
"""

from typing import Final

_NAMES: Final = (
    *("HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM", "STKFLT"),
    *("CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS"),
)
"""From 1 up."""
_ALIASES: Final = {"IOT": "ABRT", "POLL": "IO", "CLD": "CHLD"}
SIGTERM: Final = 15
REAL_TIME_MIN: Final = 34
"""As the C library gives them: the kernel's first two are its own."""
REAL_TIME_MAX: Final = 64


def parse_signal(text: str) -> int | None:
    """Return a signal's number; None if there is no such signal."""
    if _is_number(text):
        return int(text) if 1 <= int(text) <= REAL_TIME_MAX else None
    name = text.upper().removeprefix("SIG")
    if name.startswith("RTMIN"):
        return _real_time(REAL_TIME_MIN, name.removeprefix("RTMIN"), "+")
    if name.startswith("RTMAX"):
        return _real_time(REAL_TIME_MAX, name.removeprefix("RTMAX"), "-")
    name = _ALIASES.get(name, name)
    return _NAMES.index(name) + 1 if name in _NAMES else None


def signal_name(number: int) -> str:
    """Return "SIGTERM"; for a real-time signal "SIGRTMIN+3"; for others the number."""
    if 1 <= number <= len(_NAMES):
        return f"SIG{_NAMES[number - 1]}"
    return f"SIGRTMIN+{number - REAL_TIME_MIN}" if REAL_TIME_MIN <= number <= REAL_TIME_MAX else str(number)


def _real_time(base: int, offset: str, sign: str) -> int | None:
    if offset and not (offset[0] == sign and _is_number(offset[1:])):
        return None
    number = base + int(offset or "0")
    return number if REAL_TIME_MIN <= number <= REAL_TIME_MAX else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 3
