"""TLS from files: settings that are read from PEM files and read again when those change.

`TlsFiles` says where the files are, `open_server_tls` and `open_client_tls` give a `ReloadingTls` whose `tls` goes into `listen` or
`connect`. The folders are watched; a change is taken up after a short pause (a certificate and its key are two files, written one after the
other). They are read again every REREAD_S too, for those that are links into another folder, as Kubernetes' secrets are. If what is found
then makes no context, the old one stays in use and the failure is reported; connections that stand keep what they began with. This does
not renew certificates, and asks no revocation list.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Generic, NamedTuple, TypeVar

import msgspec

from isopod.runtime.tasks import TaskGroup
from isopod.world.errors import IsopodError, from_os_error
from isopod.world.network import ClientTls, PeerIdentity, ServerTls, TlsMaterial, alpn_protocol, peer_identity
from isopod.world.tls import ClientAuth, MinimumVersion, TlsStatistics
from isopod.world.world import World

__all__ = [
    "ClientTls",
    "PeerIdentity",
    "ReloadingTls",
    "ServerTls",
    "TlsFiles",
    "TlsMaterial",
    "TlsRules",
    "TlsStatistics",
    "alpn_protocol",
    "open_client_tls",
    "open_server_tls",
    "peer_identity",
    "read_material",
]

DEBOUNCE_S: Final = 0.2
WATCH_RETRY_S: Final = 1.0
REREAD_S: Final = 5.0
FILE_BYTES_MAX: Final = 1 << 20

Report = Callable[[IsopodError | None], None]
"""Told of every reload that found something new: None, or why it was not taken; of the same failure again and again once."""
T = TypeVar("T", ServerTls, ClientTls)


class TlsFiles(NamedTuple):
    """Absolute paths of PEM files; "" for none."""

    certificate: str = ""
    key: str = ""
    authorities: str = ""


class TlsRules(msgspec.Struct, frozen=True):
    """What `TlsMaterial` says besides the files."""

    client_auth: ClientAuth = "none"
    alpn: tuple[str, ...] = ()
    minimum_version: MinimumVersion = "1.2"
    verify_peer: bool = True
    cipher_suites: tuple[str, ...] = ()


class ReloadingTls(Generic[T]):
    """Settings that follow their files. Made by `open_server_tls` or `open_client_tls`; who opened it closes it.

    Args:
        world: The ports.
        tls: The holder that is kept up to date.
        read: Reads all files.
        use: Takes over what was read.
        folders: What to watch.
        report: Told of reloads.
    """

    def __init__(
        self,
        world: World,
        tls: T,
        *,
        read: Callable[[], Awaitable[Mapping[str, TlsMaterial]]],
        use: Callable[[Mapping[str, TlsMaterial]], None],
        folders: tuple[str, ...],
        report: Report,
    ) -> None:
        self.tls: T = tls
        self._world = world
        self._read = read
        self._use = use
        self._folders = folders
        self._report = report
        self._known: Mapping[str, TlsMaterial] = {}
        self._changed = asyncio.Event()
        self._failed = ""
        """Why the last reload failed, "" if it did not."""
        self._reading = asyncio.Lock()  # of two reads at one time the older one must not win
        self._task: asyncio.Task[None] | None = None

    def start(self, known: Mapping[str, TlsMaterial]) -> None:
        """Begin to watch. Called once, by those who open it."""
        self._known = known
        self._task = asyncio.get_running_loop().create_task(self._run(), name="tls-reload")

    async def reload(self) -> bool:
        """Read the files now.

        Returns:
            Whether something new is in use. A failure is reported, not raised.
        """
        async with self._reading:
            try:
                found = await self._read()
                if found != self._known:
                    self._use(found)
            except IsopodError as error:
                return self._fail(error)
            except OSError as error:  # no descriptor for the file in memory, for one
                return self._fail(from_os_error(error, "use", "the TLS files"))
            self._failed = ""
            if found == self._known:
                return False
            self._known = found
            self._report(None)
            return True

    async def close(self) -> None:
        """Stop watching; `tls` stays usable with what it has."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        async with TaskGroup("tls-watch") as group:
            for folder in self._folders:
                group.create_task(self._watch(folder))
            if self._folders:
                group.create_task(self._again())
            while True:
                await self._changed.wait()
                await asyncio.sleep(DEBOUNCE_S)
                self._changed.clear()
                await self.reload()

    def _fail(self, error: IsopodError) -> bool:
        """Report a failure that is another than the last one; return False."""
        if error.message != self._failed:
            self._failed = error.message
            self._report(error)
        return False

    async def _again(self) -> None:
        while True:
            await asyncio.sleep(REREAD_S)
            self._changed.set()

    async def _watch(self, folder: str) -> None:
        said = 0
        while True:
            try:
                async with self._world.disk.watch(folder) as watch:
                    said = 0
                    self._changed.set()  # for what happened before the watch began
                    async for name in watch:
                        self._changed.set()
                        if not name:  # names were lost, or the folder is gone: look at everything, and watch anew
                            break
            except OSError as error:
                if error.errno != said:
                    said = error.errno or 0
                    self._report(from_os_error(error, "watch", folder))
            await asyncio.sleep(WATCH_RETRY_S)


