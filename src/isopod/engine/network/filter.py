"""The nftables tables of an instance, as text for `Kernel.apply_filter`. Pure; `rules` keeps the state that is rendered here.

The table of family inet, for the bridges of the instance: containers reach the outside under the host's address (masquerade); the outside
reaches a container only in answers, or through a published port; two networks do not reach each other either; a container reaches the host
itself, as with docker. `published` leads from a host's protocol and port to a container's address and port, `published_at` from one of the
host's addresses too. From the outside, from the host itself (also by 127.0.0.1, for which the bridges have `route_localnet`; packets that
come from a bridge to a loopback address are dropped in the first chain) and from containers, also the very one behind the port; these and
the host's loopback arrive under the bridge's address, the outside under its own.

The table of family bridge, only while somebody needs it: what comes out of a tap is dropped unless it is IPv4 or ARP from the MAC and the
IPv4 address that its guest was given (`senders`; a tap that is not in there gets nothing through), and what a link sends faster than it may
(`rates`) is dropped.

A whole table is removed and made anew in one transaction. `flush table` was rejected: it keeps sets and maps, so removed networks would
stay in them. Connections under way are not touched (their translation lives in conntrack). A container that comes or goes changes elements.

What it cannot do: an `accept` here ends only this table's chain. Where another table drops what is forwarded (docker sets iptables'
FORWARD policy to drop, ufw and firewalld do likewise), packets of our bridges are dropped there, and the administrator has to allow
them, with docker: `iptables -I DOCKER-USER -i isopod0 -j ACCEPT` and the same with `-o`.

Source: nft(8), https://wiki.nftables.org (netfilter hooks, base chain priorities, maps, stateful objects).
"""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from isopod.api.messages import PortMapping

BURST_BYTES: Final = 128 << 10
"""What a link may send at once after a pause, beside a second's worth that the kernel always adds: two of TCP's 64 KiB pieces."""


class Bridge(NamedTuple):
    """A bridge network as the filter sees it."""

    link: str
    subnet: str


class Plug(NamedTuple):
    """A container's link as the filter sees it."""

    link: str
    address: str
    mac: str = ""
    """Of a guest behind a tap: the only one it may send from."""
    ports: tuple[PortMapping, ...] = ()
    bytes_per_s_out: int | None = None

    @property
    def is_guarded(self) -> bool:
        """Whether it needs the bridge table."""
        return bool(self.mac) or self.bytes_per_s_out is not None


def render_table(table: str, bridges: Sequence[Bridge], plugs: Sequence[Plug] = ()) -> str:
    """Return the script that replaces the whole inet table, whether or not it exists, in one transaction.

    Args:
        table: Its name.
        bridges: All bridge networks of the instance, at least one.
        plugs: The containers on them.
    """
    ours = ", ".join(f'"{b.link}"' for b in bridges)
    pairs = ", ".join(f'"{b.link}" . "{b.link}"' for b in bridges)
    return "\n".join(
        [
            *_replace(f"inet {table}"),
            *_block("set", "bridges", "ifname", ours),
            *_block("set", "inside", "ifname . ifname", pairs),
            *_block("map", "published", "inet_proto . inet_service : ipv4_addr . inet_service", _published(plugs)),
            *_block("map", "published_at", "ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service", _published_at(plugs)),
            *_chain("first", "type filter hook prerouting priority raw; policy accept;", _LOOPBACK),
            *_chain("forward", "type filter hook forward priority filter; policy accept;", _forward_rules()),
            *_chain("prerouting", "type nat hook prerouting priority dstnat; policy accept;", _PUBLISH),
            *_chain("output", "type nat hook output priority -100; policy accept;", _PUBLISH),
            *_chain("postrouting", "type nat hook postrouting priority srcnat; policy accept;", _masquerade_rules(bridges)),
            "}",
            "",
        ]
    )


def render_guard(table: str, plugs: Sequence[Plug]) -> str:
    """Return the script that replaces the whole bridge table.

    Args:
        table: Its name.
        plugs: The containers' links; those that are not guarded are left out.
    """
    limits = [line for plug in plugs for line in _limit(plug)]
    return "\n".join(
        [
            *_replace(f"bridge {table}"),
            *limits,
            *_block("map", "rates", "ifname : limit", _rates(plugs)),
            *_block("set", "senders", "ifname . ether_addr . ipv4_addr", _senders(plugs)),
            *_chain(
                "prerouting",
                "type filter hook prerouting priority -300; policy accept;",
                ["limit name iifname map @rates drop", f'iifname "{table}-t*" jump guest'],
            ),
            *_chain("guest", "", _GUEST),
            "}",
            "",
        ]
    )


