"""Credentials: a node's certificate, and on voters the key of the cluster's own authority.

    tls/ca.crt     the authority's certificate: whom all trust
    tls/ca.key     its key: on voters only, mode 0600
    tls/node.pem   this node's certificate and its key, which was made here and never leaves this disk; one file, so that it is one write

A certificate names its owner by a URI, "isopod://CLUSTER/ROLE/ID/INCARNATION", and by two host names: "nID.CLUSTER.isopod", which whoever
is connected to as node ID must prove, and "CLUSTER.isopod", which any member proves. So who answers at an address is known before the first
byte of a request, and a certificate of another id, another cluster or an earlier life of the same id is told apart.

The authority's key lies on voters, outside of the replicated state: a backup, a learner, an agent never hold it, and no second secret is
needed to open it. The leader hands it to a learner over mutual TLS just before it promotes it, so it survives as long as any voter does.
A replicated, encrypted key would need another key beside it on the same disks. `recover` makes a new authority instead.

Not here: who may join (`enrolment`), when to renew (`upkeep`).
"""

from typing import Final, NamedTuple

from isopod.cluster.members.config import Security
from isopod.net.ca import Authority, Issued, Subject, certificate_info, is_signed_by
from isopod.world.errors import BadRecord, ForeignCluster, InvalidArgument, WrongState, from_os_error
from isopod.world.network import ClientTls, PeerIdentity, ServerTls, TlsMaterial
from isopod.world.world import World

FOLDER: Final = "tls"
SCHEME: Final = "isopod://"
AUTHORITY_NAME: Final = "isopod cluster"
KEY_MODE: Final = 0o600
CERTIFICATE_MODE: Final = 0o644
PEM_BYTES_MAX: Final = 1 << 16
_KEY_BEGIN: Final = b"-----BEGIN PRIVATE KEY-----"


class Bearer(NamedTuple):
    """Whom a certificate of this cluster's kind speaks for."""

    cluster_id: str
    role: str
    """The most it may become."""
    node_id: int
    incarnation: str

    @property
    def uri(self) -> str:
        """As it stands in the certificate."""
        return f"{SCHEME}{self.cluster_id}/{self.role}/{self.node_id}/{self.incarnation}"


def member_name(cluster_id: str) -> str:
    """Return the host name that every member of a cluster proves."""
    return f"{cluster_id}.isopod"


def node_name(cluster_id: str, node_id: int) -> str:
    """Return the host name that one node of a cluster proves."""
    return f"n{node_id}.{cluster_id}.isopod"


def bearer_of(identity: PeerIdentity | None) -> Bearer | None:
    """Return whom a verified certificate speaks for; None if it is none of ours, or there is none."""
    for uri in identity.uris if identity is not None else ():
        parts = uri.removeprefix(SCHEME).split("/")
        if uri.startswith(SCHEME) and len(parts) == 4 and parts[2].isascii() and parts[2].isdigit():
            return Bearer(parts[0], parts[1], int(parts[2][:20]), parts[3])
    return None


def subject_of(bearer: Bearer) -> Subject:
    """Return what a node's certificate says."""
    return Subject(
        common_name=f"isopod node {bearer.node_id}",
        dns_names=(node_name(bearer.cluster_id, bearer.node_id), member_name(bearer.cluster_id)),
        uris=(bearer.uri,),
        organisation=bearer.cluster_id,
        purpose="both",
    )


