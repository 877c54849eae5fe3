"""The host's shards: child processes, one per processor, made by executing the interpreter anew.

Not by fork(2): a forked child inherits locks that other threads hold, buffers and a loop. A shard is a session of its own, so that a
terminal's Ctrl-C reaches only the process that started it; it inherits three descriptors (its link, standard output and error), and the
module search path. It ends when its link closes, and the kernel kills it if its starter dies while it is too busy to notice.
Sources: sched_setaffinity(2), prctl(2) (PR_SET_PDEATHSIG), unix(7), eventfd(2).
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Final, cast

from isopod.world.errors import InvalidArgument, Unsupported
from isopod.world.host.network import _bind_unix, _unlink_own
from isopod.world.host.processes import HostProcess
from isopod.world.host.resolve import HostResolver
from isopod.world.host.shards_channels import SOCKET_BUFFER_BYTES, RingChannel, SocketpairChannel
from isopod.world.host.shards_link import HostLink, HostPart
from isopod.world.host.shards_topology import read_topology
from isopod.world.host.tcp import bind_tcp
from isopod.world.network import Address, Listener, ProtocolFactory, ServerTls, TcpAddress, TcpOptions, UnixAddress
from isopod.world.processes import ProcessIdentity
from isopod.world.shards import Channel, ChannelSettings, Link, NumaNode, Part, ShardProcess
from isopod.world.tls_stream import securing

ACCEPTS_PER_TURN: Final = 64
ACCEPT_PAUSE_S: Final = 0.1
"""How long accepting rests when the process has no descriptors left: the connections wait in the queue meanwhile."""
_BOOT: Final = "import sys; sys.path[:] = {path!r}; from isopod.world.host.shards_main import main; main({arguments!r})"


class HostShards:
    """`Shards` by processes and sockets."""

    def __init__(self) -> None:
        self._unpinned: set[int] | None = None

    def topology(self) -> Sequence[NumaNode]:
        """See `Shards.topology`."""
        return read_topology()

    def pin(self, cpu: int) -> None:
        """See `Shards.pin`. Threads that run already stay where they were; new ones follow."""
        if self._unpinned is None:
            self._unpinned = os.sched_getaffinity(0)
        os.sched_setaffinity(0, [cpu])

    def unpin(self) -> None:
        """See `Shards.unpin`."""
        if self._unpinned is not None:
            allowed, self._unpinned = self._unpinned, None
            os.sched_setaffinity(0, allowed)

    async def start(self, entry: str, *, name: str, cpu: int | None = None) -> ShardProcess:
        """See `Shards.start`."""
        kind = "asyncio" if isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop) else "uvloop"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            arguments = (entry, theirs.fileno(), os.getpid(), -1 if cpu is None else cpu, kind)
            code = _BOOT.format(path=sys.path, arguments=arguments)
            site = ["-S"] if sys.flags.no_site else []
            argv = [sys.executable, "-I", *site, "-c", code, name]
            process = _spawn(argv, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return _Shard(process, HostLink(ours))

    def pair(self, settings: ChannelSettings) -> tuple[Part, Part]:
        """See `Shards.pair`. The ring needs the Rust core."""
        if settings.kind == "socketpair":
            left, right = _socketpair()
            return HostPart("s", [left]), HostPart("s", [right])
        try:
            return _ring_pair(settings.ring_bytes)
        except ImportError as error:
            if settings.kind == "ring":
                raise Unsupported("the ring channel", f"the Rust core cannot be loaded: {error}", "use channel kind socketpair") from error
            left, right = _socketpair()
            return HostPart("s", [left]), HostPart("s", [right])

    def open_channel(self, part: Part, settings: ChannelSettings, peer: str) -> Channel:
        """See `Shards.open_channel`."""
        letter, fds = _take(part, "srR")
        if letter == "s":
            return SocketpairChannel(_adopted(fds[0]), settings, peer)
        memory_fd, event, peer_event, lifeline = fds
        side = 0 if letter == "r" else 1
        return RingChannel(_adopted(lifeline), memory_fd, (event, peer_event), side=side, settings=settings, peer=peer)

    async def accept(
        self,
        address: Address,
        on_accept: Callable[[Part], None],
        *,
        mode: int = 0o660,
        gid: int | None = None,
        backlog: int = 4096,
        options: TcpOptions | None = None,
    ) -> Listener:
        """See `Shards.accept`."""
        if isinstance(address, UnixAddress):
            sock, identity = _bind_unix(address.path, mode=mode, gid=gid, backlog=backlog)
            return _Acceptor(sock, address, on_accept, at_end=lambda: _unlink_own(address.path, identity))
        resolver = HostResolver()
        try:
            place = (await resolver.resolve(address.host, address.port, passive=True))[0]
        finally:
            resolver.close()
        sock = bind_tcp(place, backlog, options)
        host, port = sock.getsockname()[:2]
        return _Acceptor(sock, TcpAddress(host, port), on_accept, at_end=lambda: None)

    async def adopt(
        self, part: Part, factory: ProtocolFactory, *, on_gone: Callable[[], None], tls: ServerTls | None = None
    ) -> asyncio.BaseTransport:
        """See `Shards.adopt`."""
        _, fds = _take(part, "c")
        sock = _Told(fileno=fds[0])
        sock.on_gone = on_gone
        sock.setblocking(False)
        if tls is not None:
            factory = securing(factory, tls)
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as both loops do with what they accept themselves
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(cast("Callable[[], asyncio.Protocol]", factory), sock)
        except BaseException:
            sock.close()
            raise
        return transport


class _Shard:
    """`ShardProcess`."""

    def __init__(self, process: HostProcess, link: HostLink) -> None:
        self._process = process
        self._link = link

    @property
    def identity(self) -> ProcessIdentity:
        return self._process.identity

    @property
    def link(self) -> Link:
        return self._link

    async def wait(self) -> int:
        return await self._process.wait()

    async def end(self) -> None:
        self._link.close()
        await self._process.end()


class _Told(socket.socket):
    """A socket that says when it is given up. Both loops do that at a transport's very end: asyncio closes the object, uvloop detaches it
    and closes the descriptor; whichever protocol the connection has by then."""

    __slots__ = ("on_gone",)
    on_gone: Callable[[], None] | None

    def close(self) -> None:
        self._tell()
        super().close()

    def detach(self) -> int:
        self._tell()
        return super().detach()

    def _tell(self) -> None:
        on_gone, self.on_gone = getattr(self, "on_gone", None), None
        if on_gone is not None:
            on_gone()


class _Acceptor:
    """A listening socket whose connections are handed out as they come."""

    def __init__(self, sock: socket.socket, address: Address, on_accept: Callable[[Part], None], *, at_end: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._address = address
        self._on_accept = on_accept
        self._at_end = at_end
        self._pause: asyncio.TimerHandle | None = None
        self._is_open = True
        self._resume()

    @property
    def address(self) -> Address:
        return self._address

    async def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._socket.fileno())
        self._at_end()
        self._socket.close()

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._socket.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            if not self._is_open:
                return
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError:  # EMFILE, ENFILE, ENOBUFS, ENOMEM: it would be ready for ever
                self._loop.remove_reader(self._socket.fileno())
                self._pause = self._loop.call_later(ACCEPT_PAUSE_S, self._resume)
                return
            self._on_accept(HostPart("c", [connection.detach()]))


def _spawn(argv: Sequence[str], link_fd: int) -> HostProcess:
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=(link_fd,), start_new_session=True)
    try:
        process = HostProcess(child.pid)
    except BaseException:  # no descriptor left for the pidfd
        child.kill()
        child.wait()
        raise
    child.returncode = 0  # the loop reaps it
    return process


def _take(part: Part, letters: str) -> tuple[str, list[int]]:
    if not isinstance(part, HostPart) or part.letter not in letters:
        raise InvalidArgument("part", getattr(part, "letter", part), "it is something else")
    return part.letter, part.take()


def _adopted(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock


def _socketpair() -> tuple[int, int]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for sock in (left, right):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    return left.detach(), right.detach()


def _ring_pair(n_bytes: int) -> tuple[Part, Part]:
    """Make the descriptors of both ends, or none."""
    from isopod._core import create_ring

    fds: list[int] = []
    try:
        fds.append(create_ring(n_bytes))
        fds.append(os.dup(fds[0]))
        for _ in range(2):  # one by one, so that none is forgotten where the next fails
            fds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        for event in fds[2:4]:
            fds.append(os.dup(event))
        fds.extend(_socketpair())
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    memory, memory_too, left, right, left_too, right_too, line, line_too = fds
    return HostPart("r", [memory, left, right, line]), HostPart("R", [memory_too, right_too, left_too, line_too])
