"""The harness of all benchmarks: interleaved runs, medians, one table, one JSON file, and a word on how busy the machine was.

A benchmark is a list of `Row`s; a row names a measurement and has one `Contender` for isopod and one for each peer. Rules: in every
round each contender is measured once, in an order that rotates; medians are compared; ratios are ours / theirs for times and theirs / ours
for rates, so that smaller is better everywhere. What could not be measured is printed with its reason, never left out silently.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

PROJECT: Final = Path(__file__).resolve().parent.parent
OURS: Final = "isopod"
COMMAND_DEADLINE_S: Final = 120.0
_RATES: Final = frozenset({"1/s"})

Sample = Callable[[], float]


class CommandFailed(Exception):
    """A measured or preparing command did not do what it should.

    Args:
        argv: The command line.
        status: Its exit code, negative for a signal.
        output: The end of what it said.
    """

    def __init__(self, argv: Sequence[str], status: int, output: str = "") -> None:
        super().__init__(f"{' '.join(argv)} ended with {status}: {output.strip()[-400:]}")


class Contender(NamedTuple):
    """Who is measured and how: `sample` takes one measurement in the row's unit and leaves the system as it found it."""

    name: str
    sample: Sample


class Row(NamedTuple):
    """One measurement. `unit` is "ms" for times or "1/s" for rates."""

    name: str
    unit: str
    contenders: Sequence[Contender]
    n_runs: int


class Result(msgspec.Struct, frozen=True):
    """One line of the JSON file: medians of ours and of one peer's. `ours` and `ratio` are None if isopod was not measured."""

    name: str
    unit: str
    ours: float | None
    peer: str
    theirs: float | None
    ratio: float | None
    runs: int


class Load(NamedTuple):
    """How busy the machine is: the load average of the last minute, and CPU ticks since boot."""

    average: float
    busy_ticks: int
    steal_ticks: int
    all_ticks: int


def spawn(argv: Sequence[str], environment: Mapping[str, str] | None = None, *, output: int | None = None) -> int:
    """Start a command with nothing on its standard input and its output thrown away, or sent to the file descriptor `output`."""
    with open(os.devnull, "r+b") as nothing:
        target = nothing.fileno() if output is None else output
        actions = [(os.POSIX_SPAWN_DUP2, nothing.fileno(), 0), (os.POSIX_SPAWN_DUP2, target, 1), (os.POSIX_SPAWN_DUP2, target, 2)]
        return os.posix_spawn(argv[0], list(argv), dict(environment or os.environ), file_actions=actions)


def wait(argv: Sequence[str], pid: int) -> None:
    """Wait for a command started by `spawn`; a failure is a CommandFailed."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0:
        raise CommandFailed(argv, status)


def timed_ms(argv: Sequence[str], environment: Mapping[str, str] | None = None, *, repeat: int = 1) -> float:
    """Return the milliseconds from starting a command to its end; of `repeat` in a row, those of one."""
    began = time.perf_counter()
    for _ in range(repeat):
        wait(argv, spawn(argv, environment))
    return (time.perf_counter() - began) * 1000 / repeat


def parallel_rate(commands: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None) -> float:
    """Start all commands at once and return how many ended in a second."""
    began = time.perf_counter()
    started = [(argv, spawn(argv, environment)) for argv in commands]
    statuses = [(argv, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for argv, pid in started]
    took_s = time.perf_counter() - began
    for argv, status in statuses:
        if status != 0:
            raise CommandFailed(argv, status)
    return len(commands) / took_s


def measure(rows: Iterable[Row]) -> list[Result]:
    """Measure rows one after the other, print the table while going, return what was found.

    Args:
        rows: May be a generator that prepares between its rows.
    """
    before = machine_load()
    print_header()
    results: list[Result] = []
    for row in rows:
        found = _measure_row(row)
        results.extend(found)
        for result in found:
            print_result(result)
    print(describe_load(before, machine_load()))
    return results


def write_results(target: str, results: Sequence[Result]) -> Path:
    """Write build/bench/TARGET.json and return its path."""
    path = PROJECT / "build" / "bench" / f"{target}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")
    return path


def machine_load() -> Load:
    """Return how busy the machine is now."""
    ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    return Load(os.getloadavg()[0], sum(ticks) - idle, ticks[7], sum(ticks))


def describe_load(before: Load, after: Load) -> str:
    """Return one line: cores, load averages, CPU in use and stolen between two looks."""
    span = max(1, after.all_ticks - before.all_ticks)
    busy, steal = (after.busy_ticks - before.busy_ticks) / span, (after.steal_ticks - before.steal_ticks) / span
    return (
        f"machine: {os.cpu_count()} cores, load {before.average:.2f} before and {after.average:.2f} after, "
        f"CPU {busy:.0%} busy (this benchmark included), {steal:.1%} stolen"
    )


def print_header() -> None:
    """Print the head of the table."""
    print(f"{'what':<44}{'unit':>5}{'isopod':>10}  {'peer':<26}{'theirs':>10}{'ratio':>8}{'runs':>6}")


def print_result(result: Result) -> None:
    """Print one line of the table."""
    print(
        f"{result.name:<44}{result.unit:>5}{_number(result.ours):>10}  {result.peer:<26}{_number(result.theirs):>10}"
        f"{_number(result.ratio, 2):>8}{result.runs:>6}",
        flush=True,
    )


def _measure_row(row: Row) -> list[Result]:
    samples: dict[str, list[float]] = {contender.name: [] for contender in row.contenders}
    alive = list(row.contenders)
    for number in range(row.n_runs):
        turn = number % max(1, len(alive))
        for contender in alive[turn:] + alive[:turn]:
            try:
                samples[contender.name].append(contender.sample())
            except (CommandFailed, OSError) as error:
                print(f"{row.name}: {contender.name} not measured because {error}", file=sys.stderr)
                samples[contender.name].clear()
                alive = [other for other in alive if other is not contender]
    medians = {name: statistics.median(values) for name, values in samples.items() if values}
    ours = medians.get(OURS)
    peers = [contender.name for contender in row.contenders if contender.name != OURS]
    return [_result(row, ours, name, medians.get(name)) for name in peers or [""]]


def _result(row: Row, ours: float | None, peer: str, theirs: float | None) -> Result:
    ratio = None
    if ours and theirs:
        ratio = theirs / ours if row.unit in _RATES else ours / theirs
    return Result(row.name, row.unit, _rounded(ours), peer, _rounded(theirs), _rounded(ratio, 3), row.n_runs)


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
