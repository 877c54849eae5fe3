"""Identity: who a node is, on its own disk: its id, its cluster, and the random incarnation that tells this disk from a wiped one.

    phase       what is there                                   what a start does
    new         id and incarnation                              founds or joins, by its configuration
    founding    + the id of the cluster that is being founded   goes on founding it
    enrolled    + a cluster that admitted this incarnation      goes on joining it
    member      + a replica with something in it                resumes; a missing replica is refused
    removed     the cluster removed this node                   refused, with the way to come back
    lost        its disk lost part of the log: a vote may be    refused, with the way to come back
                among what it forgot, so it must give none

The incarnation is chosen before the first message to a peer and never changes: who comes with a known id and another incarnation has
lost its disk, and with it promises it gave to the others (Raft, section 3.8 of Ongaro's dissertation: a server must not lose its log).
The file is replaced atomically; the folder is locked for as long as the node runs.
"""

from typing import Final, Literal

import msgspec

from isopod.world.disk import OpenFile
from isopod.world.errors import AlreadyServing, BadRecord, IdentityConflict, InvalidArgument, Unsupported, WrongState, from_os_error
from isopod.world.world import World

Phase = Literal["new", "founding", "enrolled", "member", "removed", "lost"]

FORMAT: Final = 1
FILE: Final = "identity.json"
LOCK: Final = "cluster.lock"
RECOVERED: Final = "recovered"
"""Where a recovery puts what is complete and only has to be moved into its place."""
INCARNATION_BYTES: Final = 8
CLUSTER_ID_BYTES: Final = 8
HINT: Final = "put it back from a backup, or empty the folder and join anew"
HEX: Final = frozenset("0123456789abcdef")


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What the file holds."""

    format: int = FORMAT
    node_id: int
    incarnation: str
    phase: Phase = "new"
    cluster_id: str = ""


class IdentityFile:
    """The file of a node's identity, held open by a lock. Who opened it closes it.

    Args:
        world: The ports.
        folder: The node's data folder.
        lock: Held while this object is open.
        identity: What the file says.
    """

    def __init__(self, world: World, folder: str, lock: OpenFile, identity: Identity) -> None:
        self.identity = identity
        self._world = world
        self._folder = folder
        self._lock = lock

    @classmethod
    async def open(cls, world: World, folder: str, node_id: int) -> "IdentityFile":
        """Lock the folder, and read or choose who this node is.

        Args:
            world: The ports.
            folder: The node's data folder; made if it is missing.
            node_id: Who it was told to be.

        Raises:
            AlreadyServing: Another process has the folder.
            IdentityConflict: The folder is another node's.
            BadRecord: The identity is damaged, or gone while a replica is there.
            Unsupported: A newer isopod wrote it.
            UnavailableError: The disk failed.
        """
        try:
            await world.disk.make_directory(folder)
            path = f"{folder}/{LOCK}"
            lock = await world.disk.lock(path, msgspec.json.encode({"pid": world.processes.own_pid()}))
            if lock is None:
                raise AlreadyServing(folder, await _owner(world, path))
        except OSError as error:
            raise from_os_error(error, "lock", folder) from error
        try:
            identity = await read_identity(world, folder)
            if identity is None:
                identity = Identity(node_id=node_id, incarnation=world.random.token_hex(INCARNATION_BYTES))
                await write_identity(world, folder, identity)
            elif identity.node_id != node_id:
                hint = f"start it with --id {identity.node_id}, or with another folder"
                raise IdentityConflict(node_id, f"the folder {folder} is that of node {identity.node_id}", hint)
            return cls(world, folder, lock, identity)
        except BaseException:
            lock.close()
            raise

    async def write(self, identity: Identity) -> None:
        """Replace what the file says, durably.

        Raises:
            UnavailableError: The disk failed; the old text is still there.
        """
        if identity == self.identity:
            return
        await write_identity(self._world, self._folder, identity)
        self.identity = identity

    async def set_phase(self, phase: Phase, cluster_id: str = "") -> None:
        """Note how far this node is. Raises as `write`.

        Args:
            phase: The new phase.
            cluster_id: The cluster, if it is only known now.
        """
        await self.write(msgspec.structs.replace(self.identity, phase=phase, cluster_id=cluster_id or self.identity.cluster_id))

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()


async def read_identity(world: World, folder: str) -> Identity | None:
    """Return whose folder this is, None for an empty one.

    Raises:
        BadRecord: The file is damaged, or it is gone and a replica is there.
        Unsupported: A newer isopod wrote it.
        UnavailableError: The disk failed.
    """
    path = f"{folder}/{FILE}"
    try:
        data = await world.disk.read(path, n_bytes_max=1 << 16)
    except FileNotFoundError:
        if await world.disk.list(f"{folder}/raft"):
            raise BadRecord(path, "it is gone, but a replica is there", "put the file back, or empty the folder and join anew") from None
        return None
    except OSError as error:
        raise from_os_error(error, "read", path) from error
    try:
        head = msgspec.json.decode(data, type=dict[str, object])
        if isinstance(head.get("format"), int) and head["format"] > FORMAT:  # type: ignore[operator]  # looked at just before
            raise Unsupported(f"format {head['format']} of {path}", "it is newer than this isopod", "use the isopod that wrote it")
        identity = msgspec.convert(head, Identity)
    except (msgspec.MsgspecError, ValueError) as error:
        raise BadRecord(path, f"it cannot be read: {error}", HINT) from error
    _check(path, identity)
    return identity


async def refuse_half_recovered(world: World, folder: str) -> None:
    """Refuse a folder in which a recovery was interrupted: without its old files it looks like a new one.

    Raises:
        WrongState: It is one.
    """
    if await world.disk.stat(f"{folder}/{RECOVERED}") is not None:
        raise WrongState(
            "folder", folder, "in the middle of a recovery", "start a node in it", hint=f"finish it: isopod cluster recover --yes {folder}"
        )


async def write_identity(world: World, folder: str, identity: Identity) -> None:
    """Replace the file, durably. Raises UnavailableError if the disk fails."""
    path = f"{folder}/{FILE}"
    try:
        await world.disk.write_atomic(path, msgspec.json.encode(identity) + b"\n")
    except OSError as error:
        raise from_os_error(error, "write", path) from error


def new_cluster_id(world: World) -> str:
    """Return the id of a cluster that does not exist yet: 16 hexadecimal digits."""
    return world.random.token_hex(CLUSTER_ID_BYTES)


def check_cluster_id(text: str) -> str:
    """Return a cluster's id that may be one: it becomes part of names in certificates.

    Raises:
        InvalidArgument: It may not.
    """
    if len(text) != 2 * CLUSTER_ID_BYTES or not all(c in HEX for c in text):
        raise InvalidArgument("cluster id", text, f"want {2 * CLUSTER_ID_BYTES} hexadecimal digits")
    return text


def _check(path: str, identity: Identity) -> None:
    try:
        if identity.cluster_id:
            check_cluster_id(identity.cluster_id)
    except InvalidArgument as error:
        raise BadRecord(path, error.message, HINT) from error
    is_known = identity.phase in ("founding", "enrolled", "member")
    if identity.node_id < 1 or not identity.incarnation or (is_known and not identity.cluster_id):
        raise BadRecord(path, "it is incomplete", HINT)


async def _owner(world: World, path: str) -> int:
    try:
        return int(msgspec.json.decode(await world.disk.read(path))["pid"])
    except (OSError, ValueError, KeyError, TypeError):  # it is just being written, or gone: the pid is only for the message
        return 0
