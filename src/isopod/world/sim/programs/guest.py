"""The simulated guest: a kernel that boots in virtual time, and isopod's agent as its first process.

The guest is a process of the machine's table beside its monitor, owner of the agent's tasks and first of a pid namespace of its own: it
ends with the monitor, and everything in the guest with it. Commands are the ones that run in simulated containers, in a world that the
agent made (`guest_world`). Outside of the guest nobody finds its processes.

Legal behaviours: a boot takes a seeded time, longer without KVM; a guest that goes on from a snapshot speaks at once; what it wrote and
did not sync is lost when it is killed (`guest_disks`). Faults: `vm_faults`. Not modelled: packets, job control, more than one processor's
time; where in its code a command of a snapshot was: after a restore it begins anew, under its old number, with the files as they were.
"""

import asyncio
import signal
from contextlib import suppress
from typing import Final, Literal

from isopod.world.sim.machine import Machine
from isopod.world.sim.programs.frames import Frame, Kind
from isopod.world.sim.programs.guest_agent import AGENT, GuestAgent
from isopod.world.sim.programs.guest_state import Saved
from isopod.world.sim.programs.guest_world import RELEASE, GuestWorld
from isopod.world.sim.programs.hardware import Hardware, Wire
from isopod.world.sim.table import SIGKILL, SimProcess
from isopod.world.sim.vm_faults import Drawn

How = Literal["poweroff", "reset"]
_BOOT_S: Final = {"tcg": (1.4, 2.2), "kvm": (0.15, 0.3)}
_RESTORE_S: Final = (0.02, 0.05)
_END_S: Final = (0.5e-3, 4e-3)
_GRACE_S: Final = 10.0
"""What the main command gets after ctrl-alt-del."""
_WRITE_BACK_S: Final = 5.0
_FLOOD: Final = (b"[   13.370000] driver: interrupt storm on line 7, " + b"x" * 970 + b"\r\n") * 8
_FLOOD_EVERY_S: Final = 1e-3


