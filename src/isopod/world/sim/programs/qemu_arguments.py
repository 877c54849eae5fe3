"""The arguments of the simulated QEMU, as isopod's driver makes them: what machine they describe, and which are no arguments at all.

Source: qemu-system-x86_64(1), 7.2.
"""

import errno
import shlex
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from isopod.world.sim.programs.hardware import Drive, Hardware, ShareDevice
from isopod.world.sim.table import SimProcess
from isopod.world.sim.view import fail

_FLAGS: Final = (
    "-nodefaults",
    "-no-user-config",
    "-nographic",
    "-no-reboot",
    "-no-shutdown",
    "-S",
    "-version",
    "--version",
    "-no-acpi",
    "-enable-kvm",
)
_VALUES: Final = (
    *(
        "-M",
        "-machine",
        "-accel",
        "-cpu",
        "-m",
        "-smp",
        "-kernel",
        "-initrd",
        "-append",
        "-chardev",
        "-serial",
        "-device",
        "-drive",
        "-blockdev",
    ),
    *("-netdev", "-qmp", "-mon", "-object", "-numa", "-name", "-uuid", "-display", "-monitor", "-incoming", "-pidfile", "-sandbox", "-rtc"),
    *("-global", "-vga", "-parallel", "-msg", "-overcommit", "-bios", "-D", "-d", "-fsdev", "-nic", "-net", "-add-fd", "-runas", "-smbios"),
)
_SIZES: Final = {"": 1 << 20, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Exit(Exception):
    """QEMU ends with words on standard error."""


class Options(NamedTuple):
    """Its arguments."""

    flags: tuple[str, ...]
    values: Mapping[str, Sequence[str]]

    def one(self, *names: str) -> str:
        """Return the last value of an option, under any of its names."""
        return next((self.values[name][-1] for name in names if name in self.values), "")

    def all(self, name: str) -> Sequence[str]:
        """Return the values of an option."""
        return self.values.get(name, [])


def parse(arguments: Sequence[str]) -> Options:
    """Read the arguments. Raises Exit for what is none."""
    flags: list[str] = []
    values: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in _FLAGS:
            flags.append(word)
        elif word in _VALUES:
            if not rest:
                raise Exit(f"{word}: requires an argument")
            values.setdefault(word, []).append(rest.pop(0))
        else:
            raise Exit(f"{word}: invalid option")
    return Options(tuple(flags), values)


def _pairs(text: str) -> dict[str, str]:
    """Read "kind,key=value,..."; the kind is under ""."""
    parts = text.replace(",,", "\0").split(",")
    pairs = [part.replace("\0", ",").partition("=") for part in parts]
    first = {} if pairs[0][1] else {"": pairs[0][0]}
    return first | {key: value if equals else "on" for key, equals, value in (pairs if pairs[0][1] else pairs[1:])}


def hardware_of(options: Options, cwd: str) -> Hardware:
    """Return the machine that they describe; paths of sockets begin at `cwd`."""
    accelerator = "kvm" if options.one("-accel").startswith("kvm") or "-enable-kvm" in options.flags else "tcg"
    drives = {}
    for text in (*options.all("-drive"), *options.all("-blockdev")):
        pairs = _pairs(text)
        drives[pairs.get("id") or pairs.get("node-name", "")] = pairs
    devices = [_pairs(text) for text in options.all("-device")]
    chardevs = {pairs.get("id", ""): pairs for pairs in map(_pairs, options.all("-chardev"))}
    disks = []
    for pairs in devices:
        if pairs[""].startswith("virtio-blk"):
            drive = drives.get(pairs.get("drive", ""))
            if drive is None:
                raise Exit(f"-device {pairs['']}: Property 'drive' can't find value '{pairs.get('drive')}'")
            path = drive.get("file") or drive.get("filename") or drive.get("file.filename", "")
            read_only = drive.get("read-only", drive.get("readonly", "off")) == "on"
            disks.append(Drive(path, pairs.get("serial", ""), read_only))
    return Hardware(
        memory_bytes=_memory(options.one("-m")),
        n_cpus=int(_pairs(options.one("-smp") or "1").get("", "") or _pairs(options.one("-smp")).get("cpus", "1")),
        accelerator=accelerator,
        kernel=options.one("-kernel"),
        initrd=options.one("-initrd"),
        cmdline=tuple(options.one("-append").split()),
        drives=tuple(disks),
        macs=tuple(pairs.get("mac", "52:54:00:12:34:56") for pairs in devices if pairs[""].startswith("virtio-net")),
        shares=tuple(
            ShareDevice(pairs["tag"], _absolute(cwd, chardevs[pairs["chardev"]].get("path", "")))
            for pairs in devices
            if pairs[""].startswith("vhost-user-fs")
        ),
        has_agent_port=any(pairs[""].startswith("virtserialport") for pairs in devices),
    )


def _absolute(cwd: str, path: str) -> str:
    return path if path.startswith("/") else f"{cwd}/{path}"


def _memory(text: str) -> int:
    size = _pairs(text or "128").get("", "") or _pairs(text).get("size", "128")
    digits = size.rstrip("KMGTkmgtB")
    return int(digits) * _SIZES[size[len(digits) :].upper().removesuffix("B")]


def chardevs_of(options: Options, process: SimProcess) -> dict[str, object]:
    """Return what each character device is connected to."""
    found: dict[str, object] = {}
    for pairs in map(_pairs, options.all("-chardev")):
        if "fd" in pairs:
            number = int(pairs["fd"])
            if number not in process.descriptors:
                raise Exit(f"-chardev {pairs['']},fd={number}: File descriptor '{number}' is not valid: Bad file descriptor")
            found[pairs.get("id", "")] = process.descriptors[number]
    for pairs in map(_pairs, options.all("-netdev")):
        number = int(pairs.get("fd", "-1"))
        if "fd" in pairs and number not in process.descriptors:
            raise Exit(f"-netdev tap,fd={number}: Unable to query TUNGETIFF on FD {number}: Bad file descriptor")
    return found


def serial_chardev(options: Options) -> str:
    """Return the name of what the serial line is connected to."""
    return options.one("-serial").removeprefix("chardev:")


def agent_chardev(options: Options) -> str:
    """Return the name of what the agent's port is connected to."""
    return next((pairs["chardev"] for pairs in map(_pairs, options.all("-device")) if pairs[""].startswith("virtserialport")), "-")


def monitor_chardev(options: Options) -> str:
    """Return the name of what the control socket is."""
    return next(
        (pairs.get("chardev") or pairs.get("", "") for pairs in map(_pairs, options.all("-mon"))),
        options.one("-qmp").removeprefix("chardev:"),
    )


def has_device(options: Options, kind: str) -> bool:
    """Return whether there is a device whose name begins so."""
    return any(_pairs(text)[""].startswith(kind) for text in options.all("-device"))


def commands_of(uri: str) -> list[list[str]]:
    """Return the words of the commands behind "exec:A && B", or of reading or writing a file behind "file:"."""
    if not uri.startswith("exec:"):
        fail(errno.EINVAL, f"unknown migration protocol: {uri}")
    lexer = shlex.shlex(uri.removeprefix("exec:"), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


def memory_file(options: Options) -> dict[str, str]:
    """Return the memory backend that is a file, {} if there is none."""
    objects = (_pairs(text) for text in options.all("-object"))
    return next((pairs for pairs in objects if pairs[""] == "memory-backend-file"), {})
