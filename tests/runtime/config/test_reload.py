"""Live reload: what is live is applied, the rest is reported, what is broken changes nothing; on both Worlds."""

import asyncio
import json

import pytest

from isopod.runtime.config import Change, ConfigLoader, LiveConfig, Loaded, NodeConfig, RuntimeConfig, diff, load_config
from isopod.runtime.config.runtime import LoggingConfig, SmpConfig, TlsConfig
from isopod.runtime.logger import Logger
from isopod.world.world import World


@pytest.mark.row("S23")
def test_a_diff_names_what_changed_and_what_is_live() -> None:
    old, new = RuntimeConfig(), RuntimeConfig(logging=LoggingConfig(level="debug"), smp=SmpConfig(num_shards=2))
    assert diff(old, new) == (Change("smp.num_shards", 0, 2, False), Change("logging.level", "info", "debug", True))
    assert diff(old, old) == ()
    with_tls = RuntimeConfig(tls=TlsConfig(cert_file="/c", key_file="/k"))
    assert Change("tls.cert_file", None, "/c", False) in diff(old, with_tls)
    assert Change("tls.cert_file", "/c", None, False) in diff(with_tls, old)
    nodes = diff(load_config(), load_config(flags={"--log-level": "debug", "--pool-size": "1"}))
    assert [(change.key, change.is_live) for change in nodes] == [("log_level", True), ("pool_size", False)]
    assert isinstance(load_config(), NodeConfig)


class Rig:
    """A configuration on a disk, and what became of it."""

    def __init__(self, world: World, folder: str) -> None:
        self.disk = world.disk
        self.path = f"{folder}/config.toml"
        self.lines: list[bytes] = []
        self.levels: list[object] = []
        self.logger = Logger(self.lines.append, world.clock)
        self.loader = ConfigLoader(RuntimeConfig)

    async def read(self) -> Loaded[RuntimeConfig]:
        return await self.loader.read(self.disk, self.path)

    async def start(self) -> LiveConfig[RuntimeConfig]:
        await self.disk.write(self.path, b"[logging]\nlevel = 'info'\n")
        live = LiveConfig(await self.read(), self.read, self.logger)
        live.subscribe("logging.level", self.levels.append)
        return live

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.lines]


@pytest.mark.row("S23")
async def test_a_reload_applies_what_is_live_and_reports_the_rest(world: World, folder: str) -> None:
    rig = Rig(world, folder)
    live = await rig.start()
    await rig.disk.write(rig.path, b"[logging]\nlevel = 'debug'\n[smp]\nnum_shards = 3\n")
    outcome = await live.reload()
    assert ([c.key for c in outcome.applied], [c.key for c in outcome.needs_restart], outcome.error) == (
        ["logging.level"],
        ["smp.num_shards"],
        "",
    )
    assert (rig.levels, live.current.logging.level, live.current.smp.num_shards) == (["debug"], "debug", 0)
    assert str(live.loaded.origin("logging.level")) == f"file {rig.path}"
    again = await live.reload()
    assert (again.applied, [c.key for c in again.needs_restart]) == ((), ["smp.num_shards"]), "it still waits for a restart"


@pytest.mark.row("S23")
@pytest.mark.parametrize("broken", [b"[logging", b"[logging]\nlevel = 'loud'\n", b"[loging]\nlevel = 'debug'\n", None, b"\xff"])
async def test_a_broken_file_keeps_the_old_configuration_and_says_why(world: World, folder: str, broken: bytes | None) -> None:
    rig = Rig(world, folder)
    live = await rig.start()
    before = live.current
    if broken is None:
        await rig.disk.remove(rig.path)
    else:
        await rig.disk.write(rig.path, broken)
    outcome = await live.reload()
    assert rig.path in outcome.error
    assert (live.current, rig.levels, outcome.applied) == (before, [], ())
    assert rig.events() == ["config.refused"]


async def test_a_subscriber_that_fails_is_reported_and_alone(world: World, folder: str) -> None:
    rig = Rig(world, folder)
    live = await rig.start()

    def fail(_: object) -> None:
        raise RuntimeError("no")

    undo = live.subscribe("logging.level", fail)
    late: list[object] = []
    live.subscribe("logging.level", late.append)
    await rig.disk.write(rig.path, b"[logging]\nlevel = 'error'\n")
    assert (await live.reload()).error == "logging.level: no"
    assert (rig.levels, late) == (["error"], ["error"])
    undo()
    await rig.disk.write(rig.path, b"")
    assert (await live.reload()).error == ""
    with pytest.raises(ValueError, match="no live setting"):
        live.subscribe("smp.num_shards", fail)


@pytest.mark.row("S23")
async def test_files_are_watched(world: World, folder: str) -> None:
    rig = Rig(world, folder)
    live = await rig.start()
    changed = asyncio.Event()
    live.subscribe("logging.level", lambda _: changed.set())
    await rig.disk.make_directory(f"{folder}/config.d")
    watching = asyncio.create_task(live.watch(rig.disk, [folder, f"{folder}/config.d", f"{folder}/none"], debounce_s=0.02))
    # A change from before the watch began is not seen: write until it is.
    for level in ("debug", "error", "warning"):
        changed.clear()
        while not changed.is_set():
            await rig.disk.write_atomic(f"{folder}/config.d/10.toml", f"[logging]\nlevel = '{level}'\n".encode())
            await wait_a_moment(changed)
        assert live.current.logging.level == level
    await rig.disk.write(rig.path, b"= broken")
    while "config.refused" not in rig.events():
        await asyncio.sleep(0.01)
    assert live.current.logging.level == "warning"
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching


async def wait_a_moment(changed: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(1):
            await changed.wait()
    except TimeoutError:
        return