class Guest:
    """One guest. Made by the monitor, whose tasks call `pause` and `resume`.

    Args:
        machine: The computer that it runs on.
        monitor: The process that emulates it; its end is the guest's.
        hardware: What it finds.
        console: The guest's side of its serial line.
        agent: Its side of the agent's port, None without one.
        faults: What goes wrong with it.
    """

    def __init__(
        self, machine: Machine, monitor: SimProcess, hardware: Hardware, *, console: Wire | None, agent: Wire | None, faults: Drawn
    ) -> None:
        self.ended: asyncio.Future[How] = machine.loop.create_future()
        self.process = machine.table.add(["[guest]"], {}, "/")
        self._machine = machine
        self._hardware = hardware
        self._console = console
        self._faults = faults
        self._is_stuck = False
        self._world = GuestWorld(machine, hardware, self.process, small_disk="small_disk" in faults)
        self._agent = GuestAgent(machine, self._world, hardware, init=self.process, port=agent, faults=faults)
        self._agent.flush, self._agent.power_off = self._flush, self._power_off
        self._world.on_disk_error = lambda: machine.table.run_in(self.process, self._turn_read_only())
        monitor.inside = self._all
        monitor.on_exit.append(lambda: machine.table.end(self.process, -SIGKILL))

    # -- for the monitor -------------------------------------------------------------------------------------------------------------

    def start(self, saved: Saved | None) -> None:
        """Let it boot, or go on from what was saved."""

        async def body(_: SimProcess) -> int:
            how = await (self._boot() if saved is None else self._go_on(saved))
            if not self.ended.done():
                self.ended.set_result(how)
            return 0

        self._machine.table.run(self.process, body)

    def pause(self) -> None:
        """Stop its processors."""
        for each in self._all():
            self._machine.table.stop(each)

    def resume(self) -> None:
        """Let them go on."""
        for each in self._all() if not self._is_stuck else ():
            self._machine.table.go_on(each)

    def save(self) -> Saved:
        """Return all that its memory holds."""
        return Saved(self._world.state, self._world.pack_upper(), self._world.now_ns())

    def interrupt(self) -> None:
        """Somebody pressed ctrl-alt-del: the agent ends the main command, then the machine, in good order."""
        self._machine.table.run_in(self.process, self._end_in_order())

    # -- its life --------------------------------------------------------------------------------------------------------------------

    async def _boot(self) -> How:
        self._world.state.boot_id = self._machine.chance.randbytes(16).hex()
        self._machine.loop.create_task(self._echo())
        words = " ".join(self._hardware.cmdline)
        await self._print(f"[    0.000000] Linux version {RELEASE} (simulated)\r\n[    0.000000] Command line: {words}\r\n".encode())
        low, high = _BOOT_S[self._hardware.accelerator]
        await asyncio.sleep(self._machine.chance.uniform(low, high) + self._faults.slow_boot_s)
        if self._hardware.accelerator == "kvm" and self._machine.vms.kvm == "hangs":
            return await self.ended
        if not self._hardware.has_agent_port or "panic_at_boot" in self._faults:
            return await self._panic("VFS: Unable to mount root fs on unknown-block(0,0)")
        await self._print(f"[    1.500000] Run /init as init process\r\nisopod-guest {AGENT}\r\n".encode())
        return await self._live()

    async def _go_on(self, saved: Saved) -> How:
        self._machine.loop.create_task(self._echo())
        if saved.is_damaged:
            return await self.ended  # its memory holds nonsense: it does nothing that anybody could see
        self._world.resume(saved.state, saved.upper, saved.now_ns)
        self._agent.begin_again()
        await asyncio.sleep(self._machine.chance.uniform(*_RESTORE_S))
        return await self._live()

    async def _live(self) -> How:
        """Run until the machine ends."""
        for work in (self._agent.serve(), self._write_back(), self._misbehave()):
            self._machine.loop.create_task(work)
        return await self.ended

    async def _misbehave(self) -> None:
        faults = self._faults
        if not faults.names or "no_hello" in faults:
            return
        await asyncio.sleep(faults.after_s)
        if "breaks_frames" in faults:
            await self._agent.send_bytes(b"\xff" * 64)
        if "false_streams" in faults:
            await self._agent.send(Frame(Kind.STDOUT, 4000, b"who asked for this?"))
        if "read_only" in faults:
            await self._turn_read_only()
        if "silent" in faults:
            self._is_stuck = True
            self.pause()
        if "panic_later" in faults:
            await self._panic("Fatal exception in interrupt")
        while "floods_console" in faults:
            await self._print(_FLOOD)
            await asyncio.sleep(_FLOOD_EVERY_S)

    async def _panic(self, why: str) -> How:
        """Stop as a kernel does that cannot go on: with `panic=` on its command line the machine is reset."""
        await self._print(f"[    1.700000] Kernel panic - not syncing: {why}\r\n[    1.700001] Kernel Offset: disabled\r\n".encode())
        for each in self._all()[1:]:
            self._machine.table.stop(each)
        if any(word.startswith("panic=") and word != "panic=0" for word in self._hardware.cmdline) and not self.ended.done():
            self.ended.set_result("reset")
        return await self.ended

    async def _end_in_order(self) -> None:
        main = self._agent.main
        if main is not None and main.process.is_alive:
            self._machine.table.signal(main.process, int(signal.SIGTERM))
            with suppress(TimeoutError):
                async with asyncio.timeout(_GRACE_S):
                    await main.process.wait()
        await self._power_off()

    async def _power_off(self) -> None:
        """Kill everything, unmount, switch the machine off."""
        if "ignores_poweroff" in self._faults:
            return
        for each in self._all()[1:]:
            self._machine.table.signal(each, SIGKILL)
        await asyncio.sleep(self._machine.chance.uniform(*_END_S))
        await self._flush()
        if not self.ended.done():
            self.ended.set_result("poweroff")

    # -- console and disks -----------------------------------------------------------------------------------------------------------

    async def _echo(self) -> None:
        """Show what is typed on the console, as its line discipline does; nobody reads it."""
        while self._console is not None and (data := await self._console.incoming.read()):
            await self._print(data.replace(b"\r", b"\n").replace(b"\n", b"\r\n"))

    async def _print(self, data: bytes) -> None:
        if self._console is not None:
            with suppress(BrokenPipeError):  # nobody looks
                await self._console.outgoing.write(data)

    async def _write_back(self) -> None:
        while True:
            await asyncio.sleep(_WRITE_BACK_S)
            await self._flush()

    async def _flush(self) -> None:
        """Write what changed to the disks; a disk that refuses turns the file system read-only."""
        try:
            self._world.write_back()
        except OSError:
            await self._turn_read_only()

    async def _turn_read_only(self) -> None:
        if self._world.turn_read_only():
            await self._agent.tell({"event": "readonly", "path": "/"})

    def _all(self) -> list[SimProcess]:
        return [each for each in self._world.pids.members if each.is_alive]
