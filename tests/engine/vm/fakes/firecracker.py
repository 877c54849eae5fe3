"""A fake of Firecracker: its documented interface, without a machine. Run as a program it takes the real one's arguments.

Rules (OpenAPI document and docs/snapshotting of 1.7 and later): nothing is configured after the start; a start needs a boot source; a
snapshot is made of a paused machine only, and loaded only by a process that was told nothing but logger and metrics; drives are changed
only after the start; an id in a path is the one in the body; unknown fields are refused; answers without content are 204.
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from tests.engine.vm.fakes.rules import NO_CONTENT, HostFiles, Refusal, Rules, Shape, check_shape
from tests.engine.vm.fakes.server import bind, serve_forever

VERSION: Final = "1.10.1"
POST_BOOT: Final = "The requested operation is not supported after starting the microVM."
PRE_BOOT: Final = "The requested operation is not supported before starting the microVM."
_DRIVE: Final[Shape] = {
    "drive_id": str,
    "is_root_device": bool,
    "path_on_host?": str,
    "is_read_only?": bool,
    "partuuid?": str,
    "cache_type?": ("Unsafe", "Writeback"),
    "io_engine?": ("Sync", "Async"),
    "socket?": str,
    "rate_limiter?": dict,
}
_INTERFACE: Final[Shape] = {"iface_id": str, "host_dev_name": str, "guest_mac?": str, "rx_rate_limiter?": dict, "tx_rate_limiter?": dict}
_MACHINE: Final[Shape] = {
    "vcpu_count": int,
    "mem_size_mib": int,
    "smt?": bool,
    "cpu_template?": str,
    "track_dirty_pages?": bool,
    "huge_pages?": ("None", "2M"),
}
_LOAD: Final[Shape] = {
    "snapshot_path": str,
    "mem_backend?": {"backend_type": ("File", "Uffd"), "backend_path": str},
    "mem_file_path?": str,
    "enable_diff_snapshots?": bool,
    "track_dirty_pages?": bool,
    "resume_vm?": bool,
    "network_overrides?": [{"iface_id": str, "host_dev_name": str}],
}
_MAC: Final = re.compile(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}")


@dataclass
class FirecrackerRules(Rules):
    """One process."""

    state: str = "Not started"
    was_told: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    drives: dict[str, Any] = field(default_factory=dict)
    interfaces: dict[str, Any] = field(default_factory=dict)

    def words(self, refusal: Refusal) -> Any:
        return {"fault_message": " ".join(refusal.why)}

    async def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if method == "GET":
            return 200, self._told(path, body)
        if method not in ("PUT", "PATCH") or body is None:
            raise Refusal(400, f"Empty {method} request.")
        kind, _, name = path.lstrip("/").partition("/")
        change = getattr(self, f"_{method.lower()}_{kind.replace('-', '_')}", None)
        if change is None:
            raise Refusal(400, f"Invalid request method and/or path: {method} {path}.")
        await change(name, body)
        return NO_CONTENT, None

    def _told(self, path: str, body: Any) -> Any:
        if body is not None:
            raise Refusal(400, "GET request cannot have a body.")
        if path == "/":
            return {"id": "fake", "state": self.state, "vmm_version": VERSION, "app_name": "Firecracker"}
        if path == "/version":
            return {"firecracker_version": VERSION}
        if path == "/machine-config":
            return self.config.get("machine-config", {"vcpu_count": 1, "mem_size_mib": 128})
        if path == "/vm/config":
            return {**self.config, "drives": list(self.drives.values()), "network-interfaces": list(self.interfaces.values())}
        raise Refusal(400, f"Invalid request method and/or path: GET {path}.")

    # --- before the start -----------------------------------------------------------------------------------------------

    def _configure(self, body: Any, shape: Shape) -> None:
        check_shape(body, shape)
        if self.state != "Not started":
            raise Refusal(400, POST_BOOT)
        self.was_told = True

    async def _put_machine_config(self, name: str, body: Any) -> None:
        self._configure(body, _MACHINE)
        if not 1 <= body["vcpu_count"] <= 32:
            raise Refusal(400, "The vCPU number is invalid! The vCPU number can only be 1 or an even number when SMT is enabled.")
        if body["mem_size_mib"] < 1:
            raise Refusal(400, "The memory size (MiB) is invalid.")
        self.config["machine-config"] = body

    async def _put_boot_source(self, name: str, body: Any) -> None:
        self._configure(body, {"kernel_image_path": str, "initrd_path?": str, "boot_args?": str})
        await self._need_file(body["kernel_image_path"], "The kernel file cannot be opened")
        if "initrd_path" in body:
            await self._need_file(body["initrd_path"], "The initrd file cannot be opened")
        self.config["boot-source"] = body

    async def _put_drives(self, name: str, body: Any) -> None:
        _same_id(name, str(body.get("drive_id") if isinstance(body, dict) else ""))
        self._configure(body, _DRIVE)
        await self._need_file(body.get("path_on_host", ""), "Unable to create the virtio block device")
        self.drives[name] = body

    async def _put_network_interfaces(self, name: str, body: Any) -> None:
        _same_id(name, str(body.get("iface_id") if isinstance(body, dict) else ""))
        self._configure(body, _INTERFACE)
        if "guest_mac" in body and not _MAC.fullmatch(body["guest_mac"]):
            raise Refusal(400, f"invalid MAC address {body['guest_mac']}")
        taken = [each["iface_id"] for each in self.interfaces.values() if each["host_dev_name"] == body["host_dev_name"]]
        if taken not in ([], [name]):
            raise Refusal(400, f"Could not create the network device: Open tap device failed: Resource busy: {body['host_dev_name']}")
        self.interfaces[name] = body

    async def _put_entropy(self, name: str, body: Any) -> None:
        self._configure(body, {"rate_limiter?": dict})
        self.config["entropy"] = body

    async def _put_vsock(self, name: str, body: Any) -> None:
        self._configure(body, {"guest_cid": int, "uds_path": str, "vsock_id?": str})
        if body["guest_cid"] < 3:
            raise Refusal(400, "guest_cid must be at least 3")
        self.config["vsock"] = body

    async def _put_logger(self, name: str, body: Any) -> None:
        check_shape(body, {"log_path?": str, "level?": str, "show_level?": bool, "show_log_origin?": bool, "module?": str})
        if self.state != "Not started":
            raise Refusal(400, POST_BOOT)

    async def _put_actions(self, name: str, body: Any) -> None:
        check_shape(body, {"action_type": ("InstanceStart", "SendCtrlAltDel", "FlushMetrics")})
        if body["action_type"] == "InstanceStart":
            if self.state != "Not started":
                raise Refusal(400, POST_BOOT)
            if "boot-source" not in self.config:
                raise Refusal(400, "Cannot start microvm without kernel configuration.")
            self.state = "Running"
        elif self.state == "Not started":
            raise Refusal(400, PRE_BOOT)
        elif body["action_type"] == "SendCtrlAltDel":
            self.has_ended = True  # the guest reboots, which ends the process

    # --- after it -------------------------------------------------------------------------------------------------------

    async def _patch_vm(self, name: str, body: Any) -> None:
        check_shape(body, {"state": ("Paused", "Resumed")})
        if self.state == "Not started":
            raise Refusal(400, PRE_BOOT)
        self.state = "Paused" if body["state"] == "Paused" else "Running"

    async def _patch_drives(self, name: str, body: Any) -> None:
        check_shape(body, {"drive_id": str, "path_on_host?": str, "rate_limiter?": dict})
        _same_id(name, body["drive_id"])
        if self.state == "Not started":
            raise Refusal(400, PRE_BOOT)
        if name not in self.drives:
            raise Refusal(400, f"Unable to patch the block device: Invalid block device ID: {name}")
        if "path_on_host" in body:
            await self._need_file(body["path_on_host"], "Unable to patch the block device")
            self.drives[name] = {**self.drives[name], "path_on_host": body["path_on_host"]}

    async def _put_snapshot(self, name: str, body: Any) -> None:
        if name == "create":
            await self._create(body)
        elif name == "load":
            await self._load(body)
        else:
            raise Refusal(400, f"Invalid request method and/or path: PUT /snapshot/{name}.")

    async def _create(self, body: Any) -> None:
        check_shape(body, {"snapshot_path": str, "mem_file_path": str, "snapshot_type?": ("Full", "Diff")})
        if self.state == "Not started":
            raise Refusal(400, PRE_BOOT)
        if self.state != "Paused":
            raise Refusal(400, "Create snapshot error: Cannot save the microVM state: it is not paused")
        state = {"config": self.config, "drives": self.drives, "interfaces": self.interfaces}
        await self.files.write(body["snapshot_path"], msgspec.json.encode(state))
        await self.files.write(body["mem_file_path"], b"memory")

    async def _load(self, body: Any) -> None:
        check_shape(body, _LOAD)
        if ("mem_backend" in body) == ("mem_file_path" in body):
            raise Refusal(400, "either `mem_backend` or `mem_file_path` is required")
        if self.state != "Not started":
            raise Refusal(400, POST_BOOT)
        if self.was_told:
            raise Refusal(400, "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.")
        data = await self.files.read(body["snapshot_path"])
        memory = body.get("mem_file_path") or body["mem_backend"]["backend_path"]
        if data is None or await self.files.read(memory) is None:
            raise self._fatal("Failed to open snapshot file: No such file or directory (os error 2)")
        try:
            loaded = msgspec.json.decode(data)
        except msgspec.DecodeError:
            raise self._fatal("Failed to restore devices: CRC64 validation failed") from None
        self.config, self.drives, self.interfaces = loaded["config"], loaded["drives"], loaded["interfaces"]
        for override in body.get("network_overrides", []):
            if override["iface_id"] not in self.interfaces:
                raise self._fatal(f"Unknown Network Device: {override['iface_id']}")
            self.interfaces[override["iface_id"]]["host_dev_name"] = override["host_dev_name"]
        for drive in self.drives.values():
            await self._need_file(drive["path_on_host"], "Failed to restore devices")
        self.state = "Running" if body.get("resume_vm") else "Paused"

    def _fatal(self, why: str) -> Refusal:
        """A load that failed ends the process."""
        self.has_ended = True
        return Refusal(400, f"Load snapshot error: Failed to restore from snapshot: {why}")

    async def _need_file(self, path: str, why: str) -> None:
        if not path or await self.files.read(path) is None:
            raise Refusal(400, f"{why}: No such file or directory (os error 2): {path}")


def _same_id(from_path: str, from_body: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_]+", from_path):
        raise Refusal(400, "API Resource IDs can only contain alphanumeric characters and underscores.")
    if from_path != from_body:
        raise Refusal(400, "The id from the path does not match the id from the body!")


def main() -> int:
    parser = argparse.ArgumentParser(prog="firecracker", allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--api-sock", default="/run/firecracker.socket")
    parser.add_argument("--id", default="anonymous-instance")
    parser.add_argument("--level", choices=("Error", "Warning", "Info", "Debug"), default="Warning")
    given = parser.parse_args()
    if given.version:
        sys.stdout.write(f"Firecracker v{VERSION}\n")
        return 0
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", given.id):
        sys.stderr.write(f"Invalid instance ID: {given.id}\n")
        return 1
    if os.path.exists(given.api_sock):
        sys.stderr.write(f"Failed to open the API socket at: {given.api_sock}. Check that it is not already used.\n")
        return 1
    serve_forever(FirecrackerRules(HostFiles()), bind(given.api_sock))
    return 0


if __name__ == "__main__":
    sys.exit(main())