async def open_server_tls(
    world: World,
    files: TlsFiles,
    *,
    rules: TlsRules | None = None,
    names: Mapping[str, TlsFiles] | None = None,
    report: Report = lambda _: None,
) -> ReloadingTls[ServerTls]:
    """Read a listener's settings and keep them up to date.

    Args:
        world: The ports.
        files: The certificate shown by default, its key, and who signs clients.
        rules: Client authentication, ALPN, versions.
        names: Other certificates, by the server name asked for.
        report: Told of reloads.

    Raises:
        InvalidArgument: The files make no context.
        UnavailableError: They cannot be read.
    """
    rules = rules or TlsRules()
    everything = {"": files, **(names or {})}

    async def read() -> Mapping[str, TlsMaterial]:
        return {name: await read_material(world, each, rules) for name, each in everything.items()}

    found = await read()
    tls = ServerTls(found[""], names=_others(found))
    reloading = ReloadingTls(
        world,
        tls,
        read=read,
        use=lambda new: tls.use(new[""], names=_others(new)),
        folders=_folders(everything),
        report=report,
    )
    reloading.start(found)
    return reloading


async def open_client_tls(
    world: World,
    files: TlsFiles,
    *,
    rules: TlsRules | None = None,
    server_name: str | None = None,
    report: Report = lambda _: None,
) -> ReloadingTls[ClientTls]:
    """Read the settings of outgoing connections and keep them up to date.

    Args:
        world: The ports.
        files: Who is trusted ("" for the machine's roots), and what is shown if asked.
        rules: ALPN, versions, verification.
        server_name: The name that must be proved; None for the host connected to.
        report: Told of reloads.

    Raises:
        InvalidArgument: The files make no context.
        UnavailableError: They cannot be read.
    """
    rules = rules or TlsRules()

    async def read() -> Mapping[str, TlsMaterial]:
        return {"": await read_material(world, files, rules)}

    found = await read()
    tls = ClientTls(found[""], server_name=server_name)
    reloading = ReloadingTls(world, tls, read=read, use=lambda new: tls.use(new[""]), folders=_folders({"": files}), report=report)
    reloading.start(found)
    return reloading


async def read_material(world: World, files: TlsFiles, rules: TlsRules | None = None) -> TlsMaterial:
    """Read PEM files once.

    Args:
        world: The ports.
        files: Which.
        rules: What else the material says.

    Raises:
        UnavailableError: One cannot be read.
    """
    rules = rules or TlsRules()
    return TlsMaterial(
        certificate=await _read(world, files.certificate),
        key=await _read(world, files.key),
        authorities=await _read(world, files.authorities),
        client_auth=rules.client_auth,
        alpn=rules.alpn,
        minimum_version=rules.minimum_version,
        verify_peer=rules.verify_peer,
        cipher_suites=rules.cipher_suites,
        source=", ".join(path for path in files if path),
    )


async def _read(world: World, path: str) -> bytes:
    if not path:
        return b""
    try:
        return await world.disk.read(path, n_bytes_max=FILE_BYTES_MAX)
    except OSError as error:
        raise from_os_error(error, "read", path) from error


def _others(found: Mapping[str, TlsMaterial]) -> Mapping[str, TlsMaterial]:
    return {name: material for name, material in found.items() if name}


def _folders(everything: Mapping[str, TlsFiles]) -> tuple[str, ...]:
    paths = [path for files in everything.values() for path in files if path]
    return tuple(dict.fromkeys(os.path.dirname(path) for path in paths))
