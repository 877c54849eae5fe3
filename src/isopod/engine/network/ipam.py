"""Subnet: which IPv4 addresses of one network are taken. Pure, no I/O; `networks.Networks` is its only owner.

Rules: the network and broadcast addresses are never handed out, except on a /31, where both are hosts (RFC 3021). The first usable
address is the gateway's and counts as taken from the start, so a /24 has 254 addresses, 253 of them for containers. Addresses are given
in rising order from a cursor that wraps around, so one that was released is the last to be given again: neighbours' ARP caches have
forgotten it by then.

The taken set is one integer, bit i for the i-th usable address: the search is a shift and a lowest-set-bit, without a loop. A bitmap of
bytes padded to a multiple of eight, as the reference kept it, grew capacity by a reload; here the capacity is a number of its own.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final

from isopod.world.errors import AlreadyExists, Exhausted, InvalidArgument

PREFIX_LENGTH_MIN: Final = 8
PREFIX_LENGTH_MAX: Final = 31
CHOICE_FIRST: Final = int(ipaddress.IPv4Address("10.88.0.0"))
CHOICE_LAST: Final = int(ipaddress.IPv4Address("10.127.255.255"))
"""Where isopod looks for a free range itself: 10.88.0.0 to 10.127.255.255."""


class Subnet:
    """The addresses of one network.

    Args:
        cidr: "10.88.0.0/24"; see `parse_subnet`.
        taken: Addresses in use besides the gateway.

    Raises:
        InvalidArgument: `cidr` is no usable range, or an address of `taken` is not one of its host addresses.
        AlreadyExists: `taken` names an address twice, or the gateway.
    """

    def __init__(self, cidr: str, taken: Iterable[str] = ()) -> None:
        network = parse_subnet(cidr)
        skipped = 0 if network.prefixlen == PREFIX_LENGTH_MAX else 1
        self.cidr: Final = str(network)
        self.prefix_length: Final = network.prefixlen
        self.capacity: Final = network.num_addresses - 2 * skipped
        """Usable addresses, the gateway's included."""
        self._first: Final = int(network.network_address) + skipped
        self.gateway: Final = str(ipaddress.IPv4Address(self._first))
        self._taken = 1
        self._n_taken = 1
        self._cursor = 1
        for address in taken:
            self.take(address)

    @property
    def n_taken(self) -> int:
        """Addresses in use, the gateway's included."""
        return self._n_taken

    def taken(self) -> list[str]:
        """Return the addresses in use besides the gateway's, rising: what `Subnet(cidr, taken)` wants back."""
        bits, found = self._taken >> 1, []
        index = 0
        while bits:
            step = _lowest_bit(bits)
            index += step + 1
            found.append(self._address(index))
            bits >>= step + 1
        return found

    def allocate(self) -> str:
        """Return a free address and mark it taken.

        Raises:
            Exhausted: None is free.
        """
        if self._n_taken >= self.capacity:
            limit = f"all {self.capacity} of {self.cidr} are in use"
            raise Exhausted("addresses", limit, "remove containers of this network, or create a network with a larger subnet")
        index = self._free_from(self._cursor)
        if index >= self.capacity:
            index = self._free_from(0)
        self._mark(index)
        return self._address(index)

    def take(self, address: str) -> None:
        """Mark one given address taken (a container that still runs has it).

        Raises:
            InvalidArgument: It is not a host address of this range.
            AlreadyExists: It is taken.
        """
        index = self._index(address)
        if self._taken >> index & 1:
            raise AlreadyExists("address", address, f"it is in use in {self.cidr}")
        self._mark(index)

    def release(self, address: str) -> None:
        """Make an address free again.

        Raises:
            InvalidArgument: It is not a host address of this range, is the gateway's, or is not taken.
        """
        index = self._index(address)
        if index == 0:
            raise InvalidArgument("address", address, f"it is the gateway of {self.cidr}")
        if not self._taken >> index & 1:
            raise InvalidArgument("address", address, f"it is not in use in {self.cidr}")
        self._taken ^= 1 << index
        self._n_taken -= 1

    def _mark(self, index: int) -> None:
        self._taken |= 1 << index
        self._n_taken += 1
        self._cursor = (index + 1) % self.capacity

    def _free_from(self, index: int) -> int:
        return index + _lowest_bit(~(self._taken >> index))

    def _address(self, index: int) -> str:
        return str(ipaddress.IPv4Address(self._first + index))

    def _index(self, address: str) -> int:
        try:
            index = int(ipaddress.IPv4Address(address)) - self._first
        except ValueError:
            raise InvalidArgument("address", address, "not an IPv4 address") from None
        if not 0 <= index < self.capacity:
            raise InvalidArgument("address", address, f"not a host address of {self.cidr}")
        return index


