"""A fake of Cloud Hypervisor: its documented interface, without a machine. Run as a program it takes the real one's arguments.

Rules (OpenAPI document, docs/api.md): a machine is created once, before it is booted; states change along Created -> Running <-> Paused;
a snapshot is made of a paused machine, restored where none is, and is paused then; sizes stay within what was set aside; device ids are
unique. A machine that is not there is 404, a body that makes no sense 400, every other failure 500, its causes as a list.
"""

import argparse
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from tests.engine.vm.fakes.rules import NO_CONTENT, HostFiles, Refusal, Rules, Shape, check_shape
from tests.engine.vm.fakes.server import bind, serve_forever

VERSION: Final = "v44.0"
PREFIX: Final = "/api/v1/"
_MODES: Final = ("Off", "Pty", "Tty", "File", "Socket", "Null")
_CONSOLE: Final[Shape] = {"mode": _MODES, "file?": str, "socket?": str, "iommu?": bool}
_CONFIG: Final[Shape] = {
    "cpus?": {"boot_vcpus": int, "max_vcpus": int, "nested?": bool, "topology?": dict, "kvm_hyperv?": bool, "features?": dict},
    "memory?": {
        "size": int,
        "hotplug_size?": int,
        "hotplugged_size?": int,
        "hotplug_method?": ("Acpi", "VirtioMem"),
        "shared?": bool,
        "mergeable?": bool,
        "hugepages?": bool,
        "prefault?": bool,
        "thp?": bool,
    },
    "payload": {"kernel?": str, "initramfs?": str, "cmdline?": str, "firmware?": str},
    "disks?": [
        {
            "path?": str,
            "readonly?": bool,
            "direct?": bool,
            "id?": str,
            "serial?": str,
            "image_type?": ("FlatVmdk", "FixedVhd", "Qcow2", "Raw", "Vhdx", "Unknown"),
            "sparse?": bool,
            "num_queues?": int,
            "queue_size?": int,
        }
    ],
    "net?": [{"tap?": str, "mac?": str, "id?": str, "mtu?": int, "num_queues?": int, "queue_size?": int}],
    "fs?": [{"tag": str, "socket": str, "num_queues": int, "queue_size": int, "id?": str}],
    "rng?": {"src": str, "iommu?": bool},
    "serial?": _CONSOLE,
    "console?": _CONSOLE,
    "vsock?": {"cid": int, "socket": str, "iommu?": bool, "id?": str},
}
_RESTORE: Final[Shape] = {"source_url": str, "prefault?": bool, "resume?": bool}


