"""Fabric: the network between the machines of a simulation, and everything that may go wrong on it.

Every ordered pair of machines has a `Link`; its bytes go over it in their order, its datagrams each for itself. Legal faults, each only
when a test asks for it, all drawn from a stream of the link's own:

- Latency: uniform between two bounds, for each segment. Bandwidth: `bytes_per_s`, shared by all that goes over the link.
- Loss: a segment of a connection arrives later, by one or more retransmission timeouts (200 ms, doubled each time), and what follows waits
  for it; a datagram is gone. Duplication: a datagram arrives twice; TCP hides it. Reordering: a datagram is overtaken; of a connection a
  segment is late, and what follows waits.
- A cut (`cut`, one way; `partition`, both ways between groups): what is on its way is held back, and goes on after `heal` when the next
  retransmission would have been: at most as much later as the cut had lasted, or two minutes. When only the way back is cut, the
  acknowledgements do not come: up to 64 KiB more arrive, then nothing. A sender that stays without acknowledgement for its user timeout
  (the option, or 15 minutes) gets ETIMEDOUT; the other end is not told. Datagrams are gone.
- Connecting over a cut, or to a machine without power, is tried again after 1, 3, 7, ... 63 s and fails with ETIMEDOUT after 127 s. An
  address that no machine has is EHOSTUNREACH after 3 s.
- A machine that lost power says nothing. Once it is back it answers what still comes for old connections with a reset; those that
  stay silent are noticed by keepalive if they have it.
- `reset` ends all connections between two machines with ECONNRESET at both ends, as a broken middlebox does.

A process that dies closes its connections as the kernel does (end of stream, or a reset if it left bytes unread); one that hangs leaves
them open, and its kernel goes on accepting and acknowledging. Loopback and Unix sockets never pass here: they are perfect.

Not modelled: congestion windows, fragmentation, the time that window updates take, ICMP.
Sources: RFC 9293, RFC 6298, tcp(7) (tcp_retries2, tcp_syn_retries, TCP_USER_TIMEOUT).
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from isopod.world.errors import InvalidArgument
from isopod.world.sim.loop import SimLoop
from isopod.world.sim.random import SimRandom

if TYPE_CHECKING:
    from isopod.world.sim.network import SimNetwork
    from isopod.world.sim.wires import Wire

BACKOFF_NS_MAX: Final = 120 * 1_000_000_000
"""The longest pause between two retransmissions."""


class LinkQuality(NamedTuple):
    """How a link behaves while it is not cut.

    Args:
        latency_s: Bounds of the time that a segment takes.
        loss: Chance that one is lost, 0 to 1 (below 1: a link that loses all is a cut).
        duplication: Chance that a datagram arrives twice.
        reordering: Chance that one is late by up to ten times the upper latency.
        bytes_per_s: Bandwidth; None for no limit.
    """

    latency_s: tuple[float, float] = (50e-6, 500e-6)
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    bytes_per_s: float | None = None


class FabricStatistics(NamedTuple):
    """What happened since the simulation began."""

    n_connections: int
    n_segments: int
    n_bytes: int
    n_retransmitted: int
    n_late: int
    n_held: int
    n_resets: int
    n_timed_out: int
    n_refused: int
    n_datagrams: int
    n_datagrams_lost: int
    n_datagrams_doubled: int
    n_datagrams_late: int
    n_cuts: int
    n_heals: int
    n_power_cuts: int


class Named(Protocol):
    """A machine, as tests have it."""

    @property
    def name(self) -> str:
        """Its name."""


class Counts:
    """The counters behind `FabricStatistics`."""

    __slots__ = FabricStatistics._fields

    def __init__(self) -> None:
        for name in FabricStatistics._fields:
            setattr(self, name, 0)

    n_connections: int
    n_segments: int
    n_bytes: int
    n_retransmitted: int
    n_late: int
    n_held: int
    n_resets: int
    n_timed_out: int
    n_refused: int
    n_datagrams: int
    n_datagrams_lost: int
    n_datagrams_doubled: int
    n_datagrams_late: int
    n_cuts: int
    n_heals: int
    n_power_cuts: int


class Station:
    """Where a machine is plugged in.

    Args:
        fabric: Into what.
        name: The machine's name.
        address: Its address.
    """

    def __init__(self, fabric: "Fabric", name: str, address: str) -> None:
        self.fabric = fabric
        self.name = name
        self.address = address
        self.is_up = True
        self.network: SimNetwork | None = None
        self.wires: dict[int, Wire] = {}
        """The outgoing direction of every connection that ends here, oldest first."""

    def set_up(self, *, up: bool) -> None:
        """Switch the machine's power on or off, as the network sees it."""
        if up != self.is_up:
            self.is_up = up
            self.fabric.counts.n_power_cuts += not up
            self.fabric.power_changed(self)


