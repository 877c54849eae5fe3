"""Subnet: capacity exact, nothing handed out twice, nothing lost, reloads included (row R13)."""

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from isopod.engine.network.ipam import CHOICE_FIRST, CHOICE_LAST, Subnet, choose_subnet, find_overlap, parse_subnet
from isopod.world.errors import AlreadyExists, Exhausted, InvalidArgument


def drain(subnet: Subnet) -> list[str]:
    found = []
    while subnet.n_taken < subnet.capacity:
        found.append(subnet.allocate())
    return found


@pytest.mark.row("R13")
def test_a_24_has_254_distinct_addresses_then_an_error() -> None:
    subnet = Subnet("10.88.0.0/24")
    addresses = [subnet.gateway, *drain(subnet)]
    assert addresses == [f"10.88.0.{host}" for host in range(1, 255)]
    with pytest.raises(Exhausted, match="all 254 of 10.88.0.0/24 are in use"):
        subnet.allocate()


@pytest.mark.row("R13")
@pytest.mark.parametrize("host", [2, 100, 254])
def test_release_makes_reusable(host: int) -> None:
    subnet = Subnet("10.88.0.0/24")
    drain(subnet)
    subnet.release(f"10.88.0.{host}")
    assert subnet.allocate() == f"10.88.0.{host}"
    with pytest.raises(Exhausted):
        subnet.allocate()


@pytest.mark.row("R13")
@pytest.mark.parametrize("length", [8, 9, 23, 24, 25, 27, 29, 30, 31])
def test_reload_keeps_exact_capacity(length: int) -> None:
    before = Subnet(f"10.0.0.0/{length}")
    address = before.allocate()
    after = Subnet(before.cidr, before.taken())
    assert after.capacity == before.capacity == (2 if length == 31 else (1 << (32 - length)) - 2)
    assert (after.n_taken, after.taken()) == (2, [address])


@pytest.mark.row("R13")
def test_a_full_range_stays_full_after_a_reload() -> None:
    before = Subnet("10.88.0.0/24")
    drain(before)
    after = Subnet(before.cidr, before.taken())
    with pytest.raises(Exhausted):
        after.allocate()


@pytest.mark.parametrize(
    "cidr, gateway, others",
    [
        ("10.0.0.0/30", "10.0.0.1", ["10.0.0.2"]),
        ("10.0.0.4/31", "10.0.0.4", ["10.0.0.5"]),
        ("10.0.0.0/29", "10.0.0.1", [f"10.0.0.{n}" for n in range(2, 7)]),
    ],
)
def test_small_ranges(cidr: str, gateway: str, others: list[str]) -> None:
    subnet = Subnet(cidr)
    assert (subnet.gateway, drain(subnet)) == (gateway, others)


@pytest.mark.parametrize(
    "cidr",
    [
        "10.0.0.0/32",
        "0.0.0.0/0",
        "8.0.0.0/7",
        "10.0.0.1/24",
        "10.0.0.0",
        "10.0.0.0/",
        "10.0.0.0/-1",
        "10.0.0.0/+24",
        "10.0.0/24",
        "10.0.0.0/255.255.255.0",
        "fd00::/64",
        "",
        "x/24",
        "10.0.0.0/24 ",
        "10.0.0.0/²4",
        "10.0.0.0/00000000024",
        "127.0.0.0/24",
        "224.0.0.0/24",
        "0.1.0.0/16",
        "169.254.0.0/16",
        "255.255.255.0/24",
    ],
)
def test_unusable_ranges_are_refused(cidr: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_subnet(cidr)
    assert caught.value.hint


def test_a_range_with_host_bits_is_corrected_in_the_hint() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_subnet("10.90.0.7/24")
    assert caught.value.hint == "did you mean 10.90.0.0/24?"


def test_an_address_is_not_given_again_at_once() -> None:
    subnet = Subnet("10.88.0.0/29")
    first = subnet.allocate()
    subnet.release(first)
    assert [subnet.allocate() for _ in range(4)] == ["10.88.0.3", "10.88.0.4", "10.88.0.5", "10.88.0.6"]
    assert subnet.allocate() == first


@pytest.mark.parametrize("address", ["10.88.0.0", "10.88.0.255", "10.88.1.1", "10.87.255.255", "::1", "x", "10.88.0.1", "10.88.0.9"])
def test_release_of_what_is_not_taken_is_refused(address: str) -> None:
    subnet = Subnet("10.88.0.0/24")
    with pytest.raises(InvalidArgument):
        subnet.release(address)
    assert subnet.n_taken == 1


@pytest.mark.parametrize("address", ["10.88.0.0", "10.88.0.255", "10.99.0.1"])
def test_take_of_no_host_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument):
        Subnet("10.88.0.0/24", [address])


