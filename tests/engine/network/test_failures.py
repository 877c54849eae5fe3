"""When the kernel refuses a call, in each place: nothing is left, addresses stay exact, and the next try succeeds."""

import ipaddress

import pytest

from isopod.api.messages import NetworkSpec
from isopod.engine.network.networks import Networks
from isopod.world.errors import Exhausted, InUse, KernelError
from tests.engine.network.conftest import Instance
from tests.engine.network.faults import RefusingKernel, with_refusing_kernel


async def open_refusing(instance: Instance) -> tuple[Networks, RefusingKernel]:
    instance.world, kernel = with_refusing_kernel(instance.world)
    return await instance.open(pool_size=0), kernel


async def end(networks: Networks) -> None:
    await networks.close()
    await networks.dispose()


@pytest.mark.parametrize("method", ["create_namespace", "create_veth", "configure_link"])
async def test_a_failed_attach_leaves_nothing(instance: Instance, method: str) -> None:
    networks, kernel = await open_refusing(instance)
    before = await instance.left()
    kernel.refuse = lambda called: called == method
    with pytest.raises(KernelError):
        await networks.attach("a" * 64, "bridge")
    kernel.refuse = lambda called: False
    await networks.wait_idle()
    assert await instance.left() == before
    assert networks.get("bridge").addresses_used == 1
    await networks.attach("a" * 64, "bridge")
    await networks.detach("a" * 64)
    await end(networks)


async def test_a_full_disk_fails_the_attach_and_leaves_nothing(instance: Instance) -> None:
    networks = await instance.open(pool_size=0)
    before = await instance.left()
    notes = f"{instance.namespaces}-owners"
    await instance.world.disk.make_directory(f"{notes}/{'a' * 64}/x")  # where the file should be there is a folder
    with pytest.raises(KernelError):
        await networks.attach("a" * 64, "bridge")
    await instance.world.disk.remove_tree(f"{notes}/{'a' * 64}")
    await networks.detach("a" * 64)
    await networks.wait_idle()
    assert await instance.left() == before
    assert networks.get("bridge").addresses_used == 1
    await end(networks)


async def test_a_detach_that_fails_can_be_tried_again(instance: Instance) -> None:
    networks, kernel = await open_refusing(instance)
    attachment = await networks.attach("a" * 64, "bridge")
    kernel.refuse = lambda called: called == "delete_namespace"
    with pytest.raises(KernelError):
        await networks.detach("a" * 64)
    assert networks.get("bridge").addresses_used == 2
    assert (await instance.left())["namespaces"] == (attachment.namespace,)
    kernel.refuse = lambda called: False
    await networks.detach("a" * 64)
    await networks.wait_idle()
    assert networks.get("bridge").addresses_used == 1
    await end(networks)


async def test_an_address_whose_link_stays_is_not_given_again(instance: Instance) -> None:
    networks, kernel = await open_refusing(instance)
    subnet = await instance.free_subnet(30)
    await networks.create(NetworkSpec(name="tiny", subnet=subnet))
    await networks.attach("a" * 64, "tiny")
    kernel.refuse = lambda called: called == "delete_link"
    await networks.detach("a" * 64)
    await networks.wait_idle()
    assert "network_link_left" in instance.events()
    assert networks.get("tiny").addresses_used == 2
    with pytest.raises(Exhausted):
        await networks.attach("b" * 64, "tiny")
    with pytest.raises(InUse):
        await networks.dispose()
    kernel.refuse = lambda called: False
    await end(networks)


@pytest.mark.parametrize("method", ["routes", "create_bridge", "apply_filter"])
async def test_a_failed_creation_leaves_nothing(instance: Instance, method: str) -> None:
    networks, kernel = await open_refusing(instance)
    before = (networks.list(), await instance.left(), await instance.world.disk.read(instance.file))
    kernel.refuse = lambda called: called == method
    with pytest.raises(KernelError):
        await networks.create(NetworkSpec(name="one"))
    kernel.refuse = lambda called: False
    assert (networks.list(), await instance.left(), await instance.world.disk.read(instance.file)) == before
    made = await networks.create(NetworkSpec(name="one"))
    assert not ipaddress.ip_network(made.subnet).overlaps(ipaddress.ip_network(instance.subnet))
    await end(networks)


async def test_a_pool_that_cannot_fill_says_so_and_goes_on_later(instance: Instance) -> None:
    instance.world, kernel = with_refusing_kernel(instance.world)
    networks = await instance.open(pool_size=2, adopt=False)
    kernel.refuse = lambda called: called == "create_veth"
    await networks.adopt({})
    await networks.wait_idle()
    assert instance.events().count("network_pool_not_filled") == 1
    with pytest.raises(KernelError):
        await networks.attach("a" * 64, "bridge")
    kernel.refuse = lambda called: False
    await networks.wait_idle()
    await networks.attach("a" * 64, "bridge")
    await networks.wait_idle()
    assert len((await instance.left())["namespaces"]) == 3
    await networks.detach("a" * 64)
    await end(networks)


@pytest.mark.parametrize("method", ["inventory", "enable_forwarding", "create_bridge", "apply_filter"])
async def test_a_start_that_failed_can_be_repeated(instance: Instance, method: str) -> None:
    instance.world, kernel = with_refusing_kernel(instance.world)
    kernel.refuse = lambda called: called == method
    with pytest.raises(KernelError):
        await instance.open(pool_size=0)
    kernel.refuse = lambda called: False
    await end(await instance.open(pool_size=0))
