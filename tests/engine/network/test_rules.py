"""Rules: what the packet filter holds after each step, seen in the simulated kernel."""

from typing import TYPE_CHECKING

import pytest

from isopod.api.messages import PortMapping
from isopod.engine.network.filter import Bridge, Plug
from isopod.engine.network.rules import Rules
from tests.engine.network.faults import with_refusing_kernel

if TYPE_CHECKING:
    from isopod.world.sim import SimWorld

pytestmark = pytest.mark.row("V2")
BRIDGES = [Bridge("x0", "10.88.0.0/24")]
WEB = Plug("x-v00001", "10.88.0.2", ports=(PortMapping(port=80, host_port=8080), PortMapping(port=53, host_port=53, host_ip="127.0.0.1")))
GUEST = Plug("x-t00002", "10.88.0.3", "0a:00:00:00:00:01", (PortMapping(port=22, host_port=2222),), bytes_per_s_out=1 << 20)
OTHER = Plug("x-t00003", "10.88.0.4", "0a:00:00:00:00:02")


def held(sim: "SimWorld") -> dict[str, list[str]]:
    """Return the keys of what the tables hold, by set or map."""
    filters = sim.kernel.filters
    names = {"published": "inet x", "published_at": "inet x", "senders": "bridge x", "rates": "bridge x"}
    return {name: sorted(found) for name, table in names.items() if (found := filters.elements(table, name))}


async def test_each_step_changes_just_what_it_is_to(sim_world: "SimWorld") -> None:
    world, kernel = with_refusing_kernel(sim_world.world)
    rules = Rules(world.kernel, "x")
    await rules.begin(BRIDGES, [], has_guard=False)
    assert (held(sim_world), list(sim_world.kernel.filters.tables)) == ({}, ["inet x"])
    kernel.calls.clear()
    await rules.add(Plug("x-v00009", "10.88.0.9"))
    await rules.unpublish("x-v00009")
    await rules.remove("x-v00009")
    await rules.remove("absent")
    assert kernel.calls == []  # who wants nothing costs nothing
    await rules.add(WEB)
    assert held(sim_world) == {"published": ["tcp . 8080"], "published_at": ["127.0.0.1 . tcp . 53"]}
    await rules.add(GUEST)
    await rules.add(OTHER)
    sender = '"x-t00002" . 0a:00:00:00:00:01 . 10.88.0.3'
    assert held(sim_world)["published"] == ["tcp . 2222", "tcp . 8080"]
    assert held(sim_world)["senders"] == [sender, '"x-t00003" . 0a:00:00:00:00:02 . 10.88.0.4']
    await rules.unpublish(GUEST.link)
    assert held(sim_world)["published"] == ["tcp . 8080"]
    assert sender in held(sim_world)["senders"]  # its link is there still
    await rules.remove(OTHER.link)
    await rules.set_bridges([*BRIDGES, Bridge("x-b00001", "10.90.0.0/24")])  # the whole, with all that is held
    assert held(sim_world)["senders"] == [sender]
    assert held(sim_world)["rates"] == ['"x-t00002"']
    await rules.remove(GUEST.link)
    assert list(sim_world.kernel.filters.tables) == ["inet x"]
    await rules.remove(WEB.link)
    assert held(sim_world) == {}
    assert kernel.calls.count("apply_filter") == 8


@pytest.mark.parametrize("step", ["add", "unpublish", "remove", "set_bridges"])
async def test_a_step_that_is_refused_changes_nothing(sim_world: "SimWorld", step: str) -> None:
    world, kernel = with_refusing_kernel(sim_world.world)
    rules = Rules(world.kernel, "x")
    await rules.begin(BRIDGES, [GUEST], has_guard=False)
    before = held(sim_world)
    steps = {
        "add": lambda: rules.add(WEB),
        "unpublish": lambda: rules.unpublish(GUEST.link),
        "remove": lambda: rules.remove(GUEST.link),
        "set_bridges": lambda: rules.set_bridges([]),
    }
    kernel.refuse = lambda called: called == "apply_filter"
    with pytest.raises(OSError, match="refused"):
        await steps[step]()
    kernel.refuse = lambda called: False
    assert held(sim_world) == before
    await rules.set_bridges([*BRIDGES, Bridge("x-b00001", "10.90.0.0/24")])
    assert held(sim_world) == before
    await rules.remove(GUEST.link)
    assert held(sim_world) == {}


async def test_tables_that_somebody_removed_are_made_anew(sim_world: "SimWorld") -> None:
    rules = Rules(sim_world.world.kernel, "x")
    await rules.begin(BRIDGES, [WEB, GUEST], has_guard=False)
    for step in (rules.add(OTHER), rules.unpublish(GUEST.link), rules.remove(OTHER.link)):
        await sim_world.world.kernel.delete_table("x")
        await step
    assert held(sim_world) == {
        "published": ["tcp . 8080"],
        "published_at": ["127.0.0.1 . tcp . 53"],
        "senders": ['"x-t00002" . 0a:00:00:00:00:01 . 10.88.0.3'],
        "rates": ['"x-t00002"'],
    }


async def test_a_guard_that_an_earlier_node_left_goes_if_nobody_needs_it(sim_world: "SimWorld") -> None:
    await Rules(sim_world.world.kernel, "x").begin(BRIDGES, [GUEST], has_guard=False)
    await Rules(sim_world.world.kernel, "x").begin(BRIDGES, [WEB], has_guard=True)
    assert list(sim_world.kernel.filters.tables) == ["inet x"]
