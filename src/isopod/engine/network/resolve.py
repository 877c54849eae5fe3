"""What a container finds in /etc/hosts, /etc/resolv.conf and /etc/hostname. Pure: text in, text out; the caller reads, writes and mounts.

Rules: the network's own name server comes first, where there is one; the host's follow, for the time when no node runs. A name server on a
loopback address of the host is the host's own loopback, not the container's: it is dropped. When none is left, public ones stand in, as
docker does, with a comment that says so. At most three are written, more are not read. With a name server of ours, a name without a dot is
asked for as it stands first (`ndots:0`), unless the host's file says something else. Source: resolv.conf(5), hosts(5).
"""

import ipaddress
from typing import Final

FALLBACK_NAMESERVERS: Final = ("8.8.8.8", "8.8.4.4")
NAMESERVERS_MAX: Final = 3
_LOOPBACK: Final = (("127.0.0.1", "localhost"), ("::1", "localhost ip6-localhost ip6-loopback"))


def hosts_text(hostname: str, ip: str | None) -> str:
    """Return /etc/hosts. `ip` is the container's address; without one its name points to loopback."""
    rows = [*_LOOPBACK, (ip or "127.0.0.1", hostname)]
    return "".join(f"{address}\t{names}\n" for address, names in rows)


def hostname_text(hostname: str) -> str:
    """Return /etc/hostname."""
    return f"{hostname}\n"


def resolv_text(host_resolv: str, nameserver: str | None = None) -> str:
    """Return /etc/resolv.conf, made from the host's: comments go, loopback name servers are dropped, the rest stays in its order.

    Args:
        host_resolv: The host's.
        nameserver: The address of the network's own, None if it has none.
    """
    kept: list[str] = []
    servers = [nameserver] if nameserver else []
    n_dropped = 0
    has_ndots = False
    for line in host_resolv.splitlines():
        words = line.split()
        if not words or words[0][0] in "#;":
            continue
        if words[0] != "nameserver":
            kept.append(" ".join(words))
            has_ndots = has_ndots or (words[0] == "options" and any(word.startswith("ndots:") for word in words))
        elif len(words) > 1 and _reachable(words[1]):
            servers.append(words[1])
        else:
            n_dropped += 1
    notes = [f"# isopod: {n_dropped} of the host's name servers cannot be reached from a container"] if n_dropped else []
    if not servers:
        notes.append("# isopod: the host has no other name server: public ones stand in")
        servers = list(FALLBACK_NAMESERVERS)
    if nameserver and not has_ndots:
        kept.append("options ndots:0")
    rows = [f"nameserver {server}" for server in list(dict.fromkeys(servers))[:NAMESERVERS_MAX]]
    return "".join(f"{line}\n" for line in [*notes, *rows, *kept])


def _reachable(server: str) -> bool:
    try:
        address = ipaddress.ip_address(server)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or "%" in server)
