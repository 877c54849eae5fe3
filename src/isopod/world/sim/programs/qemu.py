"""The simulated /usr/bin/qemu-system-x86_64, in the behaviour of QEMU 7.2 as isopod uses it.

It reads the arguments that isopod's driver makes (machine, accelerator, memory, processors, kernel, drives, taps, shares, character
devices that are descriptors, -incoming), opens what they name, and ends with QEMU's words and status 1 where that fails. Then it emulates
a machine: `guest`. With -no-reboot a reset ends it as a power-off does, with status 0. A snapshot is a migration into a shell command that
is `cat` into a file; the machine must be stopped for it to be of use, as nothing here copies memory that still changes.

Legal behaviours: seeded delays; what all guests of the machine are given is bounded by its memory. Faults: `vm_faults`. Not modelled:
devices that come or go while it runs, more than one migration channel, block jobs.
"""

import asyncio
import errno
import functools
import os
from collections.abc import Mapping
from typing import Any, Final

from isopod.world.sim.machine import Machine
from isopod.world.sim.pipes import open_pipe
from isopod.world.sim.programs.guest import Guest, How
from isopod.world.sim.programs.guest_state import BadSnapshot, Saved, decode, encode, encode_memory
from isopod.world.sim.programs.hardware import Wire
from isopod.world.sim.programs.qemu_arguments import (
    Exit,
    Options,
    agent_chardev,
    chardevs_of,
    commands_of,
    hardware_of,
    has_device,
    memory_file,
    monitor_chardev,
    parse,
    serial_chardev,
)
from isopod.world.sim.programs.qmp import Qmp, QmpError
from isopod.world.sim.programs.sockets import Backlog
from isopod.world.sim.programs.stdio import write_error, write_out
from isopod.world.sim.table import SIGKILL, SimProcess
from isopod.world.sim.view import fail

VERSION: Final = b"QEMU emulator version 7.2.22 (simulated)\n"
OVERHEAD_BYTES: Final = 18 << 20
_TOUCHED: Final = 0.4
"""The part of its memory that a booted guest has touched."""
_START_S: Final = (0.03, 0.08)
_LOAD_S: Final = (0.03, 0.08)
_SAVE_S: Final = (0.05, 0.2)
_UNSEEN: Final = 0.5
"""The chance that QEMU is content although the shell it wrote to failed: the pipe had room for everything."""
_GUEST_PAGES_AT: Final = 1 << 20
"""Where in a file of its memory a guest's own pages are."""
_CAPABILITIES: Final = ("events", "x-ignore-shared", "multifd", "xbzrle", "compress", "auto-converge", "postcopy-ram")
_BOOT_CPU_NS: Final = {"tcg": 1_600_000_000, "kvm": 150_000_000}


async def qemu(machine: Machine, process: SimProcess) -> int:
    """Be QEMU."""
    try:
        options = parse(process.argv[1:])
        if {"-version", "--version"} & set(options.flags):
            await write_out(process, VERSION)
            return 0
        await asyncio.sleep(machine.chance.uniform(*_START_S))
        return await _Monitor(machine, process, options).run()
    except Exit as exit_:
        await write_error(process, f"qemu-system-x86_64: {exit_}\n".encode())
    except OSError as error:
        await write_error(process, f"qemu-system-x86_64: {error.filename}: {os.strerror(error.errno or errno.EIO)}\n".encode())
    return 1


