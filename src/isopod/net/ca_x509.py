"""X.509 by `cryptography`: keys, certificates and what is written in them.

Only `isopod.net.ca` imports this, and late: `cryptography` takes a tenth of a second to load, and a node that issues no certificates never
needs it. Keys are ECDSA P-256, signatures SHA-256. Extensions follow RFC 5280 section 4.2: what a certificate may be used for is said
and critical where the RFC wants that, so that OpenSSL, curl and browsers take it.
"""

import datetime
import ipaddress
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from isopod.net.ca_records import CertificateInfo, Issued, Subject
from isopod.world.errors import InvalidArgument

_USAGES: Final = {"server": [ExtendedKeyUsageOID.SERVER_AUTH], "client": [ExtendedKeyUsageOID.CLIENT_AUTH]}
_BOTH: Final = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]


class Pair:
    """An authority's certificate with its key.

    Args:
        certificate: PEM.
        key: PEM, not encrypted.

    Raises:
        InvalidArgument: They cannot be read, do not belong together, or may not sign certificates.
    """

    def __init__(self, certificate: bytes, key: bytes) -> None:
        self.certificate = read_certificate(certificate)
        try:
            loaded = serialization.load_pem_private_key(key, None)
        except (ValueError, TypeError) as error:
            raise InvalidArgument("authority's key", f"{len(key)} bytes", "it is no PEM key without a password") from error
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise InvalidArgument("authority's key", type(loaded).__name__, "only elliptic curves are used here")
        if loaded.public_key() != self.certificate.public_key():
            raise InvalidArgument("authority's key", "another key", "it does not belong to the certificate")
        if not describe(certificate).is_authority:
            raise InvalidArgument("authority", describe(certificate).subject, "its certificate may not sign others")
        self.key = loaded


def create_authority(name: str, *, serial: int, not_before_s: float, not_after_s: float) -> Issued:
    """Return a self-signed authority, which may sign leaves but no further authorities."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    built = (
        _builder(who, who, key.public_key(), serial=serial, not_before_s=not_before_s, not_after_s=not_after_s)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Issued(built.public_bytes(serialization.Encoding.PEM), _key_pem(key))


def issue(pair: Pair | None, subject: Subject, *, serial: int, not_before_s: float, not_after_s: float) -> Issued:
    """Return a leaf signed by an authority, or by itself if there is none."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = _name(subject)
    issuer, signer = (who, key) if pair is None else (pair.certificate.subject, pair.key)
    built = _leaf(subject, (issuer, signer), key.public_key(), serial=serial, not_before_s=not_before_s, not_after_s=not_after_s)
    return Issued(built.public_bytes(serialization.Encoding.PEM), _key_pem(key))


def create_request(name: str) -> Issued:
    """Return a request for a certificate (PKCS #10, RFC 2986) and the new key it is about."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(who).sign(key, hashes.SHA256())
    return Issued(request.public_bytes(serialization.Encoding.PEM), _key_pem(key))


def sign_request(pair: Pair, request: bytes, subject: Subject, *, serial: int, not_before_s: float, not_after_s: float) -> bytes:
    """Return the leaf of the key that a request is about; of what else the request says nothing is taken.

    Raises:
        InvalidArgument: It is no request, its maker does not have the key, or it is no elliptic curve's.
    """
    try:
        found = x509.load_pem_x509_csr(request)
        key = found.public_key()
        is_sound = found.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidArgument("certificate request", f"{len(request)} bytes", "it is no PEM request") from error
    if not is_sound or not isinstance(key, ec.EllipticCurvePublicKey):
        raise InvalidArgument("certificate request", f"{len(request)} bytes", "it is not signed by an elliptic curve's key of its own")
    signer = (pair.certificate.subject, pair.key)
    built = _leaf(subject, signer, key, serial=serial, not_before_s=not_before_s, not_after_s=not_after_s)
    return built.public_bytes(serialization.Encoding.PEM)


def _name(subject: Subject) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, subject.common_name)]
    if subject.organisation:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, subject.organisation))
    return x509.Name(attributes)


def _leaf(
    subject: Subject,
    by: tuple[x509.Name, ec.EllipticCurvePrivateKey],
    key: ec.EllipticCurvePublicKey,
    *,
    serial: int,
    not_before_s: float,
    not_after_s: float,
) -> x509.Certificate:
    issuer, signer = by
    builder = (
        _builder(_name(subject), issuer, key, serial=serial, not_before_s=not_before_s, not_after_s=not_after_s)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_USAGES.get(subject.purpose, _BOTH)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    alternatives = _alternatives(subject)
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(signer, hashes.SHA256())


def read_certificate(pem: bytes) -> x509.Certificate:
    """Return the first certificate of a PEM text.

    Raises:
        InvalidArgument: There is none.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise InvalidArgument("certificate", f"{len(pem)} bytes", "it is no PEM certificate") from error


def describe(pem: bytes) -> CertificateInfo:
    """Return what the first certificate of a PEM text says."""
    found = read_certificate(pem)
    try:
        alternatives = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        alternatives = x509.SubjectAlternativeName([])
    try:
        is_authority = found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_authority = False
    return CertificateInfo(
        subject=found.subject.rfc4514_string(),
        issuer=found.issuer.rfc4514_string(),
        serial=f"{found.serial_number:X}",
        dns_names=tuple(alternatives.get_values_for_type(x509.DNSName)),
        addresses=tuple(str(each) for each in alternatives.get_values_for_type(x509.IPAddress)),
        uris=tuple(alternatives.get_values_for_type(x509.UniformResourceIdentifier)),
        not_before_s=int(found.not_valid_before_utc.timestamp()),
        not_after_s=int(found.not_valid_after_utc.timestamp()),
        is_authority=is_authority,
        fingerprint="sha256:" + found.fingerprint(hashes.SHA256()).hex(),
    )


def is_signed_by(pem: bytes, authority: bytes) -> bool:
    """Return whether one certificate carries another's signature."""
    try:
        read_certificate(pem).verify_directly_issued_by(read_certificate(authority))
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, serial: int, not_before_s: float, not_after_s: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(datetime.datetime.fromtimestamp(not_before_s, datetime.UTC))
        .not_valid_after(datetime.datetime.fromtimestamp(not_after_s, datetime.UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternatives(subject: Subject) -> list[x509.GeneralName]:
    try:
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in subject.dns_names]
        names += [x509.IPAddress(ipaddress.ip_address(address)) for address in subject.addresses]
        names += [x509.UniformResourceIdentifier(uri) for uri in subject.uris]
    except ValueError as error:
        raise InvalidArgument("certificate subject", subject.common_name, str(error)) from error
    return names


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