class Link:
    """One direction between two machines."""

    __slots__ = (
        "back",
        "blocked_at_ns",
        "chance",
        "counts",
        "free_at_ns",
        "is_blocked",
        "is_cut",
        "is_plain",
        "label",
        "low_ns",
        "quality",
        "source",
        "spread_ns",
        "stalled",
        "target",
    )

    def __init__(self, source: Station, target: Station, quality: LinkQuality, chance: random.Random) -> None:
        self.source = source
        self.target = target
        self.use(quality)
        self.chance = chance
        self.label = f"{source.name}>{target.name}"
        self.counts = source.fabric.counts
        self.back = self
        self.is_cut = False
        self.is_blocked = False
        """Whether nothing arrives: it is cut, or the target has no power."""
        self.blocked_at_ns = 0
        self.free_at_ns = 0
        self.stalled: dict[int, Wire] = {}

    def use(self, quality: LinkQuality) -> None:
        """Behave so from now on."""
        low, high = quality.latency_s
        self.quality = quality
        self.low_ns, self.spread_ns = int(low * 1e9), (high - low) * 1e9
        self.is_plain = not (quality.loss or quality.reordering or quality.bytes_per_s)

    def delay_ns(self, n_bytes: int, now_ns: int) -> int:
        """Return when a segment that is sent now would arrive, retransmissions apart. Bandwidth is used up."""
        quality, chance = self.quality, self.chance
        arrives_ns = now_ns + self.low_ns + int(self.spread_ns * chance.random())
        if self.is_plain:
            return arrives_ns
        if quality.bytes_per_s is not None:
            begins_ns = max(now_ns, self.free_at_ns)
            self.free_at_ns = begins_ns + int(n_bytes / quality.bytes_per_s * 1e9)
            arrives_ns += self.free_at_ns - now_ns
        if quality.reordering and chance.random() < quality.reordering:
            self.counts.n_late += 1
            arrives_ns += int(chance.uniform(0, 10 * quality.latency_s[1]) * 1e9)
        return arrives_ns

    def is_lost(self) -> bool:
        """Draw whether one more segment is lost."""
        return bool(self.quality.loss) and self.chance.random() < self.quality.loss

    def resumes_ns(self, now_ns: int) -> int:
        """Return when what was held back is sent again after a cut that ends now."""
        lasted_ns = min(now_ns - self.blocked_at_ns, BACKOFF_NS_MAX)
        return self.delay_ns(0, now_ns) + int(self.chance.random() * lasted_ns)


