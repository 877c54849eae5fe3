"""Outcome: what one run showed, and how it is told; and the sum over many runs."""

from typing import Final, NamedTuple

from isopod.testing.coverage import Coverage
from isopod.testing.invariants import Violation
from isopod.testing.plan import FAULT_KINDS, Plan


class Counts(NamedTuple):
    """How the operations of the clients ended."""

    answered: int = 0
    unknown: int = 0
    refused: int = 0


class Outcome(NamedTuple):
    """One run. `virtual_s` is how long the cluster lived, `n_events` how many steps the loop made."""

    plan: Plan
    violations: tuple[Violation, ...]
    digest: str
    virtual_s: float
    n_events: int
    operations: Counts
    coverage: Coverage

    @property
    def failure(self) -> str:
        """The kind of the first violation, "" if there was none."""
        return self.violations[0].rule if self.violations else ""

    def replay(self) -> str:
        """Return the command that makes the same run again, if its plan was drawn from its seed."""
        plan = self.plan
        return f"isopod sim --seed {plan.seed} --scenario {plan.scenario} --nodes {plan.nodes} --until {plan.until_ms}ms"

    def facts(self) -> dict[str, object]:
        """Return what is printed as JSON."""
        plan = self.plan
        return {
            "scenario": plan.scenario,
            "seed": plan.seed,
            "nodes": plan.nodes,
            "steps": len(plan.steps),
            "digest": self.digest,
            "violations": [{"rule": each.rule, "at_s": each.at_ns / 1e9, "text": each.text} for each in self.violations],
            "virtual_s": round(self.virtual_s, 6),
            "events": self.n_events,
            "operations": self.operations._asdict(),
            "coverage": self.coverage.table(),
            "replay": self.replay(),
        }


def describe(outcome: Outcome) -> str:
    """Return a run in words."""
    plan, counts = outcome.plan, outcome.operations
    lines = [
        f"scenario {plan.scenario}, seed {plan.seed}, {plan.nodes} nodes, {len(plan.steps)} steps: {outcome.failure or 'no violation'}",
        f"  digest {outcome.digest}",
        f"  {outcome.virtual_s:.3f} virtual seconds, {outcome.n_events} events of the loop",
        f"  operations: {counts.answered} answered, {counts.unknown} of unknown outcome, {counts.refused} refused",
    ]
    lines += [f"VIOLATION {each}" for each in outcome.violations]
    if outcome.violations:
        lines.append(f"again: {outcome.replay()}")
    return "\n".join(lines) + "\n"


class Summary:
    """The sum over many runs."""

    def __init__(self) -> None:
        self.n_runs = 0
        self.coverage: Final = Coverage()
        self.virtual_s = 0.0
        self.failed: list[Outcome] = []
        """Runs that broke a promise."""
        self._operations = Counts()
        self._seen: dict[str, int] = dict.fromkeys(FAULT_KINDS, 0)
        self._without: dict[str, list[int]] = {kind: [] for kind in FAULT_KINDS}

    def add(self, outcome: Outcome) -> None:
        """Take a run in."""
        self.n_runs += 1
        self.virtual_s += outcome.virtual_s
        self.coverage.add(outcome.coverage)
        self._operations = Counts(*(mine + its for mine, its in zip(self._operations, outcome.operations, strict=True)))
        missing = outcome.coverage.missing_fault_classes()
        for kind in FAULT_KINDS:
            if kind not in missing:
                self._seen[kind] += 1
            elif len(self._without[kind]) < _NAMED_MAX:
                self._without[kind].append(outcome.plan.seed)
        if outcome.violations:
            self.failed.append(outcome)

    def describe(self, taken_s: float) -> str:
        """Return it in words.

        Args:
            taken_s: How long all of it took, in seconds.
        """
        counts = self._operations
        lines = [f"operations: {counts.answered} answered, {counts.unknown} of unknown outcome, {counts.refused} refused"]
        lines += _wrapped("fault classes, and in how many runs: ", ", ".join(f"{kind} {n}" for kind, n in self._seen.items()))
        if any(self._seen.values()):
            for kind, seeds in self._without.items():
                if seeds:
                    lines.append(f"  without {kind}: {self.n_runs - self._seen[kind]} runs, of seed {', '.join(map(str, seeds))}")
        for outcome in self.failed[:_NAMED_MAX]:
            lines.append(f"FAILED {outcome.failure}: {outcome.replay()}")
        speed = f"{self.virtual_s:.1f} virtual seconds in {taken_s:.1f} s ({self.virtual_s / max(1e-9, taken_s):.0f} times real time)"
        lines.append(f"{self.n_runs} runs, {len(self.failed)} with a violation; {speed}")
        return describe_coverage(self.coverage) + "\n".join(lines) + "\n"


_NAMED_MAX: Final = 10


def describe_coverage(coverage: Coverage) -> str:
    """Return what was exercised, one group a paragraph."""
    lines = ["coverage"]
    for group, names in coverage.table().items():
        words = ", ".join(f"{name} {n}" for name, n in names.items())
        lines += _wrapped(f"  {group}: ", words)
    missing = coverage.missing_fault_classes()
    if missing:
        lines.append(f"  without any fault of: {', '.join(missing)}")
    return "\n".join(lines) + "\n"


_COLUMNS: Final = 120


def _wrapped(head: str, words: str) -> list[str]:
    lines = [head]
    for word in words.split(", "):
        if len(lines[-1]) + len(word) > _COLUMNS:
            lines.append("    ")
        lines[-1] += word + ", "
    lines[-1] = lines[-1].removesuffix(", ")
    return [line.rstrip() for line in lines]