class Credentials:
    """What a node shows and whom it trusts, on disk and in use. With security "plaintext" it shows nothing.

    Args:
        world: The ports.
        folder: The node's data folder.
        security: Whether there is anything to show.
    """

    def __init__(self, world: World, folder: str, security: Security) -> None:
        self.server: ServerTls | None = None
        self.authority: Authority | None = None
        self._world = world
        self._folder = f"{folder}/{FOLDER}"
        self._is_secured = security == "tls"
        self._material: TlsMaterial | None = None
        self._clients: dict[str, ClientTls] = {}
        self._bearer: Bearer | None = None

    @property
    def is_ready(self) -> bool:
        """Whether connections can be made."""
        return self._material is not None or not self._is_secured

    @property
    def authorities(self) -> bytes:
        """The authority's certificate, b"" without TLS."""
        return self._material.authorities if self._material is not None else b""

    @property
    def bearer(self) -> Bearer | None:
        """Whom the own certificate speaks for."""
        return self._bearer

    def remaining_s(self) -> float:
        """Return how long the own certificate is still valid, negative if it has expired; a century without TLS."""
        if self._material is None:
            return 100 * 365 * 86_400.0
        return certificate_info(self._material.certificate).remaining_s(self._world.clock.now_ns())

    def client(self, node_id: int = 0) -> ClientTls | None:
        """Return how to connect to a node; to any member for 0. None without TLS.

        Raises:
            WrongState: There is no certificate yet.
        """
        if not self._is_secured:
            return None
        if self._material is None or self._bearer is None:
            raise WrongState("node", "without a certificate", "not enrolled", "connect to members")
        cluster_id = self._bearer.cluster_id
        name = node_name(cluster_id, node_id) if node_id else member_name(cluster_id)
        found = self._clients.get(name)
        if found is None:
            found = self._clients[name] = ClientTls(self._material, server_name=name)
        return found

    async def load(self, cluster_id: str) -> bool:
        """Read what is on disk.

        Args:
            cluster_id: The cluster it must be for.

        Returns:
            Whether there was a certificate.

        Raises:
            BadRecord: The files cannot be used.
            ForeignCluster: They are for another cluster.
            UnavailableError: The disk failed.
        """
        if not self._is_secured:
            return True
        pair, authorities = await self._read("node.pem"), await self._read("ca.crt")
        if not pair:
            return False
        certificate, begin, key = pair.partition(_KEY_BEGIN)
        try:
            key = begin + key
            self._use(TlsMaterial(certificate=certificate, key=key, authorities=authorities, client_auth="optional", minimum_version="1.3"))
            authority_key = await self._read("ca.key")
            if authority_key:
                self.authority = Authority(self._world, Issued(authorities, authority_key))
        except InvalidArgument as error:
            hint = "put the files back from a backup, or empty the data folder and join anew"
            raise BadRecord(self._folder, error.message, hint) from error
        if self._bearer is None or self._bearer.cluster_id != cluster_id:
            raise ForeignCluster(f"the certificate in {self._folder}", self._bearer.cluster_id if self._bearer else "", cluster_id)
        return True

    async def found(self, bearer: Bearer, *, valid_s: float) -> None:
        """Make an authority, and a first certificate by it.

        Args:
            bearer: This node.
            valid_s: How long its certificate is valid.

        Raises:
            UnavailableError: The disk failed.
        """
        if not self._is_secured:
            return
        authority = Authority.create(self._world, f"{AUTHORITY_NAME} {bearer.cluster_id}")
        await self._write("ca.key", authority.issued.key)
        self.authority = authority
        issued = authority.issue(subject_of(bearer), valid_s=valid_s)
        await self.install(issued.certificate, issued.key, authority.certificate)

    async def install(self, certificate: bytes, key: bytes, authorities: bytes) -> None:
        """Take over a certificate: on disk first, then for connections from now on.

        Raises:
            InvalidArgument: The three do not fit together; nothing was changed.
            UnavailableError: The disk failed.
        """
        if not is_signed_by(certificate, authorities):
            raise InvalidArgument("certificate", f"{len(certificate)} bytes", "it was not signed by the cluster's authority")
        material = TlsMaterial(certificate=certificate, key=key, authorities=authorities, client_auth="optional", minimum_version="1.3")
        ServerTls(material)  # whether they fit together, before anything is written
        await self._write("ca.crt", authorities, CERTIFICATE_MODE)
        await self._write("node.pem", certificate + key)
        self._use(material)

    async def keep_authority(self, key: bytes) -> None:
        """Take over the authority's key: this node is about to vote.

        Raises:
            InvalidArgument: It is not the key of the authority that is trusted here.
            UnavailableError: The disk failed.
        """
        if not self._is_secured:
            return
        authority = Authority(self._world, Issued(self.authorities, key))
        await self._write("ca.key", key)
        self.authority = authority

    async def forget_authority(self) -> None:
        """Remove the authority's key: this node votes no more. Raises UnavailableError if the disk fails."""
        self.authority = None
        try:
            await self._world.disk.remove(f"{self._folder}/ca.key")
        except FileNotFoundError:
            return
        except OSError as error:
            raise from_os_error(error, "remove", f"{self._folder}/ca.key") from error

    def sign(self, request: bytes, bearer: Bearer, *, valid_s: float) -> bytes:
        """Return a certificate for a node of this cluster.

        Args:
            request: The node's request.
            bearer: Whom it is to speak for.
            valid_s: For how long, in seconds.

        Raises:
            WrongState: The authority's key is not here.
            InvalidArgument: The request cannot be used.
        """
        if self.authority is None:
            raise WrongState("node", "without the authority's key", "no voter", "sign certificates", hint="ask a voter")
        return self.authority.sign_request(request, subject_of(bearer), valid_s=valid_s)

    def _use(self, material: TlsMaterial) -> None:
        if self.server is None:
            self.server = ServerTls(material)
        else:
            self.server.use(material)
        for client in self._clients.values():
            client.use(material)
        self._material = material
        uris = certificate_info(material.certificate).uris
        self._bearer = bearer_of(PeerIdentity("", "", (), (), uris, "", 0, 0))

    async def _read(self, name: str) -> bytes:
        path = f"{self._folder}/{name}"
        try:
            return await self._world.disk.read(path, n_bytes_max=PEM_BYTES_MAX)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise from_os_error(error, "read", path) from error

    async def _write(self, name: str, data: bytes, mode: int = KEY_MODE) -> None:
        path = f"{self._folder}/{name}"
        try:
            await self._world.disk.make_directory(self._folder)
            await self._world.disk.write_atomic(path, data, mode=mode)
        except OSError as error:
            raise from_os_error(error, "write", path) from error