class _Monitor:
    """One run."""

    def __init__(self, machine: Machine, process: SimProcess, options: Options) -> None:
        self._machine = machine
        self._process = process
        self._options = options
        self._faults = machine.vms.draw()
        self._hardware = hardware_of(options, process.cwd)
        self._status = "prelaunch"
        self._migration: dict[str, Any] = {}
        self._saved: Saved | None = None
        self._capabilities: dict[str, None] = {}
        self._quits: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why it ends; "" because it was asked to."""
        self._balloon_bytes = self._hardware.memory_bytes
        self._claim_memory()
        self._check_files()
        self._memory_path = self._map_memory()
        chardevs = chardevs_of(options, process)
        console, agent = chardevs.get(serial_chardev(options)), chardevs.get(agent_chardev(options))
        if options.one("-serial") == "stdio" and process.stdout is not None:
            silence, nobody = open_pipe(process.owner, process.owner)
            nobody.close()
            console = Wire(silence, process.stdout)
        self._guest = Guest(
            machine,
            process,
            self._hardware,
            console=console if isinstance(console, Wire) else None,
            agent=agent if isinstance(agent, Wire) else None,
            faults=self._faults,
        )
        backlog = chardevs.get(monitor_chardev(options))
        self._qmp = Qmp(backlog if isinstance(backlog, Backlog) else Backlog(), self._commands(), faults=self._faults, clock=machine.clock)

    async def run(self) -> int:
        """Emulate until the guest or somebody ends it."""
        loop = self._machine.loop
        loop.create_task(self._qmp.serve())
        if "dies" in self._faults:
            loop.call_later(self._faults.after_s, self._machine.table.end, self._process, -SIGKILL)
        self._machine.table.charge_memory(self._process, OVERHEAD_BYTES + int(self._hardware.memory_bytes * _TOUCHED))
        incoming = self._options.one("-incoming")
        if incoming:
            self._status = "inmigrate"
            if incoming != "defer":
                loop.create_task(self._load(incoming))
        elif "-S" not in self._options.flags:
            self._begin(None)
            self._status = "running"
        how = await self._end()
        self._qmp.event("SHUTDOWN", {"guest": not self._quits.done(), "reason": "guest-reset" if how == "reset" else "guest-shutdown"})
        await asyncio.sleep(1e-3)
        return 0

    async def _end(self) -> How | None:
        """Wait for the guest's end or `quit`; return how the guest ended."""
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for each in (self._guest.ended, self._quits):
            each.add_done_callback(lambda _: None if first.done() else first.set_result(None))
        await first
        if not self._quits.done():
            return self._guest.ended.result()
        if why := self._quits.result():
            raise Exit(why)
        return None

    def _begin(self, saved: Saved | None) -> None:
        self._guest.start(saved)
        if self._process.group is not None and saved is None:
            self._process.group.cpu_usage_ns += _BOOT_CPU_NS[self._hardware.accelerator]

    def _map_memory(self) -> str:
        """Return the file that is the guest's memory, made if it is missing; "" if there is none. ENOSPC."""
        path = memory_file(self._options).get("mem-path", "")
        if path:
            inode = self._machine.view.open_file(path, create_mode=0o600)
            if not inode.content.size:
                inode.resize(self._hardware.memory_bytes)
            elif inode.content.size < self._hardware.memory_bytes:
                raise Exit(f"backing store size 0x{inode.content.size:x} does not match 'size' option")
        return path

    def _claim_memory(self) -> None:
        claimed = sum(each.claimed_bytes for each in self._machine.table.live() if each is not self._process)
        wanted = self._hardware.memory_bytes
        if "no_memory" in self._faults or claimed + wanted > self._machine.kernel.facts.memory_bytes:
            raise Exit("cannot set up guest memory 'ram': Cannot allocate memory")
        self._process.claimed_bytes = wanted

    def _check_files(self) -> None:
        """Open what the arguments name, as far as it is files and taps."""
        if self._hardware.accelerator == "kvm" and self._machine.vms.kvm == "absent":
            raise Exit("Could not access KVM kernel module: No such file or directory\nqemu-system-x86_64: failed to initialize kvm")
        for path in (self._hardware.kernel, self._hardware.initrd):
            if path and self._machine.view.find(path) is None:
                raise Exit(f"could not open kernel file '{path}': No such file or directory")
        for drive in self._hardware.drives:
            node = self._machine.view.find(drive.path)
            if node is None or node.inode.kind != "file":
                raise Exit(f"-drive file={drive.path}: Could not open '{drive.path}': No such file or directory")
        for share in self._hardware.shares:
            served = self._machine.shares.get(share.socket)
            if served is None:
                raise Exit(f"-chardev socket,path={share.socket}: Failed to connect to '{share.socket}': No such file or directory")
            self._process.on_exit.append(functools.partial(self._machine.table.end, served.process, 0))

    # -- snapshots -------------------------------------------------------------------------------------------------------------------

    async def _load(self, uri: str) -> None:
        """Go on from a snapshot; QEMU ends if it cannot."""
        await asyncio.sleep(self._machine.chance.uniform(*_LOAD_S))
        self._tell_migration("active")
        try:
            memory = self._read(self._memory_path, _GUEST_PAGES_AT) if self._memory_path else None
            snapshot = decode(self._shell(uri), self._hardware.shape(), memory)
        except (BadSnapshot, OSError) as error:
            self._fail(f"{error}\nqemu-system-x86_64: load of migration failed: Invalid argument")
            return
        self._saved, self._status = snapshot.saved, "paused"
        if snapshot.was_running:
            await self._cont({})
        self._tell_migration("completed")

    def _fail(self, why: str) -> None:
        if not self._quits.done():
            self._quits.set_result(why)

    async def _migrate_incoming(self, arguments: Mapping[str, Any]) -> object:
        if self._status != "inmigrate":
            raise QmpError("'-incoming' was not specified on the command line")
        self._machine.loop.create_task(self._load(str(arguments["uri"])))
        return {}

    async def _migrate(self, arguments: Mapping[str, Any]) -> object:
        if self._migration.get("status") == "active":
            raise QmpError("There's a migration process in progress")
        self._tell_migration("setup")
        self._migration = {"status": "active"}
        self._machine.loop.create_task(self._save(str(arguments["uri"])))
        return {}

    async def _save(self, uri: str) -> None:
        """Stop the machine and write down what it is."""
        self._tell_migration("active")
        was_running, apart = self._status == "running", "x-ignore-shared" in self._capabilities and bool(self._memory_path)
        if was_running:
            await self._stop({})
        saved = self._guest.save()
        data = encode(saved, self._hardware.shape(), was_running=was_running, apart=apart)
        await asyncio.sleep(self._machine.chance.uniform(*_SAVE_S))
        try:
            if "migration_fails" in self._faults:
                fail(errno.EPIPE, uri)
            if apart:
                self._machine.view.open_file(self._memory_path).write_at(_GUEST_PAGES_AT, encode_memory(saved))
            self._shell(uri, data)
        except OSError as error:
            if "migration_fails" in self._faults or self._machine.chance.random() >= _UNSEEN:
                why = f"Unable to write to command: {os.strerror(error.errno or errno.EIO)}"
                self._migration = {"status": "failed", "error-desc": why}
                self._tell_migration("failed")
                if was_running:
                    await self._cont({})
                return
        self._status = "postmigrate"
        self._migration = {
            "status": "completed",
            "total-time": 120,
            "ram": {"transferred": len(data), "total": self._hardware.memory_bytes},
        }
        self._tell_migration("completed")

    def _shell(self, uri: str, data: bytes = b"") -> bytes:
        """Run the command behind a migration, of which some words are understood; return what it writes into the stream."""
        out = b""
        view = self._machine.view
        for words in commands_of(uri):
            match words:
                case ["cat", ">", path]:
                    self._write(path, data)
                case ["cat", path] | ["cat", "<", path]:
                    out = self._read(path)
                case ["sync", path]:
                    inode = view.open_file(path)
                    self._machine.disk.sync_inode(inode, inode.content.mark(), path)
                case ["mv", source, target]:
                    view.rename(source, target)
                case _:
                    fail(errno.ENOEXEC, " ".join(words))
        return out

    def _write(self, path: str, data: bytes) -> None:
        if "dies_migrating" in self._faults:
            self._machine.view.write(path, data[: len(data) // 2])
            self._machine.table.end(self._process, -SIGKILL)
            self._process.owner.check()
        self._machine.disk.faults.check("write", path)
        self._machine.view.write(path, data)

    def _read(self, path: str, offset: int = 0) -> bytes:
        inode = self._machine.view.open_file(path)
        self._machine.disk.faults.check_read(inode, path, 0, inode.content.size)
        return inode.content.head()[offset:]

    def _tell_migration(self, status: str) -> None:
        if "events" in self._capabilities:
            self._qmp.event("MIGRATION", {"status": status})

    # -- commands --------------------------------------------------------------------------------------------------------------------

    def _commands(self) -> Mapping[str, Any]:
        return {
            "query-status": self._query_status,
            "stop": self._stop,
            "cont": self._cont,
            "migrate": self._migrate,
            "query-migrate": self._query_migrate,
            "migrate-incoming": self._migrate_incoming,
            "migrate-set-parameters": self._accept,
            "migrate-set-capabilities": self._set_capabilities,
            "migrate_cancel": self._accept,
            "balloon": self._balloon,
            "query-balloon": self._query_balloon,
            "quit": self._quit,
            "system_powerdown": self._accept,
            "input-send-event": self._input,
            "query-version": self._query_version,
            "query-cpus-fast": self._query_cpus,
            "query-name": self._accept,
            "query-blockstats": self._query_blockstats,
        }

    async def _accept(self, _arguments: Mapping[str, Any]) -> object:
        return {}

    async def _set_capabilities(self, arguments: Mapping[str, Any]) -> object:
        for each in arguments["capabilities"]:
            if each["capability"] not in _CAPABILITIES:
                raise QmpError(f"Parameter 'capability' does not accept value '{each['capability']}'")
            if each["state"]:
                self._capabilities[each["capability"]] = None
            else:
                self._capabilities.pop(each["capability"], None)
        return {}

    async def _query_status(self, _arguments: Mapping[str, Any]) -> object:
        return {"status": self._status, "running": self._status == "running", "singlestep": False}

    async def _stop(self, _arguments: Mapping[str, Any]) -> object:
        if self._status == "running":
            self._guest.pause()
            self._status = "paused"
            self._qmp.event("STOP")
        return {}

    async def _cont(self, _arguments: Mapping[str, Any]) -> object:
        if self._status == "inmigrate":
            raise QmpError("Expecting capabilities negotiation or the end of the migration")
        if self._status == "prelaunch" or self._saved is not None:
            saved, self._saved = self._saved, None
            self._begin(saved)
        elif self._status != "running":
            self._guest.resume()
        if self._status != "running":
            self._status = "running"
            self._qmp.event("RESUME")
        return {}

    async def _query_migrate(self, _arguments: Mapping[str, Any]) -> object:
        return self._migration

    async def _balloon(self, arguments: Mapping[str, Any]) -> object:
        if not has_device(self._options, "virtio-balloon"):
            raise QmpError("No balloon device has been activated", "DeviceNotActive")
        self._balloon_bytes = min(int(arguments["value"]), self._hardware.memory_bytes)
        self._qmp.event("BALLOON_CHANGE", {"actual": self._balloon_bytes})
        return {}

    async def _query_balloon(self, _arguments: Mapping[str, Any]) -> object:
        if not has_device(self._options, "virtio-balloon"):
            raise QmpError("No balloon device has been activated", "DeviceNotActive")
        return {"actual": self._balloon_bytes}

    async def _quit(self, _arguments: Mapping[str, Any]) -> object:
        if not self._quits.done():
            asyncio.get_running_loop().call_later(1e-3, self._fail, "")
        return {}

    async def _input(self, arguments: Mapping[str, Any]) -> object:
        keys = {each["data"]["key"]["data"] for each in arguments["events"] if each["data"].get("down")}
        if {"ctrl", "alt", "delete"} <= keys and has_device(self._options, "i8042"):
            self._guest.interrupt()
        return {}

    async def _query_version(self, _arguments: Mapping[str, Any]) -> object:
        return {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "simulated"}

    async def _query_cpus(self, _arguments: Mapping[str, Any]) -> object:
        return [{"cpu-index": number, "thread-id": self._process.pid, "target": "x86_64"} for number in range(self._hardware.n_cpus)]

    async def _query_blockstats(self, _arguments: Mapping[str, Any]) -> object:
        counts = {"rd_bytes": 0, "wr_bytes": 0, "rd_operations": 0, "wr_operations": 0, "flush_operations": 0}
        return [{"device": each.serial, "stats": counts} for each in self._hardware.drives]
