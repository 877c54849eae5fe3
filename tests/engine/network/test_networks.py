"""Networks on both Worlds: created, kept, refused; containers attached and gone, with nothing left behind (rows R10, R13)."""

import asyncio
import ipaddress

import pytest

from isopod.api.messages import Endpoint, NetworkSpec
from isopod.engine.network.networks import Attachment, Networks
from isopod.world.errors import AlreadyExists, BadRecord, Exhausted, InUse, InvalidArgument, NotFound, Unsupported, WrongState
from tests.engine.network.conftest import Instance


def ident(number: int) -> str:
    return f"{number:064x}"


async def end(networks: Networks) -> None:
    await networks.close()
    await networks.dispose()


def address_of(attachment: Attachment) -> str:
    assert attachment.endpoint.ip_address is not None
    return attachment.endpoint.ip_address


@pytest.mark.row("R10")
async def test_a_first_start_makes_the_default_network(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    record = networks.get("bridge")
    assert (record.driver, record.subnet, record.bridge) == ("bridge", instance.subnet, f"{instance.prefix}0")
    assert ipaddress.ip_address(record.gateway) == ipaddress.ip_network(record.subnet)[1]
    assert [(row.name, row.driver) for row in networks.list()] == [("bridge", "bridge"), ("host", "host"), ("none", "null")]
    assert await instance.left() == {"links": (f"{instance.prefix}0",), "tables": (instance.prefix,)}
    await end(networks)


async def test_opening_twice_changes_nothing(instance: Instance) -> None:
    first = await instance.open(pool_size=0)
    before = (first.list(), await instance.left())
    second = await instance.open(pool_size=0)
    assert (second.list(), await instance.left()) == before
    await end(second)


async def test_a_default_range_that_the_host_routes_is_moved(instance: Instance) -> None:
    taken = await instance.free_subnet()
    await instance.world.kernel.create_bridge(f"{instance.prefix}x", f"{ipaddress.ip_network(taken)[1]}/24")
    networks = await instance.open(pool_size=0, subnet=taken)
    assert not ipaddress.ip_network(networks.get("bridge").subnet).overlaps(ipaddress.ip_network(taken))
    assert "network_default_moved" in instance.events()
    await instance.world.kernel.delete_link(f"{instance.prefix}x")
    await end(networks)


@pytest.mark.row("R10")
async def test_a_created_network_survives_a_restart(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    subnet = await instance.free_subnet()
    created = await networks.create(NetworkSpec(name="backend", subnet=subnet))
    assert (created.name, created.subnet, created.addresses_used) == ("backend", subnet, 1)
    await end(networks)
    assert await instance.left() == {}
    again = await instance.open(pool_size=0)
    assert again.get("backend") == created
    assert created.bridge in (await instance.left())["links"]
    attached = await again.attach(ident(1), "backend")
    assert ipaddress.ip_address(address_of(attached)) in ipaddress.ip_network(subnet)
    await again.detach(ident(1))
    await again.remove("backend")
    assert created.bridge not in (await instance.left())["links"]
    await end(again)
    third = await instance.open(pool_size=0)
    with pytest.raises(NotFound):
        third.get("backend")
    await end(third)


@pytest.mark.row("R10")
async def test_what_cannot_be_created_is_refused(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    subnet = await instance.free_subnet()
    await networks.create(NetworkSpec(name="one", subnet=subnet))
    before = (networks.list(), await instance.left(), await instance.world.disk.read(instance.file))
    wider = str(ipaddress.ip_network(subnet).supernet(new_prefix=20))
    for name, cidr, driver, error in (
        ("two", subnet, "bridge", AlreadyExists),
        ("two", wider, "bridge", AlreadyExists),
        ("two", instance.subnet, "bridge", AlreadyExists),
        ("one", "", "bridge", AlreadyExists),
        ("bridge", "", "bridge", AlreadyExists),
        ("none", "", "bridge", AlreadyExists),
        ("host", "", "bridge", AlreadyExists),
        ("two", "10.0.0.1/24", "bridge", InvalidArgument),
        ("two", "10.0.0.0/32", "bridge", InvalidArgument),
        ("a/b", "", "bridge", InvalidArgument),
        ("two", "", "macvlan", Unsupported),
    ):
        with pytest.raises(error):
            await networks.create(NetworkSpec(name=name, subnet=cidr, driver=driver))
    assert (networks.list(), await instance.left(), await instance.world.disk.read(instance.file)) == before
    await end(networks)


async def test_a_range_of_the_host_is_refused(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    taken = await instance.free_subnet()
    await instance.world.kernel.create_bridge(f"{instance.prefix}x", f"{ipaddress.ip_network(taken)[1]}/24")
    with pytest.raises(AlreadyExists) as caught:
        await networks.create(NetworkSpec(name="two", subnet=taken))
    assert taken in caught.value.hint
    chosen = await networks.create(NetworkSpec(name="two"))
    assert not ipaddress.ip_network(chosen.subnet).overlaps(ipaddress.ip_network(taken))
    await instance.world.kernel.delete_link(f"{instance.prefix}x")
    await end(networks)


async def test_concurrent_creations_get_ranges_of_their_own(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    made = await asyncio.gather(*(networks.create(NetworkSpec(name=f"net{n}")) for n in range(6)))
    assert len({row.subnet for row in made}) == len({row.bridge for row in made}) == 6
    results = await asyncio.gather(*(networks.create(NetworkSpec(name="same")) for _ in range(3)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["AlreadyExists", "AlreadyExists", "NetworkRecord"]
    await end(networks)


async def test_built_in_and_used_networks_stay(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    await networks.create(NetworkSpec(name="one"))
    await networks.attach(ident(1), "one")
    for name, error in (("bridge", WrongState), ("none", WrongState), ("host", WrongState), ("two", NotFound), ("one", InUse)):
        with pytest.raises(error):
            await networks.remove(name)
    await networks.detach(ident(1))
    await networks.remove("one")
    with pytest.raises(NotFound) as caught:
        networks.check("one")
    assert "isopod network create" in caught.value.hint
    await end(networks)


async def test_none_and_host_need_nothing(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    assert await networks.attach(ident(1), "none") == Attachment(None, Endpoint(network="none"))
    assert await networks.attach(ident(2), "host") == Attachment("", Endpoint(network="host"))
    await networks.detach(ident(1))
    await networks.detach(ident(2))
    await end(networks)


@pytest.mark.parametrize("pool_size", [0, 2])
async def test_attach_and_detach(instance: Instance, pool_size: int) -> None:
    networks = await instance.open(pool_size=pool_size)
    await networks.wait_idle()
    attachment = await networks.attach(ident(1), "bridge")
    endpoint, record = attachment.endpoint, networks.get("bridge")
    assert attachment.namespace is not None and attachment.namespace.startswith(instance.namespaces + "/")
    assert await instance.world.disk.stat(attachment.namespace) is not None
    assert ipaddress.ip_interface(f"{endpoint.ip_address}/{endpoint.prefix_length}").network == ipaddress.ip_network(record.subnet)
    assert endpoint.gateway == record.gateway != endpoint.ip_address
    assert endpoint.mac_address is not None and len(endpoint.mac_address.split(":")) == 6
    assert record.addresses_used == 2
    with pytest.raises(AlreadyExists):
        await networks.attach(ident(1), "bridge")
    assert networks.get("bridge").addresses_used == 2
    await networks.detach(ident(1))
    await networks.detach(ident(1))
    assert await instance.world.disk.stat(attachment.namespace) is None
    await networks.wait_idle()
    assert networks.get("bridge").addresses_used == 1
    await end(networks)


async def test_twenty_at_once(instance: Instance) -> None:
    networks = await instance.open(pool_size=3)
    attachments = await asyncio.gather(*(networks.attach(ident(n), "bridge") for n in range(20)))
    assert len({address_of(a) for a in attachments}) == len({a.namespace for a in attachments}) == 20
    assert networks.get("bridge").addresses_used == 21
    await asyncio.gather(*(networks.detach(ident(n)) for n in range(20)))
    await networks.wait_idle()
    assert networks.get("bridge").addresses_used == 1
    await end(networks)


@pytest.mark.row("R13")
async def test_the_last_address_comes_back(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    subnet = await instance.free_subnet(30)
    await networks.create(NetworkSpec(name="tiny", subnet=subnet))
    first = await networks.attach(ident(1), "tiny")
    with pytest.raises(Exhausted):
        await networks.attach(ident(2), "tiny")
    for number in range(3, 6):  # the link that had it may be going still: attach waits for that
        await networks.detach(ident(number - 1 if number > 3 else 1))
        assert address_of(await networks.attach(ident(number), "tiny")) == address_of(first)
    await networks.detach(ident(5))
    await networks.remove("tiny")
    await end(networks)


async def test_an_unknown_network_has_no_place(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    with pytest.raises(NotFound):
        await networks.attach(ident(1), "nowhere")
    await end(networks)


async def test_a_cancelled_attach_leaves_nothing(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    before = await instance.left()
    for n_turns in range(6):
        task = asyncio.ensure_future(networks.attach(ident(n_turns), "bridge"))
        for _ in range(n_turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await networks.wait_idle()
    assert await instance.left() == before
    assert networks.get("bridge").addresses_used == 1
    await end(networks)


async def test_closing_keeps_containers_and_refuses_newcomers(instance: Instance) -> None:
    networks = await instance.open(pool_size=2)
    await networks.wait_idle()
    attachment = await networks.attach(ident(1), "bridge")
    await networks.close()
    assert (await instance.left())["namespaces"] == (attachment.namespace,)
    with pytest.raises(WrongState):
        await networks.attach(ident(2), "bridge")
    with pytest.raises(InUse):
        await networks.dispose()
    await networks.detach(ident(1))
    await end(networks)


async def test_a_killed_daemons_containers_are_adopted(instance: Instance) -> None:
    first = await instance.open(pool_size=2)
    await first.create(NetworkSpec(name="one"))
    kept = [await first.attach(ident(1), "bridge"), await first.attach(ident(2), "one")]
    gone = await first.attach(ident(3), "bridge")
    await instance.kill(first)
    second = await instance.open(pool_size=0, adopt=False)
    await second.adopt({ident(1): kept[0].endpoint, ident(2): kept[1].endpoint, ident(9): Endpoint(network="host")})
    assert (await instance.left())["namespaces"] == tuple(sorted(a.namespace or "" for a in kept))
    assert gone.namespace is not None and await instance.world.disk.stat(gone.namespace) is None
    assert (second.get("bridge").addresses_used, second.get("one").addresses_used) == (2, 2)
    fresh = await asyncio.gather(*(second.attach(ident(n), "bridge") for n in range(10, 15)))
    assert address_of(kept[0]) not in [address_of(a) for a in fresh]
    for number in (1, 2, *range(10, 15)):
        await second.detach(ident(number))
    await end(second)


async def test_a_damaged_file_is_never_taken_for_an_empty_one(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    await networks.create(NetworkSpec(name="one"))
    await end(networks)
    whole = await instance.world.disk.read(instance.file)
    for damaged in (b"", whole[:-20], b"[]", whole.replace(b'"version": 1', b'"version": 2'), whole.replace(b'"one"', b'"bridge"')):
        await instance.world.disk.write(instance.file, damaged)
        with pytest.raises(BadRecord) as caught:
            await instance.open(pool_size=0)
        assert caught.value.hint
        assert await instance.world.disk.read(instance.file) == damaged
    assert await instance.left() == {}


async def test_bridges_that_no_network_has_are_removed_at_start(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    await end(networks)
    foreign = f"{instance.prefix}x"
    for stale in (f"{instance.prefix}-b00000", foreign):
        await instance.world.kernel.create_bridge(stale, f"{ipaddress.ip_network(await instance.free_subnet())[1]}/24")
    again = await instance.open(pool_size=0)
    assert (await instance.left())["links"] == tuple(sorted([f"{instance.prefix}0", foreign]))
    await instance.world.kernel.delete_link(foreign)
    await end(again)