def render_guard_removal(table: str) -> str:
    """Return the script that removes the bridge table, whether or not it exists."""
    return f"add table bridge {table}\ndelete table bridge {table}\n"


def render_added(table: str, plug: Plug) -> str:
    """Return the script that lets a container in; the guard's part only if it has one, whose table exists then."""
    lines = [
        *([f"add limit bridge {table} {plug.link} {{ {_rate(plug.bytes_per_s_out)} }}"] if plug.bytes_per_s_out is not None else []),
        *_elements(f"bridge {table} rates", _rates([plug])),
        *_elements(f"bridge {table} senders", _senders([plug])),
        *_elements(f"inet {table} published", _published([plug])),
        *_elements(f"inet {table} published_at", _published_at([plug])),
    ]
    return "".join(f"{line}\n" for line in lines)


def render_removed(table: str, plug: Plug) -> str:
    """Return the script that undoes `render_added`."""
    added = [line for line in render_added(table, plug).splitlines() if line.startswith("add element")]
    lines = [f"delete{line.removeprefix('add')}" for line in added]
    if plug.bytes_per_s_out is not None:
        lines.append(f"delete limit bridge {table} {plug.link}")
    return "".join(f"{line}\n" for line in lines)


_LOOPBACK: Final = ("iifname @bridges ip daddr 127.0.0.0/8 drop",)
_PUBLISH: Final = (
    "dnat ip to ip daddr . meta l4proto . th dport map @published_at",
    "fib daddr type local dnat ip to meta l4proto . th dport map @published",
)
_GUEST: Final = (
    "ether type ip iifname . ether saddr . ip saddr @senders accept",
    "ether type arp iifname . ether saddr . arp saddr ip @senders iifname . arp saddr ether . arp saddr ip @senders accept",
    "drop",
)


def _forward_rules() -> Sequence[str]:
    return (
        "ct state established,related accept",
        "iifname . oifname @inside accept",
        "oifname @bridges ct status dnat accept",
        "oifname @bridges drop",
    )


def _masquerade_rules(bridges: Sequence[Bridge]) -> Sequence[str]:
    # The host asks its own gateway's address over "lo": it is to be seen there as who it is.
    outward = [f'ip saddr {b.subnet} oifname != {{ "lo", "{b.link}" }} masquerade' for b in bridges]
    # Through a published port to a neighbour, or to itself: its answer would go the direct way, and be refused.
    inward = [f'ip saddr {b.subnet} oifname "{b.link}" ct status dnat masquerade' for b in bridges]
    return [*outward, *inward, "ip saddr 127.0.0.0/8 oifname @bridges masquerade"]


def _published(plugs: Iterable[Plug]) -> str:
    return ", ".join(f"{p.protocol} . {p.host_port} : {plug.address} . {p.port}" for plug in plugs for p in plug.ports if not p.host_ip)


def _published_at(plugs: Iterable[Plug]) -> str:
    return ", ".join(
        f"{p.host_ip} . {p.protocol} . {p.host_port} : {plug.address} . {p.port}" for plug in plugs for p in plug.ports if p.host_ip
    )


def _senders(plugs: Iterable[Plug]) -> str:
    return ", ".join(f'"{plug.link}" . {plug.mac} . {plug.address}' for plug in plugs if plug.mac)


def _rates(plugs: Iterable[Plug]) -> str:
    return ", ".join(f'"{plug.link}" : "{plug.link}"' for plug in plugs if plug.bytes_per_s_out is not None)


def _limit(plug: Plug) -> Sequence[str]:
    if plug.bytes_per_s_out is None:
        return ()
    return (f"\tlimit {plug.link} {{", f"\t\t{_rate(plug.bytes_per_s_out)}", "\t}")


def _rate(bytes_per_s: int | None) -> str:
    return f"rate over {bytes_per_s} bytes/second burst {BURST_BYTES} bytes"


def _elements(where: str, elements: str) -> Sequence[str]:
    return (f"add element {where} {{ {elements} }}",) if elements else ()


def _replace(table: str) -> Sequence[str]:
    return (f"add table {table}", f"delete table {table}", f"table {table} {{")


def _block(kind: str, name: str, of: str, elements: str) -> Sequence[str]:
    row = (f"\t\telements = {{ {elements} }}",) if elements else ()
    return (f"\t{kind} {name} {{", f"\t\ttype {of}", *row, "\t}")


def _chain(name: str, hook: str, rules: Sequence[str]) -> Sequence[str]:
    return (f"\tchain {name} {{", *((f"\t\t{hook}",) if hook else ()), *(f"\t\t{rule}" for rule in rules), "\t}")
