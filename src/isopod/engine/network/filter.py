"""The one nftables table of an instance, as text for `Kernel.apply_filter`. Pure.

What it does, for the bridges of the instance: containers reach the outside under the host's address (masquerade); the outside reaches a
container only in answers, or through a published port; two networks do not reach each other either; a container reaches the host itself, as
with docker. `published` maps a host's protocol and port to a container's address and port: one element per published port and no proxy
process; it is empty until ports are published, and elements put into it are part of the next whole table, because:

The script removes the table and makes it anew in one transaction. `flush table` was rejected: it keeps sets and maps, so removed
networks would stay in them. Connections under way are not touched (their translation lives in conntrack).

What it cannot do: an `accept` here ends only this table's chain. Where another table drops what is forwarded (docker sets iptables'
FORWARD policy to drop, ufw and firewalld do likewise), packets of our bridges are dropped there, and the administrator has to allow
them, with docker: `iptables -I DOCKER-USER -i isopod0 -j ACCEPT` and the same with `-o`.

Source: nft(8), https://wiki.nftables.org (netfilter hooks, base chain priorities, maps).
"""

from collections.abc import Sequence
from typing import NamedTuple


class Bridge(NamedTuple):
    """A bridge network as the filter sees it."""

    link: str
    subnet: str


def render_table(table: str, bridges: Sequence[Bridge]) -> str:
    """Return the script that replaces the whole table, whether or not it exists, in one transaction.

    Args:
        table: Its name, in family inet.
        bridges: All bridge networks of the instance, at least one.
    """
    ours = ", ".join(f'"{b.link}"' for b in bridges)
    pairs = ", ".join(f'"{b.link}" . "{b.link}"' for b in bridges)
    return "\n".join(
        [
            f"add table inet {table}",
            f"delete table inet {table}",
            f"table inet {table} {{",
            *_set("bridges", "ifname", ours),
            *_set("inside", "ifname . ifname", pairs),
            "\tmap published {",
            "\t\ttype inet_proto . inet_service : ipv4_addr . inet_service",
            "\t}",
            *_chain("forward", "type filter hook forward priority filter; policy accept;", _forward_rules()),
            *_chain("prerouting", "type nat hook prerouting priority dstnat; policy accept;", _PUBLISH),
            *_chain("output", "type nat hook output priority -100; policy accept;", _PUBLISH),
            *_chain("postrouting", "type nat hook postrouting priority srcnat; policy accept;", _masquerade_rules(bridges)),
            "}",
            "",
        ]
    )


_PUBLISH = ("fib daddr type local dnat ip to meta l4proto . th dport map @published",)


def _forward_rules() -> Sequence[str]:
    return (
        "ct state established,related accept",
        "iifname . oifname @inside accept",
        "oifname @bridges ct status dnat accept",
        "oifname @bridges drop",
    )


def _masquerade_rules(bridges: Sequence[Bridge]) -> Sequence[str]:
    return [f'ip saddr {b.subnet} oifname != "{b.link}" masquerade' for b in bridges]


def _set(name: str, kind: str, elements: str) -> Sequence[str]:
    return (f"\tset {name} {{", f"\t\ttype {kind}", f"\t\telements = {{ {elements} }}", "\t}")


def _chain(name: str, hook: str, rules: Sequence[str]) -> Sequence[str]:
    return (f"\tchain {name} {{", f"\t\t{hook}", *(f"\t\t{rule}" for rule in rules), "\t}")
