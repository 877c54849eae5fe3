"""TLS settings: what a listener or a connection presents, whom it trusts, and the present OpenSSL context made from that.

`ServerTls` and `ClientTls` hold a context that `use` replaces: connections made from then on get the new one, those that stand keep
theirs. They are plain values, no ports: reading files, watching them and issuing certificates is `isopod.net.tls` and `isopod.net.ca`.
Both Worlds speak TLS through `tls_stream`; OpenSSL's own randomness and clock are the only things here that no seed decides, which is
why the simulation switches OpenSSL's look at the clock off and compares a certificate's validity with its own (`check_validity`).

Rules: TLS 1.2 or newer; in 1.2 only forward-secret AEAD suites; no compression, no renegotiation; names are verified unless that is
switched off by name. Keys given as PEM reach OpenSSL, which reads files only, through a memory file that nobody else can open
(memfd_create(2)), never through a disk. Sources: RFC 8446, RFC 5246, RFC 6125, RFC 9325 (recommendations for TLS).
"""

import os
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, NamedTuple

import msgspec

from isopod.world.errors import InvalidArgument

ClientAuth = Literal["none", "optional", "required"]
MinimumVersion = Literal["1.2", "1.3"]
HANDSHAKE_S: Final = 10.0
"""How long a handshake may take before the connection is dropped."""
HANDSHAKES_MAX: Final = 8192
"""Of one holder, at once: each costs some 50 KiB."""
CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""Of TLS 1.2 (RFC 9325, section 4.2). Those of 1.3 are all sound."""
CIPHER_SUITES: Final[Mapping[str, str]] = {
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
}
"""These by their registered names (IANA), and what OpenSSL calls them."""
_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME, which Python's ssl does not name."""
_MEMFD_NAME: Final = "isopod-tls"


def openssl_name(suite: str) -> str:
    """Return what OpenSSL calls a cipher suite of TLS 1.2.

    Args:
        suite: Its registered name.

    Raises:
        InvalidArgument: It is unknown, or not sound.
    """
    name = CIPHER_SUITES.get(suite)
    if name is None:
        raise InvalidArgument("cipher suite", suite, "unknown or not secure", f"choose of: {', '.join(CIPHER_SUITES)}")
    return name


class TlsMaterial(msgspec.Struct, frozen=True):
    """Certificates, keys and rules, as PEM text: everything a context is made from.

    Args:
        certificate: The own chain, leaf first; b"" for a client that shows none.
        key: The leaf's private key.
        authorities: Who is trusted to sign the peer's certificate. For a client b"" means the machine's own roots.
        client_auth: On a server: whether a client must, may or need not show a certificate.
        alpn: Application protocols offered or accepted, the preferred one first; () for none.
        minimum_version: The oldest version of TLS spoken.
        verify_peer: On a client: whether the server's chain and name are checked. False is for tests and discovery only.
        cipher_suites: Of TLS 1.2, those that are spoken, by their registered names; () for all in `CIPHER_SUITES`.
        source: Where the text is from, for messages: names of files.
    """

    certificate: bytes = b""
    key: bytes = b""
    authorities: bytes = b""
    client_auth: ClientAuth = "none"
    alpn: tuple[str, ...] = ()
    minimum_version: MinimumVersion = "1.2"
    verify_peer: bool = True
    cipher_suites: tuple[str, ...] = ()
    source: str = ""

    def __repr__(self) -> str:
        return f"TlsMaterial({len(self.certificate)} bytes of certificate, client_auth={self.client_auth!r}, alpn={self.alpn!r})"


class PeerIdentity(NamedTuple):
    """Who the other end proved to be. Times are seconds since the Unix epoch."""

    common_name: str
    organisation: str
    dns_names: tuple[str, ...]
    addresses: tuple[str, ...]
    uris: tuple[str, ...]
    serial: str
    not_before_s: int
    not_after_s: int


class TlsStatistics(NamedTuple):
    """What became of the handshakes of one holder."""

    n_handshakes: int
    n_failed: int
    last_failure: str
    n_reloads: int