def parse_subnet(cidr: str) -> ipaddress.IPv4Network:
    """Return the range that `cidr` names.

    Raises:
        InvalidArgument: Not A.B.C.D/N, bits right of the prefix, N outside 8-31, or not for hosts (loopback, multicast, ...).
    """
    hint = "for example 10.90.0.0/24"
    address, slash, length = cidr.partition("/")
    if not slash or not (length.isascii() and length.isdigit()):
        raise InvalidArgument("subnet", cidr, "want A.B.C.D/N", hint)
    if not PREFIX_LENGTH_MIN <= int(length[:4]) <= PREFIX_LENGTH_MAX:
        raise InvalidArgument("subnet", cidr, f"the prefix length must be {PREFIX_LENGTH_MIN} to {PREFIX_LENGTH_MAX}", hint)
    try:
        network = ipaddress.IPv4Network(cidr, strict=False)
    except ValueError:
        raise InvalidArgument("subnet", cidr, "want A.B.C.D/N", hint) from None
    if str(network.network_address) != address:
        raise InvalidArgument("subnet", cidr, "the address has bits set right of the prefix", f"did you mean {network}?")
    if any(network.overlaps(block) for block in _not_for_hosts()):
        raise InvalidArgument("subnet", cidr, "no host may have an address in it", hint)
    return network


def find_overlap(cidr: str, others: Iterable[str]) -> str | None:
    """Return the first of `others` that shares an address with `cidr`, or None. IPv4 prefixes of any length may be given."""
    network = ipaddress.IPv4Network(cidr)
    for other in others:
        if network.overlaps(ipaddress.IPv4Network(other)):
            return other
    return None


def choose_subnet(avoid: Sequence[str], *, prefix_length: int = 24) -> str:
    """Return the lowest range of 10.88.0.0-10.127.255.255 that overlaps none of `avoid`.

    Raises:
        Exhausted: Every one overlaps, or the length fits none.
    """
    size = 1 << (32 - prefix_length)
    blocks = [ipaddress.IPv4Network(other) for other in avoid]
    start = -(-CHOICE_FIRST // size) * size
    while start + size - 1 <= CHOICE_LAST:
        end = start + size - 1
        last = max(
            (int(b.broadcast_address) for b in blocks if int(b.network_address) <= end and int(b.broadcast_address) >= start), default=-1
        )
        if last < 0:
            return f"{ipaddress.IPv4Address(start)}/{prefix_length}"
        start = (last // size + 1) * size
    raise Exhausted("subnets", f"no free /{prefix_length} in 10.88.0.0-10.127.255.255", "name one yourself with --subnet")


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _not_for_hosts() -> tuple[ipaddress.IPv4Network, ...]:
    return (
        ipaddress.IPv4Network("0.0.0.0/8"),
        ipaddress.IPv4Network("127.0.0.0/8"),
        ipaddress.IPv4Network("169.254.0.0/16"),
        ipaddress.IPv4Network("224.0.0.0/3"),
    )
