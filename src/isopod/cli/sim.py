"""`isopod sim`: whole clusters in the simulation, from seeds, with every promise checked. Needs no node and no root.

The report goes to standard output and what concerns a person who waits to standard error. With --shrink the only thing on standard output
is the scenario file; with --format json it is an object a run, and the summary goes to standard error. The exit code is 1 if any run broke
a promise.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, Protocol

from isopod.cli.say import invalid, note, say
from isopod.testing.outcome import Summary, describe
from isopod.testing.plan import NODES_MAX, decode_plan, encode_plan
from isopod.testing.scenarios import DEFAULT_SCENARIO, DEFAULT_SEED, SCENARIOS, make_plan, scenario
from isopod.testing.shrink import RUNS_MAX, shrink
from isopod.testing.simulation import run_plan
from isopod.world.errors import NotFound
from isopod.world.host import console
from isopod.world.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from isopod.cli.parse import Parsed
    from isopod.testing.outcome import Outcome
    from isopod.testing.plan import Plan


class Run(Protocol):
    """What carries out a plan: `isopod.testing.simulation.run_plan`."""

    def __call__(self, plan: Plan, *, trace: Callable[[str], None] | None = None) -> Outcome:
        """See there."""


EXIT_VIOLATION: Final = 1
SEED_VARIABLES: Final = ("ISOPOD_SIM_SEED", "MADSIM_TEST_SEED")
"""Where a seed is looked for if no option says one; the second is the reference's name."""
SEED_MAX: Final = (1 << 64) - 1
_RUNS_MAX: Final = 1_000_000
_PROGRESS_S: Final = 10.0
_KEPT: Final = "every promise kept"
_UNTIL_S_MAX: Final = 86_400.0


def main(parsed: Parsed, run: Run = run_plan) -> int:
    """Carry out the command.

    Args:
        parsed: The command line.
        run: Carries out a plan.
    """
    if parsed.flag("list"):
        say("".join(f"{each.name:<12}{each.about}\n" for each in SCENARIOS))
        return 0
    plans = _plans(parsed)
    if parsed.value("trace"):
        return _traced(parsed, next(plans), run)
    return _many(parsed, plans, run)


def _many(parsed: Parsed, plans: Iterator[Plan], run: Run) -> int:
    only_digest, as_json, shrinks = parsed.flag("digest"), parsed.value("format") == "json", parsed.flag("shrink")
    summary, began_s = Summary(), console.monotonic_s()
    progress = _Progress(began_s)
    for plan in plans:
        outcome = run(plan)
        summary.add(outcome)
        progress.tell(summary, outcome)
        if only_digest:
            say(outcome.digest + "\n")
        elif as_json:
            say(json.dumps(outcome.facts()) + "\n")
        elif not shrinks:
            say(describe(outcome))
        if outcome.violations and shrinks:
            _shrink(outcome, run)
            break
    progress.end()
    if as_json:
        note(summary.describe(console.monotonic_s() - began_s))
    elif not only_digest and not shrinks:
        say(summary.describe(console.monotonic_s() - began_s))
    return EXIT_VIOLATION if summary.failed else 0


def _traced(parsed: Parsed, plan: Plan, run: Run) -> int:
    """Run one plan and write what happened to a file, or to standard output for "-"."""
    path = parsed.value("trace")
    fd = console.STDOUT if path == "-" else console.open_to_write(console.absolute(path))
    try:
        outcome = run(plan, trace=lambda line: console.write_all(fd, line.encode("utf-8", "replace") + b"\n"))
    finally:
        if fd != console.STDOUT:
            console.close(fd)
    if parsed.flag("digest"):
        say(outcome.digest + "\n")
    else:
        say(describe(outcome))
    return EXIT_VIOLATION if outcome.violations else 0


def _shrink(outcome: Outcome, run: Run) -> None:
    """Print the smallest plan that fails alike."""
    note(describe(outcome))
    note(f"shrinking (at most {RUNS_MAX} runs) ...\n")
    shrunk = shrink(outcome.plan, lambda plan: run(plan).failure)
    note(f"{len(shrunk.plan.steps)} of {len(outcome.plan.steps)} steps are left after {shrunk.n_runs} runs\n")
    import msgspec

    say(encode_plan(msgspec.structs.replace(shrunk.plan, found=outcome.failure)).decode())


class _Progress:
    """Says on standard error how far it is: one line that changes where a person looks on, else a line now and then and for each failure.

    Args:
        began_s: When it began, of the console's clock.
    """

    def __init__(self, began_s: float) -> None:
        self._began_s = self._told_s = began_s
        self._is_seen = console.is_terminal(console.STDERR)

    def tell(self, summary: Summary, outcome: Outcome) -> None:
        """A run has ended."""
        now_s = console.monotonic_s()
        seed, failure = outcome.plan.seed, outcome.failure
        text = f"{summary.n_runs} runs in {now_s - self._began_s:.0f} s, {len(summary.failed)} failed; seed {seed}: {failure or _KEPT}"
        if self._is_seen:
            note(f"\r{text}\x1b[K" + ("\n" if failure else ""))
        elif failure or now_s - self._told_s >= _PROGRESS_S:
            self._told_s = now_s
            note(text + "\n")

    def end(self) -> None:
        """No line is to be written over any more."""
        if self._is_seen:
            note("\n")


def _plans(parsed: Parsed) -> Iterator[Plan]:
    """Yield what to run."""
    if parsed.words:
        path = console.absolute(parsed.words[0])
        data = console.read_small_file(path)
        if data is None:
            raise NotFound("scenario file", path, "--shrink prints one; a scenario that has a name: --scenario NAME, and --list lists them")
        yield decode_plan(data, path)
        return
    names = [each.name for each in SCENARIOS] if parsed.value("scenario") == "all" else [parsed.value("scenario", DEFAULT_SCENARIO)]
    nodes = _number("--nodes", parsed.value("nodes"), 1, NODES_MAX) if parsed.value("nodes") else None
    run_s = parse_duration(parsed.value("until")) if parsed.value("until") else None
    if run_s is not None and run_s > _UNTIL_S_MAX:
        raise invalid("--until", parsed.value("until"), "want a day at most")
    first, last = _seeds(parsed)
    sources = [scenario(name) for name in names]
    for seed in range(first, last + 1):
        for source in sources:
            yield make_plan(source, seed, nodes=nodes, run_s=run_s)


def _seeds(parsed: Parsed) -> tuple[int, int]:
    """Return the first and the last seed."""
    if parsed.value("seeds"):
        first, dots, last = parsed.value("seeds").partition("..")
        if not dots:
            raise invalid("--seeds", parsed.value("seeds"), "want FIRST..LAST", "for example 1..100")
        low, high = _number("--seeds", first, 0, SEED_MAX), _number("--seeds", last, 0, SEED_MAX)
        if high < low or high - low >= _RUNS_MAX:
            raise invalid("--seeds", parsed.value("seeds"), f"want at least one and at most {_RUNS_MAX} seeds")
        return low, high
    name, text = "--seed", parsed.value("seed")
    for variable in SEED_VARIABLES:
        if not text:
            name, text = variable, console.environment(variable) or ""
    seed = _number(name, text, 0, SEED_MAX) if text else DEFAULT_SEED
    n_runs = _number("--runs", parsed.value("runs"), 1, _RUNS_MAX) if parsed.value("runs") else 1
    return seed, seed + n_runs - 1


def _number(what: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and low <= int(text) <= high):
        raise invalid(what, text, f"want a number from {low} to {high}")
    return int(text)
