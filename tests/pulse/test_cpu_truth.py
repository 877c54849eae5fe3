"""One CPU of use is a rate of 1.0: of a real container and a real guest that burn one, against what their own kernel says of it.

The kernel's word is the measure, not the wall clock, so that a busy machine decides nothing: a process that got half a CPU has a rate of a
half, and both say so.
"""

import asyncio
from typing import Final, NamedTuple

import pytest

from isopod.api import methods, usage
from isopod.net.http.client import HttpClient
from isopod.pulse import core
from isopod.pulse.cadvisor import WANTED
from isopod.pulse.converter import Converter
from isopod.pulse.labels import kata_labels
from isopod.pulse.local import figures_of, pod_of
from isopod.pulse.model import Families, Target
from isopod.pulse.pods import wanted
from isopod.world.network import UnixAddress
from isopod.world.world import World
from tests.node.rig import HostBackend, Rig
from tests.node.vms import VmRig, missing_for_vms
from tests.pulse.test_cadvisor import series_of
from tests.pulse.test_rates import Entry

pytestmark = [pytest.mark.host, pytest.mark.slow]
BURN: Final = ("sh", "-c", "while true; do true; done")
BURN_S: Final = 5.0
TOLERANCE: Final = 0.05
FRESH_S: Final = 1.1
"""A shim asks its guest again after this."""
STATES: Final = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")


def used_s(families: Families) -> float:
    """Return the CPU time at pod level, as it is scraped."""
    (found,) = [
        value
        for (name, labels), value in series_of(families).items()
        if name == "container_cpu_usage_seconds_total" and dict(labels)["container"] == ""
    ]
    return found


@pytest.mark.row("T17")
async def test_a_container(host_rig: Rig) -> None:
    converter = Converter()
    loop = asyncio.get_running_loop()
    async with host_rig as rig:
        record = await rig.run_detached(*BURN, name="burner")
        pod = pod_of(record, wanted((), ()))

        async def look() -> tuple[float, float, float]:
            """Return what we say, and the kernel's word and the time in the middle of our asking."""
            before_s, begun_s = run_s(record.pid), loop.time()
            answer = await rig.client.call(methods.CONTAINER_STATS, usage.StatsRequest(names=("burner",)))
            after_s, at_s = run_s(record.pid), (begun_s + loop.time()) / 2
            found = figures_of(record, pod, answer.containers[0])
            assert found is not None
            families = converter.take_local(found, at_s=at_s, now_ns=rig.world.clock.now_ns())
            return used_s(families), (before_s + after_s) / 2, at_s

        first = await look()
        await asyncio.sleep(BURN_S)  # what is measured is time
        last = await look()
    used, truth, passed = (after - before for after, before in zip(last, first, strict=True))
    assert truth > 0.1 * BURN_S, "the machine is too busy for the burner to run at all"
    assert used == pytest.approx(truth, rel=TOLERANCE)
    row = converter.rates.rows([Entry(record.id, pod)], loop.time())[0]
    assert row.cpu_cores == pytest.approx(truth / passed, rel=TOLERANCE)


@pytest.mark.row("T17")
@pytest.mark.timeout(400)
async def test_a_guest(host_world: World, folder: str) -> None:
    """The shim's text through reader and converter, against /proc/stat as the guest itself reads it."""
    if missing := missing_for_vms():
        pytest.skip(missing)
    backend = HostBackend(host_world, folder)
    backend.more_environment = {
        "ISOPOD_VM_MONITOR_ROOT": f"{folder}/sbs",
        "ISOPOD_VM_ACCELERATOR": "tcg",
        "ISOPOD_VM_TEMPLATES_MAX": "0",
    }
    converter = Converter()
    client = HttpClient(host_world)
    loop = asyncio.get_running_loop()
    try:
        async with VmRig(backend, "isopodp") as rig:
            record = await rig.run_detached(*BURN, name="burner")
            pod = pod_of(record, wanted((), ()))
            target = Target(record.id, "go", f"{folder}/sbs/{record.id}/shim-monitor.sock")

            async def look() -> Look:
                """Ask until the guest, which has no time to spare, answers its shim."""
                while True:
                    before_s = guest_s((await rig.exec("burner", "cat", "/proc/stat")).stdout)
                    answer = await client.request("GET", "http://shim/metrics", address=UnixAddress(target.socket))
                    reading = core.read(await answer.read(), kata_labels(target.id, pod), core.Rules(), WANTED)
                    if "kata_guest_cpu_time" in reading.values:
                        break
                    await asyncio.sleep(FRESH_S)
                after_s = guest_s((await rig.exec("burner", "cat", "/proc/stat")).stdout)
                families = converter.take(target, reading.values, pod, at_s=loop.time(), now_ns=host_world.clock.now_ns())
                items = {item: value for (cpu, item), value in reading.values["kata_guest_cpu_time"] if cpu == "total"}
                return Look(used_s(families), sum(items[item] for item in STATES) / 1000, before_s, after_s)

            async with asyncio.timeout(300):
                first = await look()
                await asyncio.sleep(2 * BURN_S)  # what is measured is time
                last = await look()
    finally:
        await client.close()
    used, passed = last.used_s - first.used_s, last.passed_s - first.passed_s
    assert passed > BURN_S
    assert used / passed == pytest.approx(1.0, rel=TOLERANCE), "its one CPU did nothing but burn"
    assert (1 - TOLERANCE) * (last.before_s - first.after_s) <= used <= (1 + TOLERANCE) * (last.after_s - first.before_s)


class Look(NamedTuple):
    """What a shim says at a moment, and its guest before and after that.

    Args:
        used_s: CPU time, as it is scraped.
        passed_s: All of the CPU's time, used or not, of the same answer.
        before_s: CPU time as the guest reads it before.
        after_s: The same, after.
    """

    used_s: float
    passed_s: float
    before_s: float
    after_s: float


def run_s(pid: int | None) -> float:
    """Return how long a process has run: /proc/PID/schedstat, proc(5)."""
    with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:
        return int(file.read().split()[0]) / 1e9


def guest_s(stat: bytes) -> float:
    """Return how long a guest's CPUs were used: /proc/stat, in ticks of a hundredth."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split(b"\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / 100
