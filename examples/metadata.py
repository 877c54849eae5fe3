"""Metadata: durable records of sandboxes, without a node: batches, queries, events, and a second start that finds it all.

    .venv/bin/python examples/metadata.py --folder data --times 5
    .venv/bin/python examples/metadata.py --folder data --every 0.5

It makes three records, changes one of them once per period, until SIGTERM or SIGINT (Ctrl-C) or so many times, and says what it hears of
it. Kill it in any way and start it again: it goes on with what was there. FOLDER/snapshots and `isopod journal dump FOLDER` show it.
"""

import argparse
import asyncio
import os
import signal

from isopod.api.messages import Container, Endpoint, Event, ListContainers, Mount, Resources
from isopod.engine.events import LoggingHandler
from isopod.engine.metadata import MetadataStore
from isopod.engine.operations import AddMount, Create, Delete, UpdateLabels, UpdateResources
from isopod.engine.queries import NOT_MEASURED, select, sum_limits
from isopod.runtime.logger import Logger
from isopod.world.errors import IsopodError
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world
from isopod.world.world import World


def new_record(world: World, name: str, **labels: str) -> Container:
    """Return the record of a sandbox that is yet to be started."""
    now_ns = world.clock.now_ns()
    image = {"image": "isopod/busybox:latest", "image_id": "sha256:0", "command": ("sleep", "1000"), "working_dir": "/", "user": ""}
    fields = {"id": world.random.token_hex(32), "name": name, "hostname": name, "created_at_ns": now_ns, "updated_at_ns": now_ns}
    return Container(**image, **fields, labels=labels, network=Endpoint(network="none"))  # type: ignore[arg-type]


async def fill(world: World, store: MetadataStore) -> None:
    """Make three records, and see a batch refused as a whole."""
    web, db, tmp = (new_record(world, name, tier=tier) for name, tier in (("web", "front"), ("db", "back"), ("tmp", "none")))
    limits = UpdateResources(db.id, Resources(memory_bytes_max=64 << 20, cpus=0.5))
    await store.commit(Create(web), Create(db), Create(tmp), limits, AddMount(db.id, Mount(source="/srv/db", destination="/data")))
    try:
        await store.commit(Delete(web.id), AddMount(db.id, Mount(source="/srv/db", destination="/data/")))
    except IsopodError as error:
        print(f"refused, all of it: {error}")
    await store.commit(Delete(tmp.id))


async def serve(world: World, arguments: argparse.Namespace) -> None:
    """Open, fill, change, and close; what is durable stays."""
    store = await MetadataStore.open(world, arguments.folder, logger=Logger(lambda _: None, world.clock))
    try:
        print(f"found {len(store.records())} records up to change {store.last_cursor}")
        store.subscribe(LoggingHandler(Logger(lambda line: print(line.decode(), end=""), world.clock, form="text")))
        if store.id_of("web") is None:
            await fill(world, store)
        limits = sum_limits(store.records())
        print(f"limits: {limits.memory_bytes >> 20} MiB, {limits.cpus} cpus; {limits.cpus_unlimited} without a CPU limit")
        store.subscribe(tell)
        number = 0
        while not arguments.times or number < arguments.times:
            number += 1
            found = select(store.records(), ListContainers(all=True, labels=("tier=front",)), lambda _: NOT_MEASURED)
            await store.commit(UpdateLabels(found[0].id, {**found[0].labels, "number": str(number)}))
            await asyncio.sleep(arguments.every)
    finally:
        await store.close()
        print(f"closed at change {store.last_cursor}", flush=True)


def tell(event: Event) -> None:
    """Say what a handler is told once a change is durable."""
    print(f"change {event.cursor}: {event.name} has {event.labels}", flush=True)


async def until_stopped(world: World, arguments: argparse.Namespace) -> None:
    """Serve; a signal cancels it."""
    loop = asyncio.get_running_loop()
    serving = loop.create_task(serve(world, arguments))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    outcomes = await asyncio.gather(serving, return_exceptions=True)
    if isinstance(outcomes[0], IsopodError):
        raise SystemExit(f"error: {outcomes[0]}\nhint: {outcomes[0].hint}")


def main() -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(description="Durable records of sandboxes, without a node.")
    parser.add_argument("--folder", type=os.path.abspath, default="metadata", help="where the records are kept (default ./metadata)")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="the period of the changes (default 1)")
    parser.add_argument("--times", type=int, default=0, metavar="N", help="how many (default: until it is stopped)")
    arguments = parser.parse_args()
    new_loop("uvloop").run_until_complete(until_stopped(make_host_world(), arguments))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