class ServerTls:
    """What a listener presents. Give the same object to several listeners if you like.

    Args:
        material: The certificate shown to who asks for no name, or for one that is not in `names`.
        names: More certificates, by the server name a client asks for (SNI); "*.example.org" stands for one label.
        handshake_s: How long a handshake may take.
        handshakes_max: How many may be under way; further connections are cut. What listens learns of a connection only after its
            handshake, so its own bounds do not count these.

    Raises:
        InvalidArgument: The PEM text makes no context.
    """

    def __init__(
        self,
        material: TlsMaterial,
        *,
        names: Mapping[str, TlsMaterial] | None = None,
        handshake_s: float = HANDSHAKE_S,
        handshakes_max: int = HANDSHAKES_MAX,
    ) -> None:
        self.handshake_s = handshake_s
        self._handshakes_max = handshakes_max
        self._n_under_way = 0
        self.context = _server_contexts(material, names or {})
        self._n_handshakes = 0
        self._n_failed = 0
        self._last_failure = ""
        self._n_reloads = 0

    def use(self, material: TlsMaterial, *, names: Mapping[str, TlsMaterial] | None = None) -> None:
        """Present something else from now on. On failure everything stays as it was.

        Raises:
            InvalidArgument: The PEM text makes no context.
        """
        self.context = _server_contexts(material, names or {})
        self._n_reloads += 1

    def admit(self) -> bool:
        """Begin a handshake, which ends with `note`; return False if too many are under way. Called by the Worlds."""
        if self._n_under_way >= self._handshakes_max:
            self._n_failed += 1
            self._last_failure = f"more than {self._handshakes_max} handshakes at once"
            return False
        self._n_under_way += 1
        return True

    def note(self, failure: BaseException | None) -> None:
        """Count a handshake. Called by the Worlds."""
        self._n_under_way -= 1
        self._n_handshakes += 1
        if failure is not None:
            self._n_failed += 1
            self._last_failure = str(failure)

    def statistics(self) -> TlsStatistics:
        """Return the counts so far."""
        return TlsStatistics(self._n_handshakes, self._n_failed, self._last_failure, self._n_reloads)


class ClientTls:
    """How connections are secured, and whom they trust.

    Args:
        material: Whom to trust, and what to show if asked. The default trusts the machine's roots and shows nothing.
        server_name: The name the server must prove and is asked for by; None for the host that is connected to.
        handshake_s: How long a handshake may take.

    Raises:
        InvalidArgument: The PEM text makes no context.
    """

    def __init__(self, material: TlsMaterial | None = None, *, server_name: str | None = None, handshake_s: float = HANDSHAKE_S) -> None:
        self.server_name = server_name
        self.handshake_s = handshake_s
        self.context = _client_context(material or TlsMaterial())
        self._n_handshakes = 0
        self._n_failed = 0
        self._last_failure = ""
        self._n_reloads = 0

    def use(self, material: TlsMaterial) -> None:
        """Use something else for new connections. On failure everything stays as it was.

        Raises:
            InvalidArgument: The PEM text makes no context.
        """
        self.context = _client_context(material)
        self._n_reloads += 1

    def note(self, failure: BaseException | None) -> None:
        """Count a handshake. Called by the Worlds."""
        self._n_handshakes += 1
        if failure is not None:
            self._n_failed += 1
            self._last_failure = str(failure)

    def statistics(self) -> TlsStatistics:
        """Return the counts so far."""
        return TlsStatistics(self._n_handshakes, self._n_failed, self._last_failure, self._n_reloads)


def peer_identity(transport: Any) -> PeerIdentity | None:
    """Return who the other end of a connection proved to be, None if it showed no certificate or there is no TLS.

    Args:
        transport: Any asyncio transport of a World's network.
    """
    found = transport.get_extra_info("peercert")
    return _identity(found) if found else None


def alpn_protocol(transport: Any) -> str:
    """Return the application protocol that the handshake chose, "" for none.

    Args:
        transport: Any asyncio transport of a World's network.
    """
    secured = transport.get_extra_info("ssl_object")
    return (secured.selected_alpn_protocol() or "") if secured is not None else ""


def check_validity(secured: ssl.SSLObject, now_s: float) -> None:
    """Compare the peer's certificate with a clock that is not OpenSSL's.

    Raises:
        ssl.SSLCertVerificationError: It is not valid at `now_s` (seconds since the Unix epoch).
    """
    found = secured.getpeercert()
    if not found:
        return
    identity = _identity(found)
    if not identity.not_before_s <= now_s <= identity.not_after_s:
        state = "has expired" if now_s > identity.not_after_s else "is not yet valid"
        raise ssl.SSLCertVerificationError(1, f"certificate verify failed: certificate {state}")


