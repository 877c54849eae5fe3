"""The metrics agent that a node runs beside itself: one scrape shows what runs on the machine."""

import asyncio
from contextlib import suppress

import pytest

from isopod.net.http.client import HttpClient
from isopod.world.errors import Disconnected
from isopod.world.network import UnixAddress
from tests.node.rig import Backend, HostBackend, Rig

pytestmark = pytest.mark.row("K14")
LIMIT_S = 60.0


def told(backend: Backend, rig: Rig, address: str) -> None:
    """Have the node start an agent."""
    if isinstance(backend, HostBackend):
        backend.more_flags += ["--pulse-listen", address]
        backend.more_environment |= {"ISOPOD_PULSE_INTERVAL_S": "0.5", "ISOPOD_VM_MONITOR_ROOT": f"{rig.folder}/sbs"}
    rig.flags = {**rig.flags, "--pulse-listen": address}
    rig.environment = {**rig.environment, "ISOPOD_PULSE_INTERVAL_S": "0.5", "ISOPOD_VM_MONITOR_ROOT": f"{rig.folder}/sbs"}


async def scraped(rig: Rig, path: str, wanted: str) -> str:
    """Return a scrape that says `wanted`; the agent learns of containers by itself, a moment later."""
    client = HttpClient(rig.world)
    text = ""
    try:
        async with asyncio.timeout(LIMIT_S):
            while wanted not in text:
                await asyncio.sleep(0.05)  # an agent that begins, or learns, gives no event to others; the limit bounds the asking
                with suppress(Disconnected):
                    answer = await client.request("GET", f"http://localhost{path}", address=UnixAddress(f"{rig.folder}/pulse.sock"))
                    text = (await answer.read()).decode()
    finally:
        await client.close()
    return text


async def test_a_scrape_of_the_nodes_agent_shows_its_containers(rig: Rig) -> None:
    told(rig.backend, rig, f"unix:{rig.folder}/pulse.sock")
    async with rig:
        made = await rig.run_detached("sleep", "1000", name="web")
        text = await scraped(rig, "/metrics", f'container_cpu_usage_seconds_total{{container="",id="/isopod/{made.id}"')
        (line,) = [
            line
            for line in text.splitlines()
            if line.startswith("container_memory_usage_bytes{") and made.id in line and 'container=""' in line
        ]
        assert 'pod="web"' in line
        assert 'namespace="isopod"' in line
        assert made.id in await scraped(rig, "/sandboxes", made.id)
        config = await scraped(rig, "/config", "node_socket")
        assert f'node_socket: "{rig.config.paths["socket"]}"' in config
        if isinstance(rig.backend, HostBackend):
            assert "# the node's flag --pulse-listen\n" in config
            assert "interval_s: 0.5  # the node's environment ISOPOD_PULSE_INTERVAL_S\n" in config
        await rig.remove("web", force=True)
        async with asyncio.timeout(LIMIT_S):
            while made.id in await scraped(rig, "/metrics", "kata_monitor_running_shim_count"):
                await asyncio.sleep(0.05)
