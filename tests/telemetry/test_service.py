"""The whole of telemetry as a node has it: two shards' pages, health, HTTP; and its way down."""

import pytest

from isopod.net.http.client import HttpClient
from isopod.runtime.metrics import Home, Registry, ShardMetrics
from isopod.telemetry.service import TelemetryService
from isopod.world.network import TcpAddress
from isopod.world.world import World
from tests.telemetry.kit import Memo


@pytest.mark.row("S24")
async def test_a_scrape_of_the_service_sees_all_shards(world: World, folder: str) -> None:
    shards = [Registry(Home(world.pages, folder, shard=number)) for number in (0, 1)]
    for registry in shards:
        registry.counter("orders_total", "Orders.").inc(2)
    asked = shards[0].gauge("asked", "Asked for.")
    shards[0].before_snapshot(asked.inc)
    memo = Memo(world.clock)
    service = TelemetryService(world, shards[0], logger=memo.logger, shards=ShardMetrics(world.pages, folder), interval_s=0.02, n_shards=2)
    await service.start()
    listener = await service.listen(TcpAddress("127.0.0.1", 0))
    assert isinstance(listener.address, TcpAddress)
    origin = f"http://127.0.0.1:{listener.address.port}"
    client = HttpClient(world)

    async def get(path: str) -> tuple[int, bytes]:
        answer = await client.request("GET", origin + path)
        return answer.status, await answer.read()

    text = (await get("/metrics"))[1]
    assert b"orders_total 4.0\n" in text
    assert b"isopod_machine_load" in text
    before = asked.value
    await get("/metrics")
    assert asked.value > before, "figures that are asked for are as new as the scrape"
    assert (await get("/readyz"))[0] == 200
    service.shut("SIGTERM")
    assert ((await get("/readyz"))[0], (await get("/metrics"))[0]) == (503, 200)
    await client.close()
    await service.drain(1.0)
    await service.close()
    assert memo.events() == []
    for registry in shards:
        registry.close()