@dataclass
class CloudHypervisorRules(Rules):
    """One process."""

    config: Any = None
    state: str = ""
    memory_most: int = 0
    """What was set aside at the boot: `memory.size` grows with the machine."""

    async def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        verb = path.removeprefix(PREFIX)
        if verb == path:
            raise Refusal(404, "Not Found")
        if method == "GET" and verb == "vmm.ping":
            return 200, {"version": VERSION, "build_version": VERSION, "pid": os.getpid(), "features": []}
        if method == "GET" and verb == "vm.info":
            self._need_machine()
            return 200, {"config": self.config, "state": self.state, "memory_actual_size": self.config["memory"]["size"]}
        change = getattr(self, "_" + verb.replace(".", "_").replace("-", "_"), None) if method == "PUT" else None
        if change is None:
            raise Refusal(404, "Not Found")
        await change(body)
        return NO_CONTENT, None

    # --- the verbs ------------------------------------------------------------------------------------------------------

    async def _vm_create(self, body: Any) -> None:
        check_shape(body, _CONFIG)
        if self.config is not None:
            raise Refusal(500, "Error from API", "The VM could not be created", "VM is already created")
        self._validate(body)
        self.config, self.state = body, "Created"

    async def _vm_boot(self, body: Any) -> None:
        self._empty(body)
        self._need_machine()
        if self.state != "Created":
            raise Refusal(500, "Error from API", "The VM could not boot", "VM is already created")
        for path in (self.config["payload"].get("kernel"), *(disk.get("path") for disk in self.config.get("disks", []))):
            if not path or await self.files.read(path) is None:
                raise Refusal(500, "Error from API", "The VM could not boot", f"No such file or directory: {path}")
        self.state = "Running"
        memory = self.config["memory"]
        self.memory_most = memory["size"] + memory.get("hotplug_size", 0)

    async def _vm_pause(self, body: Any) -> None:
        self._move(body, "Running", "Paused", "The VM could not be paused")

    async def _vm_resume(self, body: Any) -> None:
        self._move(body, "Paused", "Running", "The VM could not be resumed")

    async def _vm_power_button(self, body: Any) -> None:
        self._move(body, "Running", "Running", "The power button could not be pressed")
        self.has_ended = True  # the guest powers off, which ends the process

    async def _vm_snapshot(self, body: Any) -> None:
        check_shape(body, {"destination_url": str})
        self._need_machine()
        if self.state != "Paused":
            raise Refusal(500, "Error from API", "The VM could not be snapshotted", "the VM is not paused")
        folder = body["destination_url"].removeprefix("file://")
        await self.files.write(f"{folder}/config.json", msgspec.json.encode(self.config))
        await self.files.write(f"{folder}/state.json", msgspec.json.encode({"most": self.memory_most}))
        await self.files.write(f"{folder}/memory-ranges", b"memory")

    async def _vm_restore(self, body: Any) -> None:
        check_shape(body, _RESTORE)
        if self.config is not None:
            raise Refusal(500, "Error from API", "The VM could not be restored", "VM is already created")
        folder = body["source_url"].removeprefix("file://")
        found = [await self.files.read(f"{folder}/{file}") for file in ("config.json", "state.json", "memory-ranges")]
        if found[0] is None or found[1] is None or found[2] is None:
            raise Refusal(500, "Error from API", "The VM could not be restored", "No such file or directory (os error 2)")
        try:
            config, self.memory_most = msgspec.json.decode(found[0]), msgspec.json.decode(found[1])["most"]
        except msgspec.DecodeError:
            raise Refusal(500, "Error from API", "The VM could not be restored", "Error deserialising the snapshot") from None
        check_shape(config, _CONFIG)
        self._validate(config)
        self.config, self.state = config, "Running" if body.get("resume") else "Paused"

    async def _vm_resize(self, body: Any) -> None:
        check_shape(body, {"desired_vcpus?": int, "desired_ram?": int, "desired_balloon?": int})
        self._need_machine()
        cpus, memory = self.config["cpus"], self.config["memory"]
        if not 1 <= body.get("desired_vcpus", 1) <= cpus["max_vcpus"]:
            raise Refusal(500, "Error from API", "The VM could not be resized", "Desired vCPUs exceeds the maximum")
        ram = body.get("desired_ram", memory["size"])
        if ram > self.memory_most or (ram - memory["size"]) % (128 << 20):
            raise Refusal(500, "Error from API", "The VM could not be resized", "Cannot create the region of memory")
        cpus["boot_vcpus"] = body.get("desired_vcpus", cpus["boot_vcpus"])
        memory["size"] = max(ram, memory["size"])

    async def _vmm_shutdown(self, body: Any) -> None:
        self._empty(body)
        self.has_ended = True

    # --- what they share ------------------------------------------------------------------------------------------------

    def _move(self, body: Any, before: str, after: str, why: str) -> None:
        self._empty(body)
        self._need_machine()
        if self.state != before:
            raise Refusal(500, "Error from API", why, f"Invalid state transition: {self.state} to {after}")
        self.state = after

    def _empty(self, body: Any) -> None:
        if body is not None:
            raise Refusal(400, "Bad Request")

    def _need_machine(self) -> None:
        if self.config is None:
            raise Refusal(404, "Error from API", "The VM info is not available", "VM is not created")

    def _validate(self, config: Any) -> None:
        if not config["payload"].get("kernel"):
            raise Refusal(400, "Error from API", "The VM could not be created", "Kernel is missing")
        if config["cpus"]["max_vcpus"] < config["cpus"]["boot_vcpus"]:
            raise Refusal(400, "Error from API", "The VM could not be created", "Max CPUs is lower than boot CPUs")
        if config.get("fs") and not config["memory"].get("shared"):
            raise Refusal(400, "Error from API", "The VM could not be created", "Using vhost-user requires shared memory")
        ids = [each["id"] for kind in ("disks", "net", "fs") for each in config.get(kind, []) if "id" in each]
        if len(ids) != len(set(ids)):
            raise Refusal(409, "Error from API", "The VM could not be created", "Identifier is not unique")
        if config.get("vsock", {}).get("cid", 3) < 3:
            raise Refusal(400, "Error from API", "The VM could not be created", "the vsock's CID is reserved")


def main() -> int:
    parser = argparse.ArgumentParser(prog="cloud-hypervisor", allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--api-socket", default="")
    given = parser.parse_args()
    if given.version:
        sys.stdout.write(f"cloud-hypervisor {VERSION}\n")
        return 0
    kind, _, value = given.api_socket.partition("=")
    if kind == "fd":
        listener = socket.socket(fileno=int(value))
    elif kind == "path":
        listener = bind(value)
    else:
        sys.stderr.write("--api-socket: want path=<path> or fd=<fd>\n")
        return 1
    serve_forever(CloudHypervisorRules(HostFiles()), listener)
    return 0


if __name__ == "__main__":
    sys.exit(main())
