"""A small certificate authority: enough for a cluster's own mutual TLS, for development and for tests.

It signs leaves directly (no intermediates), keeps no list of what it issued and revokes nothing: certificates are short-lived and issued
anew, and servers take new files while they run (`isopod.net.tls`). Times come from the World's clock, serial numbers from its chance;
keys come from the operating system's randomness, in the simulation too. `cryptography` is loaded by the first call, not by importing this.

    authority = Authority.create(world, "example authority")
    issued = authority.issue(Subject("web", dns_names=("web.example",), addresses=("127.0.0.1",)))
    await write_issued(world, issued, certificate="/etc/web/tls.crt", key="/etc/web/tls.key")
"""

from typing import Final

from isopod.net.ca_records import CertificateInfo, Issued, Subject
from isopod.world.errors import InvalidArgument, from_os_error
from isopod.world.world import World

__all__ = [
    "Authority",
    "CertificateInfo",
    "Issued",
    "Subject",
    "certificate_info",
    "certificate_request",
    "is_signed_by",
    "self_signed",
    "write_issued",
]

AUTHORITY_VALID_S: Final = 10 * 365 * 86_400.0
LEAF_VALID_S: Final = 90 * 86_400.0
VALID_S_MAX: Final = 100 * 366 * 86_400.0
"""A century."""
SKEW_S: Final = 300.0
"""How far back validity begins: the clocks of a cluster differ."""
SERIAL_BYTES: Final = 16
KEY_MODE: Final = 0o600
CERTIFICATE_MODE: Final = 0o644


class Authority:
    """An authority that can sign.

    Args:
        world: The ports.
        issued: Its certificate and key.

    Raises:
        InvalidArgument: They cannot be used to sign.
    """

    def __init__(self, world: World, issued: Issued) -> None:
        from isopod.net import ca_x509  # noqa: PLC0415 - a tenth of a second

        self._world = world
        self._pair = ca_x509.Pair(issued.certificate, issued.key)
        self.issued = issued

    @classmethod
    def create(cls, world: World, name: str, *, valid_s: float = AUTHORITY_VALID_S) -> "Authority":
        """Make a new one.

        Args:
            world: The ports.
            name: Its common name.
            valid_s: For how long.

        Raises:
            InvalidArgument: The name or the time makes no sense.
        """
        from isopod.net import ca_x509  # noqa: PLC0415 - a tenth of a second

        begin_s, end_s = _validity(world, valid_s)
        try:
            issued = ca_x509.create_authority(name, serial=_serial(world), not_before_s=begin_s, not_after_s=end_s)
        except ValueError as error:
            raise InvalidArgument("authority's name", name, str(error)) from error
        return cls(world, issued)

    @property
    def certificate(self) -> bytes:
        """Its certificate, which those who trust it are given, as PEM."""
        return self.issued.certificate

    def issue(self, subject: Subject, *, valid_s: float = LEAF_VALID_S) -> Issued:
        """Sign a new certificate, with a new key.

        Args:
            subject: For whom.
            valid_s: For how long; never longer than the authority itself.

        Returns:
            The leaf's certificate and key.

        Raises:
            InvalidArgument: The subject or the time makes no sense.
        """
        from isopod.net import ca_x509  # noqa: PLC0415 - loaded already

        begin_s, end_s = _validity(self._world, valid_s)
        end_s = min(end_s, certificate_info(self.certificate).not_after_s)
        try:
            return ca_x509.issue(self._pair, subject, serial=_serial(self._world), not_before_s=begin_s, not_after_s=end_s)
        except ValueError as error:
            raise InvalidArgument("certificate subject", subject.common_name, str(error)) from error

    def sign_request(self, request: bytes, subject: Subject, *, valid_s: float = LEAF_VALID_S) -> bytes:
        """Sign a certificate for a key that stays where it was made.

        Args:
            request: Made by `certificate_request`.
            subject: For whom; what the request itself says of that is not looked at.
            valid_s: For how long; never longer than the authority itself.

        Returns:
            The leaf's certificate, as PEM.

        Raises:
            InvalidArgument: The request, the subject or the time makes no sense.
        """
        from isopod.net import ca_x509  # noqa: PLC0415 - loaded already

        begin_s, end_s = _validity(self._world, valid_s)
        end_s = min(end_s, certificate_info(self.certificate).not_after_s)
        try:
            return ca_x509.sign_request(self._pair, request, subject, serial=_serial(self._world), not_before_s=begin_s, not_after_s=end_s)
        except ValueError as error:
            raise InvalidArgument("certificate subject", subject.common_name, str(error)) from error


def certificate_request(name: str) -> Issued:
    """Return a request for a certificate, as PEM, with the new key that it is about: what is sent to an authority, and what is kept.

    Args:
        name: Its common name, for readers: the authority decides what the certificate says.

    Raises:
        InvalidArgument: The name cannot be one.
    """
    from isopod.net import ca_x509  # noqa: PLC0415 - a tenth of a second

    try:
        return ca_x509.create_request(name)
    except ValueError as error:
        raise InvalidArgument("certificate request", name, str(error)) from error


def self_signed(world: World, subject: Subject, *, valid_s: float = LEAF_VALID_S) -> Issued:
    """Return a certificate that vouches for itself: who is to trust it gets the certificate as its authority. For development.

    Args:
        world: The ports.
        subject: For whom.
        valid_s: For how long.

    Raises:
        InvalidArgument: The subject or the time makes no sense.
    """
    from isopod.net import ca_x509  # noqa: PLC0415 - a tenth of a second

    begin_s, end_s = _validity(world, valid_s)
    try:
        return ca_x509.issue(None, subject, serial=_serial(world), not_before_s=begin_s, not_after_s=end_s)
    except ValueError as error:
        raise InvalidArgument("certificate subject", subject.common_name, str(error)) from error


def certificate_info(pem: bytes) -> CertificateInfo:
    """Return what the first certificate of a PEM text says.

    Raises:
        InvalidArgument: There is none.
    """
    from isopod.net import ca_x509  # noqa: PLC0415 - a tenth of a second

    return ca_x509.describe(pem)


def is_signed_by(pem: bytes, authority: bytes) -> bool:
    """Return whether the first certificate of one PEM text was signed by that of another."""
    from isopod.net import ca_x509  # noqa: PLC0415 - a tenth of a second

    return ca_x509.is_signed_by(pem, authority)


async def write_issued(world: World, issued: Issued, *, certificate: str, key: str) -> None:
    """Write a certificate and its key, each atomically; the key first, readable by the owner alone.

    Args:
        world: The ports.
        issued: What to write.
        certificate: The certificate's path.
        key: The key's path.

    Raises:
        UnavailableError: The disk failed.
    """
    try:
        await world.disk.write_atomic(key, issued.key, mode=KEY_MODE)
        await world.disk.write_atomic(certificate, issued.certificate, mode=CERTIFICATE_MODE)
    except OSError as error:
        raise from_os_error(error, "write", certificate) from error


def _validity(world: World, valid_s: float) -> tuple[float, float]:
    if not 0 < valid_s <= VALID_S_MAX:
        raise InvalidArgument("validity", valid_s, f"it must be positive, and at most {VALID_S_MAX:.0f} s")
    now_s = world.clock.now_ns() / 1e9
    return now_s - SKEW_S, now_s + valid_s


def _serial(world: World) -> int:
    return int(world.random.token_hex(SERIAL_BYTES), 16) >> 1 or 1