def ignore_clock(context: ssl.SSLContext) -> None:
    """Keep OpenSSL from comparing certificates with the machine's clock: for the simulation, which has its own."""
    context.verify_flags = ssl.VerifyFlags(int(context.verify_flags) | _NO_CHECK_TIME)


def explain(error: BaseException) -> str:
    """Return in a few words why a handshake or a secured connection failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        why = error.verify_message if getattr(error, "verify_message", "") else str(error.args[-1])
        return f"its certificate is not trusted: {why}"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error.args[-1])).lower().replace("_", " ")
        alert = reason.partition(" alert ")[2]
        return f"it refused us: {alert}" if alert else f"TLS failed: {reason}"
    return str(error) or type(error).__name__


def _server_contexts(material: TlsMaterial, names: Mapping[str, TlsMaterial]) -> ssl.SSLContext:
    context = _server_context(material)
    for name, each in names.items():
        if (each.client_auth, each.minimum_version) != (material.client_auth, material.minimum_version):
            # OpenSSL takes both from the first context: a name with stricter rules would be served without them.
            raise InvalidArgument("TLS name", name, "its client_auth and minimum_version must be those of the first certificate")
    others = {name.lower(): _server_context(each) for name, each in names.items()}
    if others:

        def choose(secured: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            for candidate in _wildcards(name or ""):
                if candidate in others:
                    secured.context = others[candidate]
                    return

        context.sni_callback = choose
    return context


def _wildcards(name: str) -> Iterator[str]:
    lower = name.lower()
    yield lower
    yield "*." + lower.partition(".")[2]


def _server_context(material: TlsMaterial) -> ssl.SSLContext:
    if not material.certificate:
        raise InvalidArgument("TLS certificate", "", "a server needs one")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _apply(context, material)
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_RENEGOTIATION
    if material.client_auth != "none":
        if not material.authorities:
            raise InvalidArgument("TLS authorities", "", "client certificates need somebody who signs them")
        context.verify_mode = ssl.CERT_REQUIRED if material.client_auth == "required" else ssl.CERT_OPTIONAL
    return context


def _client_context(material: TlsMaterial) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _apply(context, material)
    if not material.verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif not material.authorities:
        context.set_default_verify_paths()
    return context


def _apply(context: ssl.SSLContext, material: TlsMaterial) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3 if material.minimum_version == "1.3" else ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # Python's default would take a cut connection for an ended one
    context.set_ciphers(":".join(map(openssl_name, material.cipher_suites)) or CIPHERS)
    if material.alpn:
        context.set_alpn_protocols(list(material.alpn))
    try:
        if material.certificate:
            with _memory_file(material.certificate) as chain, _memory_file(material.key) as key:
                context.load_cert_chain(chain, key, password=_refuse_password)
        if material.authorities:
            context.load_verify_locations(cadata=material.authorities.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument("TLS material", material.source or material, _why_unusable(error)) from error


def _why_unusable(error: Exception) -> str:
    text = str(error).lower().replace("_", " ")
    if "key values mismatch" in text:
        return "the key does not belong to the certificate"
    if "pem lib" in text or "no start line" in text:
        return "a certificate or key is not PEM, or is missing"
    return str(error)


def _refuse_password() -> str:
    """Fail instead of asking on a terminal, which is OpenSSL's own way."""
    raise ValueError("the key is encrypted")


@contextmanager
def _memory_file(data: bytes) -> Iterator[str]:
    """Give bytes a path for the time of a call."""
    fd = os.memfd_create(_MEMFD_NAME)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]  # noqa: TID251 - a file in memory, see the header
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _identity(found: Mapping[str, Any]) -> PeerIdentity:
    subject = {name: value for part in found.get("subject", ()) for name, value in part}
    alternatives: Sequence[tuple[str, str]] = found.get("subjectAltName", ())

    def named(kind: str) -> tuple[str, ...]:
        return tuple(value for what, value in alternatives if what == kind)

    return PeerIdentity(
        common_name=subject.get("commonName", ""),
        organisation=subject.get("organizationName", ""),
        dns_names=named("DNS"),
        addresses=named("IP Address"),
        uris=named("URI"),
        serial=found.get("serialNumber", ""),
        not_before_s=ssl.cert_time_to_seconds(found["notBefore"]),
        not_after_s=ssl.cert_time_to_seconds(found["notAfter"]),
    )


ValidityCheck = Callable[[ssl.SSLObject], None]
"""What a World adds to OpenSSL's own verification; it raises `ssl.SSLCertVerificationError`."""
