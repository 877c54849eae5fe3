"""What a container finds in /etc/hosts, /etc/resolv.conf and /etc/hostname. Pure: text in, text out; the caller reads, writes and mounts.

Rules: a name server on a loopback address of the host is the host's own loopback, not the container's: it is dropped. When none is
left, public ones stand in, as docker does, with a comment that says so. Source: resolv.conf(5), hosts(5).
"""

import ipaddress
from typing import Final

FALLBACK_NAMESERVERS: Final = ("8.8.8.8", "8.8.4.4")
_LOOPBACK: Final = (("127.0.0.1", "localhost"), ("::1", "localhost ip6-localhost ip6-loopback"))


def hosts_text(hostname: str, ip: str | None) -> str:
    """Return /etc/hosts. `ip` is the container's address; without one its name points to loopback."""
    rows = [*_LOOPBACK, (ip or "127.0.0.1", hostname)]
    return "".join(f"{address}\t{names}\n" for address, names in rows)


def hostname_text(hostname: str) -> str:
    """Return /etc/hostname."""
    return f"{hostname}\n"


def resolv_text(host_resolv: str) -> str:
    """Return /etc/resolv.conf, made from the host's: comments go, loopback name servers are dropped, the rest stays in its order."""
    kept: list[str] = []
    n_servers = n_dropped = 0
    for line in host_resolv.splitlines():
        words = line.split()
        if not words or words[0][0] in "#;":
            continue
        if words[0] != "nameserver":
            kept.append(" ".join(words))
        elif len(words) > 1 and _reachable(words[1]):
            kept.append(f"nameserver {words[1]}")
            n_servers += 1
        else:
            n_dropped += 1
    notes = [f"# isopod: {n_dropped} of the host's name servers cannot be reached from a container"] if n_dropped else []
    if not n_servers:
        notes.append("# isopod: the host has no other name server: public ones stand in")
        kept = [f"nameserver {server}" for server in FALLBACK_NAMESERVERS] + kept
    return "".join(f"{line}\n" for line in [*notes, *kept])


def _reachable(server: str) -> bool:
    try:
        address = ipaddress.ip_address(server)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or "%" in server)
