"""Taps of the host, and what a port of a bridge may do: ioctls of /dev/net/tun and rtnetlink, from Python.

A tap is made persistent and closed again: it stays until it is deleted, and whoever opens it later (the VMM's starter) is its other end.
A link's rate is kept by its root queue, a token bucket (TBF): what is too fast waits, for a tenth of a second or so, and only then is lost.
Sources: Documentation/networking/tuntap.rst, rtnetlink(7), tc-tbf(8), include/uapi/linux/{if_tun,if_link,pkt_sched}.h.
"""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable
from typing import Final

TUN_DEVICE: Final = "/dev/net/tun"
NAME_BYTES_MAX: Final = 15
BURST_BYTES_MIN: Final = 16 << 10
BURST_BYTES_MAX: Final = 4 << 20
BURSTS_PER_S: Final = 50
"""A bucket holds what may be sent in a fiftieth of a second, within the two bounds above."""
QUEUE_BYTES_MIN: Final = 32 << 10
QUEUES_PER_S: Final = 10
ANSWER_S: Final = 10.0

_TUNSETIFF: Final = 0x400454CA
_TUNSETPERSIST: Final = 0x400454CB
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_RTM_NEWLINK, _RTM_SETLINK, _RTM_NEWQDISC, _RTM_DELQDISC = 16, 19, 36, 37
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_REPLACE, _NLM_F_CREATE = 0x1, 0x4, 0x100, 0x400
_NLMSG_ERROR: Final = 2
_IFLA_MASTER, _IFLA_PROTINFO, _IFLA_BRPORT_MODE = 10, 12, 4
_NLA_F_NESTED: Final = 0x8000
_IFF_UP: Final = 1
_AF_BRIDGE: Final = 7
_TC_H_ROOT: Final = 0xFFFF_FFFF
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_TBF_PARMS, _TCA_TBF_RATE64, _TCA_TBF_BURST = 1, 4, 6
_LINKLAYER_ETHERNET: Final = 1
_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_LINK: Final = struct.Struct("=BxHiII")
_QDISC: Final = struct.Struct("=BxxxiIII")
_RATE: Final = struct.Struct("=BBHhHI")


def create_tap(name: str, bridge: str) -> None:
    """Make a persistent tap with virtio headers, up, a port of `bridge`. On failure none stays.

    Raises:
        OSError: EEXIST: the name is taken. ENODEV: no such bridge. ERANGE: the name is too long.
    """
    if not 0 < len(name.encode()) <= NAME_BYTES_MAX:
        raise OSError(errno.ERANGE, os.strerror(errno.ERANGE), name)
    if _exists(name):  # the device would be opened instead
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
    master = _index(bridge)
    fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
        link = _LINK.pack(0, 0, _index(name), _IFF_UP, _IFF_UP) + _attribute(_IFLA_MASTER, struct.pack("=I", master))
        _request(_RTM_NEWLINK, 0, link, name)
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    finally:
        os.close(fd)


def limit_link(name: str, bytes_per_s: int | None) -> None:
    """Let the host send through a link at most so much; None takes the limit away.

    Raises:
        OSError: ENODEV: no such link.
    """
    index = _index(name)
    if bytes_per_s is None:
        try:
            _request(_RTM_DELQDISC, 0, _QDISC.pack(0, index, 0, _TC_H_ROOT, 0), name)
        except FileNotFoundError:
            return
        return
    options = _nested(_TCA_OPTIONS, _bucket(bytes_per_s))
    message = _QDISC.pack(0, index, 0, _TC_H_ROOT, 0) + _attribute(_TCA_KIND, b"tbf\0") + options
    _request(_RTM_NEWQDISC, _NLM_F_CREATE | _NLM_F_REPLACE, message, name)


def reflect_link(name: str) -> None:
    """Let the bridge send back through a port what came from it.

    Raises:
        OSError: ENODEV: no such link.
    """
    mode = _nested(_IFLA_PROTINFO | _NLA_F_NESTED, [_attribute(_IFLA_BRPORT_MODE, b"\1")])
    _request(_RTM_SETLINK, 0, _LINK.pack(_AF_BRIDGE, 0, _index(name), 0, 0) + mode, name)


def burst_bytes(bytes_per_s: int) -> int:
    """Return how much may be sent at once after a pause."""
    return max(BURST_BYTES_MIN, min(bytes_per_s // BURSTS_PER_S, BURST_BYTES_MAX))


def _bucket(bytes_per_s: int) -> Iterable[bytes]:
    burst = burst_bytes(bytes_per_s)
    queue = burst + max(bytes_per_s // QUEUES_PER_S, QUEUE_BYTES_MIN)
    rate = _RATE.pack(0, _LINKLAYER_ETHERNET, 0, 0, 0, min(bytes_per_s, 0xFFFF_FFFF))
    yield _attribute(_TCA_TBF_PARMS, rate + bytes(_RATE.size) + struct.pack("=III", queue, 0, 0))
    yield _attribute(_TCA_TBF_RATE64, struct.pack("=Q", bytes_per_s))
    yield _attribute(_TCA_TBF_BURST, struct.pack("=I", burst))


def _exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), name) from error


def _attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4)


def _nested(kind: int, attributes: Iterable[bytes]) -> bytes:
    return _attribute(kind, b"".join(attributes))


def _request(kind: int, flags: int, body: bytes, about: str) -> None:
    """Send one request and wait for its acknowledgement."""
    message = _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_ACK | flags, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.settimeout(ANSWER_S)
        sock.sendto(message, (0, 0))
        answer = sock.recv(1 << 16)
    _, answered, _, _, _ = _HEADER.unpack_from(answer)
    number = struct.unpack_from("=i", answer, _HEADER.size)[0] if answered == _NLMSG_ERROR else -errno.EPROTO
    if number:
        raise OSError(-number, os.strerror(-number), about)
