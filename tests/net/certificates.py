"""Certificates for tests: one authority, another that nobody trusts, and what they sign."""

import functools

from isopod.net import ca_x509
from isopod.net.ca import Authority, Issued, Subject
from isopod.world.host.world import make_host_world
from isopod.world.network import TlsMaterial
from isopod.world.tls import ClientAuth

__all__ = [
    "EPOCH_S",
    "LONG_S",
    "Subject",
    "authority",
    "client_leaf",
    "client_material",
    "fresh_authority",
    "issue",
    "server_leaf",
    "server_material",
]

EPOCH_S = 1_767_225_600
"""When simulations begin."""
LONG_S = 3 * 365 * 86_400.0


def authority(name: str = "test authority") -> Issued:
    """An authority valid now and in the simulation."""
    return _authority(name)


@functools.cache
def _authority(name: str) -> Issued:
    return ca_x509.create_authority(name, serial=1, not_before_s=EPOCH_S - LONG_S, not_after_s=EPOCH_S + 10 * LONG_S)


def issue(
    subject: Subject, *, by: str = "test authority", not_before_s: float = EPOCH_S - LONG_S, not_after_s: float = EPOCH_S + 5 * LONG_S
) -> Issued:
    """A leaf with any validity."""
    signer = authority(by)
    return ca_x509.issue(
        ca_x509.Pair(signer.certificate, signer.key), subject, serial=77, not_before_s=not_before_s, not_after_s=not_after_s
    )


@functools.cache
def server_leaf(name: str = "localhost", by: str = "test authority") -> Issued:
    return issue(Subject(name, dns_names=(name,), addresses=("127.0.0.1",)), by=by)


@functools.cache
def client_leaf(name: str = "a client", by: str = "test authority") -> Issued:
    return issue(
        Subject(name, dns_names=("client.example",), uris=("spiffe://isopod/client",), organisation="tests", purpose="client"), by=by
    )


def server_material(name: str = "localhost", *, client_auth: ClientAuth = "none", alpn: tuple[str, ...] = ()) -> TlsMaterial:
    leaf = server_leaf(name)
    return TlsMaterial(leaf.certificate, leaf.key, authority().certificate, client_auth=client_auth, alpn=alpn)


def client_material(leaf: Issued | None = None, *, alpn: tuple[str, ...] = ()) -> TlsMaterial:
    return TlsMaterial(leaf.certificate if leaf else b"", leaf.key if leaf else b"", authority().certificate, alpn=alpn)


def fresh_authority() -> Authority:
    """An authority of now, by the host's clock."""
    return Authority.create(make_host_world(), "fresh authority")