class Fabric:
    """The links, and the handles to break them. Machines are named by their names, or given as they are.

    Args:
        loop: The loop.
        random: Its chance.
        quality: Of a link until `set_link` says otherwise.
    """

    def __init__(self, loop: SimLoop, random: SimRandom, quality: LinkQuality) -> None:
        self.loop = loop
        self.counts = Counts()
        self.default_quality = _check(quality)
        self.stations: dict[str, Station] = {}
        self._random = random
        self._by_address: dict[str, Station] = {}
        self._links: dict[tuple[str, str], Link] = {}
        self._qualities: dict[tuple[str, str], LinkQuality] = {}
        self._cuts: dict[tuple[str, str], None] = {}
        self._groups: dict[str, int] | None = None
        self._n_wires = 0

    # -- faults ----------------------------------------------------------------------------------------------------------------------

    def set_link(self, a: str | Named, b: str | Named, quality: LinkQuality, *, one_way: bool = False) -> None:
        """Let a link behave differently from now on, in both directions or only from `a` to `b`.

        Raises:
            InvalidArgument: No such machine, or a quality that cannot be.
        """
        _check(quality)
        pairs = [(self._name(a), self._name(b))]
        pairs += [] if one_way else [(pairs[0][1], pairs[0][0])]
        for pair in pairs:
            self._qualities[pair] = quality
            if pair in self._links:
                self._links[pair].use(quality)

    def set_all(self, quality: LinkQuality) -> None:
        """Let every link behave so from now on."""
        self.default_quality = _check(quality)
        self._qualities.clear()
        for link in self._links.values():
            link.use(quality)

    def cut(self, a: str | Named, b: str | Named) -> None:
        """Let nothing arrive at `b` that `a` sends; the other direction goes on. Both directions are two calls."""
        self._cuts[self._name(a), self._name(b)] = None
        self._cuts_changed()
        self.counts.n_cuts += 1

    def isolate(self, a: str | Named) -> None:
        """Cut a machine off from all others, both ways."""
        name = self._name(a)
        for other in self.stations:
            if other != name:
                self._cuts[name, other] = self._cuts[other, name] = None
        self._cuts_changed()
        self.counts.n_cuts += 1

    def partition(self, groups: Sequence[Sequence[str | Named]]) -> None:
        """Cut every link between machines of different groups, both ways. Those that are named in none form one more group. A later
        call replaces the groups; single cuts stay."""
        found: dict[str, int] = {}
        for number, group in enumerate(groups):
            for each in group:
                name = self._name(each)
                if name in found:
                    raise InvalidArgument("partition", name, "is named twice")
                found[name] = number
        self._groups = found
        self._cuts_changed()
        self.counts.n_cuts += 1

    def heal(self, a: str | Named | None = None, b: str | Named | None = None) -> None:
        """End all cuts and partitions; of two machines, the single cuts between them. Qualities stay."""
        if a is None or b is None:
            self._cuts.clear()
            self._groups = None
        else:
            self._cuts.pop((self._name(a), self._name(b)), None)
            self._cuts.pop((self._name(b), self._name(a)), None)
        self._cuts_changed()
        self.counts.n_heals += 1

    def reset(self, a: str | Named, b: str | Named) -> int:
        """End all connections between two machines with ECONNRESET at both ends; returns how many there were."""
        first, second = self._station(a), self._station(b)
        wires = [wire for wire in first.wires.values() if wire.link.target is second]
        for wire in wires:
            wire.reset_both()
        self.counts.n_resets += len(wires)
        return len(wires)

    def is_cut(self, a: str | Named, b: str | Named) -> bool:
        """Return whether what `a` sends to `b` does not arrive."""
        return self._is_cut(self._name(a), self._name(b))

    def statistics(self) -> FabricStatistics:
        """Return what happened so far."""
        return FabricStatistics(*(getattr(self.counts, name) for name in FabricStatistics._fields))

    # -- for the machines ------------------------------------------------------------------------------------------------------------

    def add_station(self, name: str, address: str) -> Station:
        """Plug a machine in."""
        station = Station(self, name, address)
        self.stations[name] = self._by_address[address] = station
        return station

    def at(self, address: str) -> Station | None:
        """Return who has an address."""
        return self._by_address.get(address)

    def resolve(self, name: str) -> str | None:
        """Return the address of the machine of that name."""
        found = self.stations.get(name)
        return None if found is None else found.address

    def link(self, source: Station, target: Station) -> Link:
        """Return the link from one machine to another: the same object each time."""
        found = self._links.get((source.name, target.name))
        if found is None:
            found, back = self._make(source, target), self._make(target, source)
            found.back, back.back = back, found
        return found

    def next_wire(self) -> int:
        """Return the number of one more direction of a connection."""
        self._n_wires += 1
        return self._n_wires

    def power_changed(self, station: Station) -> None:
        """A machine was switched on or off."""
        for link in list(self._links.values()):
            if station in (link.source, link.target):
                if link.source is station and not station.is_up:
                    link.stalled.clear()  # nothing is sent again by who forgot it
                self._update(link)

    # -- inside ----------------------------------------------------------------------------------------------------------------------

    def _make(self, source: Station, target: Station) -> Link:
        pair = (source.name, target.name)
        link = Link(source, target, self._qualities.get(pair, self.default_quality), self._random.stream(f"{source.name}>{target.name}"))
        self._links[pair] = link
        self._update(link)
        return link

    def _is_cut(self, a: str, b: str) -> bool:
        groups = self._groups
        return (a, b) in self._cuts or (groups is not None and groups.get(a, -1) != groups.get(b, -1))

    def _cuts_changed(self) -> None:
        for link in list(self._links.values()):
            self._update(link)

    def _update(self, link: Link) -> None:
        link.is_cut = self._is_cut(link.source.name, link.target.name)
        blocked = link.is_cut or not link.target.is_up
        if blocked == link.is_blocked:
            return
        if not blocked:
            self._release(link)
        link.is_blocked = blocked
        if blocked:
            link.blocked_at_ns = self.loop.elapsed_ns
            for station in (link.source, link.target):
                for wire in list(station.wires.values()):
                    if wire.link is link or wire.link is link.back:
                        wire.on_trouble()

    def _release(self, link: Link) -> None:
        """Let go on what waited for this direction: bytes that go over it, and those whose acknowledgements do."""
        now_ns = self.loop.elapsed_ns
        for each in (link, link.back):
            waiting, each.stalled = each.stalled, {}
            for wire in waiting.values():
                wire.go_on(link.resumes_ns(now_ns))

    def _name(self, machine: str | Named) -> str:
        return self._station(machine).name

    def _station(self, machine: str | Named) -> Station:
        name = machine if isinstance(machine, str) else machine.name
        found = self.stations.get(name)
        if found is None:
            raise InvalidArgument("host", name, "there is no such machine in the simulation")
        return found


def _check(quality: LinkQuality) -> LinkQuality:
    low, high = quality.latency_s
    if not 0 <= low <= high:
        raise InvalidArgument("latency_s", quality.latency_s, "want two bounds, the lower first")
    if not 0 <= quality.loss < 1:
        raise InvalidArgument("loss", quality.loss, "must be at least 0 and below 1: a link that loses all is a cut")
    for name in ("duplication", "reordering"):
        if not 0 <= getattr(quality, name) <= 1:
            raise InvalidArgument(name, getattr(quality, name), "must be between 0 and 1")
    if quality.bytes_per_s is not None and quality.bytes_per_s <= 0:
        raise InvalidArgument("bytes_per_s", quality.bytes_per_s, "must be above 0, or None")
    return quality
