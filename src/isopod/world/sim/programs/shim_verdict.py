"""How a simulated microVM ended: one judgement over all that its shim knows, in the words of the real one."""

from typing import Any, Final, NamedTuple

KILLED: Final = 137
LOST: Final = 255


class Cause(NamedTuple):
    """Why the shim wanted the machine to end."""

    kind: str
    why: str


class End(NamedTuple):
    """end.json."""

    code: int | None
    why: str
    kind: str
    out_of_memory: bool


def judge(status: int, cause: Cause | None, *, exit_facts: dict[str, Any] | None, panic: str, has_agent: bool, main: str, told: str) -> End:
    """Judge how a machine ended.

    Args:
        status: Of the monitor; negative for a signal.
        cause: Why the shim wanted it to end, if it did.
        exit_facts: How the main command ended, if it did.
        panic: The kernel's last words.
        has_agent: Whether there is one; without it the monitor's status is the command's.
        main: "none", "asked", "running" or "exited".
        told: The last line that the monitor said.
    """
    kind, why = _kind_of(status, exit_facts, panic, told)
    if cause is not None and (cause.kind in ("stopped", "vmm_killed") or (cause.why and not panic)):
        kind, why = cause
    code = exit_facts["code"] if exit_facts is not None else _code_of(status, cause, has_agent=has_agent, main=main, panic=panic)
    return End(code, why, kind, out_of_memory=bool(exit_facts and exit_facts.get("out_of_memory")))


def _kind_of(status: int, exit_facts: dict[str, Any] | None, panic: str, told: str) -> tuple[str, str]:
    if exit_facts is not None:
        return "command", f"the command ended with {exit_facts['code']}"
    if panic:
        return "panic", f"the guest's kernel panicked: {panic}"
    words = f": {told}" if told else ""
    if status < 0:
        return "vmm_killed", f"the machine's process was killed by signal {-status}{words}"
    return ("poweroff", "the machine powered off") if status == 0 else ("vmm_failed", f"the machine's process ended with {status}{words}")


def _code_of(status: int, cause: Cause | None, *, has_agent: bool, main: str, panic: str) -> int | None:
    if status < 0:
        return 128 - status
    if not has_agent:
        return status
    if cause is not None and cause.kind == "stopped" and main == "running":
        return KILLED
    return 0 if status == 0 and main == "none" and not panic else None
