"""What certificates are made from and what they say: plain records, cheap to import."""

from typing import Literal, NamedTuple

import msgspec

Purpose = Literal["server", "client", "both"]


class Subject(msgspec.Struct, frozen=True):
    """Whom a certificate is for.

    Args:
        common_name: A readable name; peers verify the others, not this one.
        dns_names: Names it may be reached by; "*.example.org" for one label.
        addresses: Numeric addresses it may be reached by.
        uris: Further identities, such as "spiffe://isopod/node/7".
        organisation: A readable group, or "".
        purpose: What TLS may use it for; a peer of a cluster is both.
    """

    common_name: str
    dns_names: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    uris: tuple[str, ...] = ()
    organisation: str = ""
    purpose: Purpose = "server"


class Issued(msgspec.Struct, frozen=True):
    """A certificate and its key, as PEM."""

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return f"Issued({len(self.certificate)} bytes of certificate, a key)"


class CertificateInfo(NamedTuple):
    """What a certificate says. Times are seconds since the Unix epoch."""

    subject: str
    issuer: str
    serial: str
    dns_names: tuple[str, ...]
    addresses: tuple[str, ...]
    uris: tuple[str, ...]
    not_before_s: int
    not_after_s: int
    is_authority: bool
    fingerprint: str

    def remaining_s(self, now_ns: int) -> float:
        """Return how long it will still be valid, negative once it has expired.

        Args:
            now_ns: The wall clock (`world.clock.now_ns()`).
        """
        return self.not_after_s - now_ns / 1e9