@pytest.mark.parametrize("taken", [["10.88.0.1"], ["10.88.0.7", "10.88.0.7"]])
def test_take_of_a_taken_one_is_refused(taken: list[str]) -> None:
    with pytest.raises(AlreadyExists):
        Subnet("10.88.0.0/24", taken)


def test_overlap() -> None:
    assert find_overlap("10.88.0.0/24", ["10.88.1.0/24", "10.88.0.128/25"]) == "10.88.0.128/25"
    assert find_overlap("10.88.0.0/24", ["10.0.0.0/8"]) == "10.0.0.0/8"
    assert find_overlap("10.88.0.0/24", ["10.88.0.77/32"]) == "10.88.0.77/32"
    assert find_overlap("10.88.0.0/24", ["10.87.255.0/24", "10.88.1.0/24"]) is None


@pytest.mark.parametrize(
    "avoid, length, chosen",
    [
        ([], 24, "10.88.0.0/24"),
        (["10.88.0.0/24"], 24, "10.88.1.0/24"),
        (["10.88.0.200/32"], 24, "10.88.1.0/24"),
        (["10.88.0.0/16", "10.89.0.0/24"], 24, "10.89.1.0/24"),
        (["10.89.0.0/24", "10.88.0.0/16"], 16, "10.90.0.0/16"),
        (["192.168.0.0/16"], 10, "10.64.0.0/10"),
    ],
)
def test_choice_of_a_free_range(avoid: list[str], length: int, chosen: str) -> None:
    if length == 10:
        with pytest.raises(Exhausted):
            choose_subnet(avoid, prefix_length=length)  # no /10 lies wholly in the block
    else:
        assert choose_subnet(avoid, prefix_length=length) == chosen


def test_no_free_range_is_an_error() -> None:
    with pytest.raises(Exhausted):
        choose_subnet(["10.0.0.0/8"])


@given(st.lists(st.tuples(st.integers(CHOICE_FIRST - 70000, CHOICE_LAST + 70000), st.integers(9, 32)), max_size=12), st.integers(12, 31))
def test_a_chosen_range_is_the_lowest_free_one(avoid: list[tuple[int, int]], length: int) -> None:
    blocks = [str(ipaddress.IPv4Network((address, bits), strict=False)) for address, bits in avoid]
    try:
        chosen = choose_subnet(blocks, prefix_length=length)
    except Exhausted:
        chosen = f"{ipaddress.IPv4Address(CHOICE_LAST + 1)}/{length}"
    else:
        assert find_overlap(chosen, blocks) is None
    start, size = int(ipaddress.IPv4Network(chosen).network_address), 1 << (32 - length)
    first = -(-CHOICE_FIRST // size) * size
    lower = [f"{ipaddress.IPv4Address(a)}/{length}" for a in range(first, min(start, first + 64 * size), size)]
    assert all(find_overlap(candidate, blocks) is not None for candidate in lower)


@settings(max_examples=60, stateful_step_count=40)
class SubnetMachine(RuleBasedStateMachine):
    """Against the plainest model: a list of addresses in use."""

    @initialize(length=st.integers(26, 31))
    def begin(self, length: int) -> None:
        network = ipaddress.IPv4Network((CHOICE_FIRST, length))
        self.hosts = [str(host) for host in network.hosts()]
        self.subnet = Subnet(str(network))
        self.used: list[str] = []

    @precondition(lambda self: len(self.used) + 1 < len(self.hosts))
    @rule()
    def allocate(self) -> None:
        address = self.subnet.allocate()
        assert address in self.hosts[1:]
        assert address not in self.used
        self.used.append(address)

    @precondition(lambda self: len(self.used) + 1 == len(self.hosts))
    @rule()
    def refuse(self) -> None:
        with pytest.raises(Exhausted):
            self.subnet.allocate()

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from(self.used))
        self.used.remove(address)
        self.subnet.release(address)
        with pytest.raises(InvalidArgument):
            self.subnet.release(address)

    @precondition(lambda self: len(self.used) + 1 < len(self.hosts))
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        address = data.draw(st.sampled_from([host for host in self.hosts[1:] if host not in self.used]))
        self.subnet.take(address)
        self.used.append(address)

    @rule()
    def reload(self) -> None:
        self.subnet = Subnet(self.subnet.cidr, self.subnet.taken())

    @invariant()
    def agrees(self) -> None:
        assert self.subnet.capacity == len(self.hosts)
        assert self.subnet.n_taken == len(self.used) + 1
        assert sorted(self.subnet.taken()) == sorted(self.used)


@pytest.mark.row("R13")
def test_any_history_of_addresses_stays_exact() -> None:
    run_state_machine_as_test(SubnetMachine)
