"""Own sandboxes: what the agent says of each sandbox: whether it is up, how old its figures are.

These are the most lines of the agent's own, and few of them change from scrape to scrape. They are kept in rows of many sandboxes: one
whose figures are what they were is sent as it was, with what was packed of it. Not here: the agent's other families (`own`).
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from isopod.pulse.labels import block, kata_labels
from isopod.pulse.merge import Block, Shape
from isopod.pulse.model import Families, Fragment, Pod, Row
from isopod.pulse.store import Entry

ROW_SANDBOXES: Final = 128
"""How many stand in one row: a change of one of them makes the row anew."""
AGE: Final = "kata_pulse_sandbox_age_seconds"
"""The one that is always another."""
HELPS: Final = {
    AGE: b"How old the sandbox's figures are.",
    "kata_pulse_sandbox_bytes": b"Size of the shim's last answer.",
    "kata_pulse_sandbox_collection_seconds": b"How long the last request took.",
    "kata_pulse_sandbox_series": b"Series of the sandbox that are kept.",
    "kata_pulse_sandbox_up": b"Whether the last request to the sandbox's shim was answered.",
}
_SHAPES: Final = {name: Shape(((name, "gauge"),)) for name in HELPS}

Figures = Sequence[float | None]
"""One for each sandbox; None is no sample."""


class _Known(NamedTuple):
    """A row, and what it was made of."""

    labels: Sequence[str]
    figures: Figures
    row: Row


class OwnSandboxes:
    """Makes the families.

    Args:
        now: The store's clock.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._labels: dict[str, tuple[Pod | None, str]] = {}
        self._rows: dict[tuple[str, int], _Known] = {}

    def families(self, entries: Sequence[Entry]) -> Families:
        """Return the families of some sandboxes, made anew."""
        labels = self._labels_of(entries)
        made = {name: _fragment(name, labels, figures) for name, figures in _figures(entries, self._now()).items()}
        return {name: fragment for name, fragment in made.items() if fragment.n_series}

    def blocks(self, entries: Sequence[Entry]) -> list[Block]:
        """Return the same as blocks: ask for all sandboxes there are, since what is kept is what was shown last."""
        labels = self._labels_of(entries)
        before, self._rows = self._rows, {}
        made = []
        for name, figures in _figures(entries, self._now()).items():
            rows = []
            for begin in range(0, len(entries), ROW_SANDBOXES):
                some, theirs = labels[begin : begin + ROW_SANDBOXES], figures[begin : begin + ROW_SANDBOXES]
                known = before.get((name, begin))
                if known is None or known.figures != theirs or known.labels != some:
                    known = _Known(some, theirs, Row((_fragment(name, some, theirs),)))
                self._rows[name, begin] = known
                rows.append(known.row)
            if any(row.fragments[0].n_series for row in rows):
                made.append(Block(_SHAPES[name], rows, is_kept=name != AGE))
        return made

    def _labels_of(self, entries: Sequence[Entry]) -> list[str]:
        """Return sandboxes' labels as they stand between braces; made once for each pod one belongs to."""
        if len(self._labels) > 2 * len(entries) + 64:
            self._labels = {entry.id: self._labels[entry.id] for entry in entries if entry.id in self._labels}
        found = []
        for entry in entries:
            known = self._labels.get(entry.id)
            if known is None or known[0] is not entry.pod:
                known = self._labels[entry.id] = (entry.pod, block(kata_labels(entry.id, entry.pod)).decode())
            found.append(known[1])
        return found


def _figures(entries: Sequence[Entry], now_s: float) -> dict[str, Figures]:
    """Return the figures by family."""
    return {
        AGE: [None if each.collected_s is None else round(max(0.0, now_s - each.collected_s), 3) for each in entries],
        "kata_pulse_sandbox_bytes": [each.n_bytes for each in entries],
        "kata_pulse_sandbox_collection_seconds": [each.took_s for each in entries],
        "kata_pulse_sandbox_series": [each.n_series for each in entries],
        "kata_pulse_sandbox_up": [int(each.up) for each in entries],
    }


def _fragment(name: str, labels: Sequence[str], figures: Figures) -> Fragment:
    lines = [f"{name}{{{each}}} {figure}\n" for each, figure in zip(labels, figures, strict=True) if figure is not None]
    return Fragment("gauge", HELPS[name], "".join(lines).encode(), len(lines))
