"""Rates: what each sandbox uses a second, from its last two rounds: the rows of /top.

A counter that went back (the guest was started anew) gives no rate for that round, and never a negative one. What is not known is None.
Not here: where figures come from (`figures`), the page itself (`pages`), the terminal view (isopod.cli.top).
"""

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

from isopod.pulse.figures import Figures
from isopod.pulse.model import Pod

SortKey = Literal["cpu", "memory", "network", "disk", "name"]

SORT_KEYS: Final[tuple[SortKey, ...]] = ("cpu", "memory", "network", "disk", "name")
SANDBOXES_MAX: Final = 40_000


class Sample(NamedTuple):
    """What a sandbox had used, or uses, in one round; None where it does not say."""

    cpu_s: float | None
    memory_bytes: float | None
    received_bytes: float | None
    sent_bytes: float | None
    read_bytes: float | None
    written_bytes: float | None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A sandbox in /top. `name` and `namespace` are its pod's, "" while nobody has said."""

    id: str
    name: str
    namespace: str
    cpu_cores: float | None
    """CPU seconds a second."""
    memory_bytes: int | None
    received_bytes_per_s: float | None
    sent_bytes_per_s: float | None
    read_bytes_per_s: float | None
    written_bytes_per_s: float | None
    age_s: float | None
    """Of the figures; None before the first."""
    up: bool
    """Whether it answered the last time it was asked."""


class Shown(Protocol):
    """What is asked of a sandbox's entry in the store."""

    @property
    def id(self) -> str:
        """Its id."""

    @property
    def pod(self) -> Pod | None:
        """Whose it is."""

    @property
    def up(self) -> bool:
        """Whether it answered the last time."""

    def age_s(self, now: float, /) -> float | None:
        """Return how old its figures are."""


class _Rounds(NamedTuple):
    at_s: float
    last: Sample
    before_s: float
    before: Sample | None


class Rates:
    """The last two rounds of each sandbox.

    Args:
        sandboxes_max: Over that, the one of which nothing came for longest makes room.
    """

    def __init__(self, sandboxes_max: int = SANDBOXES_MAX) -> None:
        self._sandboxes_max = sandboxes_max
        self._rounds: dict[str, _Rounds] = {}

    def __len__(self) -> int:
        return len(self._rounds)

    def put(self, identifier: str, at_s: float, sample: Sample) -> None:
        """Take a round in.

        Args:
            identifier: The sandbox.
            at_s: When it was asked, by a clock that never goes back.
            sample: What it said.
        """
        known = self._rounds.pop(identifier, None)  # popped, so that the dictionary is in the order of rounds
        if known is None and len(self._rounds) >= self._sandboxes_max:
            del self._rounds[next(iter(self._rounds))]
        if known is None:
            self._rounds[identifier] = _Rounds(at_s, sample, at_s, None)
        elif at_s > known.at_s:
            self._rounds[identifier] = _Rounds(at_s, sample, known.at_s, known.last)
        else:
            self._rounds[identifier] = known._replace(last=sample)

    def again(self, identifier: str, at_s: float) -> None:
        """Take in a round that said what the one before said."""
        known = self._rounds.get(identifier)
        if known is not None:
            self.put(identifier, at_s, known.last)

    def remove(self, identifier: str) -> None:
        """Let go of a sandbox that is gone."""
        self._rounds.pop(identifier, None)

    def rows(self, entries: Iterable[Shown], now_s: float) -> tuple[Row, ...]:
        """Return a row for each entry, in their order.

        Args:
            entries: The store's.
            now_s: By the clock of the rounds.
        """
        return tuple(self._row(entry, now_s) for entry in entries)

    def _row(self, entry: Shown, now_s: float) -> Row:
        rounds = self._rounds.get(entry.id)
        speeds: Iterable[float | None] = (None,) * len(Sample._fields)
        memory = None
        if rounds is not None:
            memory = rounds.last.memory_bytes
            if rounds.before is not None:
                passed_s = rounds.at_s - rounds.before_s
                speeds = (_rate(after, before, passed_s) for after, before in zip(rounds.last, rounds.before, strict=True))
        cpu, _, received, sent, read, written = speeds
        age_s = entry.age_s(now_s)
        return Row(
            id=entry.id,
            name=entry.pod.name if entry.pod is not None else "",
            namespace=entry.pod.namespace if entry.pod is not None else "",
            cpu_cores=cpu,
            memory_bytes=None if memory is None else int(memory),
            received_bytes_per_s=received,
            sent_bytes_per_s=sent,
            read_bytes_per_s=read,
            written_bytes_per_s=written,
            age_s=None if age_s is None else round(age_s, 3),
            up=entry.up,
        )


def sample_of(figures: Figures) -> Sample:
    """Return what rates are made of. Memory is the working set where that is known, else all that is in use."""
    working_set = _sum(figures, "container_memory_working_set_bytes")
    return Sample(
        cpu_s=_sum(figures, "container_cpu_usage_seconds_total"),
        memory_bytes=_sum(figures, "container_memory_usage_bytes") if working_set is None else working_set,
        received_bytes=_sum(figures, "container_network_receive_bytes_total"),
        sent_bytes=_sum(figures, "container_network_transmit_bytes_total"),
        read_bytes=_sum(figures, "container_fs_reads_bytes_total"),
        written_bytes=_sum(figures, "container_fs_writes_bytes_total"),
    )


def ordered(rows: Iterable[Row], key: SortKey) -> list[Row]:
    """Return rows with the greatest first (names: the first first); what is not known comes last."""
    if key == "name":
        return sorted(rows, key=lambda row: (row.namespace, row.name, row.id))
    return sorted(rows, key=lambda row: (-_weight(row, key), row.namespace, row.name, row.id))


def as_json(rows: Iterable[Row]) -> bytes:
    """Return the JSON of /top: {"sandboxes": [...]}."""
    return msgspec.json.encode({"sandboxes": list(rows)})


def _sum(figures: Figures, name: str) -> float | None:
    samples = figures.get(name)
    return sum(value for _, value in samples) if samples else None


def _rate(after: float | None, before: float | None, passed_s: float) -> float | None:
    return None if after is None or before is None or after < before else round((after - before) / passed_s, 6)


def _weight(row: Row, key: SortKey) -> float:
    parts: tuple[float | None, ...]
    if key == "cpu":
        parts = (row.cpu_cores,)
    elif key == "memory":
        parts = (row.memory_bytes,)
    elif key == "network":
        parts = (row.received_bytes_per_s, row.sent_bytes_per_s)
    else:
        parts = (row.read_bytes_per_s, row.written_bytes_per_s)
    known = [part for part in parts if part is not None]
    return sum(known) if known else -1.0
