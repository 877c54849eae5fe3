"""A guest behind a tap, as a program: `guest.py TAP MAC ADDRESS/PREFIX GATEWAY`, started with the tap's network as its own.

It opens the tap as a virtual machine's monitor does, goes into a network namespace of its own, makes a tap there that looks like a network
card to the kernel, and hands frames from one to the other, virtio headers and all. So the guest has a real TCP/IP stack, and whoever
enters its namespace can send any frame at all. It ends with its standard input.
"""

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys

CLONE_NEWNET = 0x4000_0000
TUNSETIFF = 0x400454CA
TAP_NO_PI_VNET_HDR = 0x0002 | 0x1000 | 0x4000
FRAME_BYTES_MAX = 70_000


def open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_NO_PI_VNET_HDR))
    return fd


def pump(one: int, other: int) -> None:
    """Hand frames over until standard input ends."""
    to = {one: other, other: one}
    while True:
        ready, _, _ = select.select([0, one, other], [], [])
        if 0 in ready:
            return
        for fd in ready:
            for _ in range(64):
                try:
                    os.write(to[fd], os.read(fd, FRAME_BYTES_MAX))
                except BlockingIOError:
                    break


def main(tap: str, mac: str, address: str, gateway: str) -> None:
    outer = open_tap(tap)
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    inner = open_tap("eth0")
    for words in (
        "link set lo up",
        f"link set eth0 address {mac} up",
        f"address add {address} dev eth0",
        f"route add default via {gateway}",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    print(os.getpid(), flush=True)  # noqa: T201 - it is a program, and this its answer
    pump(outer, inner)


if __name__ == "__main__":
    main(*sys.argv[1:])
