"""Published ports and rates on the command line: the values of -p and --network-rate, and `isopod port`."""

from __future__ import annotations

from isopod.cli.lean import number_of, rows_of, text_of
from isopod.cli.say import invalid, open_link, say
from isopod.world.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from isopod.cli.lean import Link
    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body

PORT_MAX: Final = 65535
RANGE_MAX: Final = 512
_HINT: Final = "for example -p 8080:80, -p 127.0.0.1:5353:53/udp, -p 8000-8009:9000-9009"


def published(texts: list[str]) -> list[Body]:
    """Return the PortMappings that -p options describe.

    Raises:
        InvalidArgument: One is not of the form [[IP:]HOST:]PORT[/PROTOCOL], each a number or a range of as many.
    """
    return [mapping for text in texts for mapping in _mappings(text)]


def rates(text: str) -> Body:
    """Return the limits that --network-rate describes: RATE for both directions, or RECEIVE:SEND, one of which may be empty.

    Raises:
        InvalidArgument: It is not of that form.
    """
    receive, colon, send = text.partition(":")
    if not colon:
        send = receive
    if not receive and not send:
        raise invalid("network rate", text, "want bytes a second", "for example 10m, or 10m:1m to receive and to send")
    return {
        "network_in_bytes_per_s": parse_size(receive) if receive else None,
        "network_out_bytes_per_s": parse_size(send) if send else None,
    }


def port(parsed: Parsed) -> int:
    """`isopod port`: what is published of a container, a line for each port; with PORT only what leads there.

    Raises:
        InvalidArgument: PORT is none.
        NotFound: Nothing leads to PORT.
    """
    name, *wanted = parsed.words
    if len(wanted) > 1:
        raise invalid("argument", wanted[1], "one port at a time")
    with open_link(parsed) as link:
        lines = _published_of(link, name, *_wanted(wanted))
    if wanted and not lines:
        from isopod.world.errors import NotFound

        raise NotFound(f"published port of container {name}", wanted[0], f"see: isopod port {name}")
    say("".join(line + "\n" for line in lines))
    return 0


def _published_of(link: Link, name: str, number: int, protocol: str) -> list[str]:
    lines: list[str] = []
    for row in rows_of(link.call("container.inspect", {"name": name}).get("network"), "published"):
        where = f"{text_of(row, 'host_ip') or '0.0.0.0'}:{number_of(row, 'host_port')}"  # noqa: S104 - printed
        inside = (number_of(row, "port"), text_of(row, "protocol"))
        if not number:
            lines.append(f"{inside[0]}/{inside[1]} -> {where}")
        elif inside == (number, protocol):
            lines.append(where)
    return lines


def _wanted(words: list[str]) -> tuple[int, str]:
    """Return the port that is asked for and its protocol, (0, "") for all."""
    if not words:
        return 0, ""
    number, slash, protocol = words[0].partition("/")
    return _range(number, words[0])[0], _protocol(protocol if slash else "tcp", words[0])


def _mappings(text: str) -> list[Body]:
    body, slash, protocol = text.partition("/")
    parts = body.split(":")
    if len(parts) > 3 or not parts[-1]:
        raise invalid("port", text, "want [[IP:]HOST:]PORT[/tcp or /udp], IP an IPv4 address", _HINT)
    inside = _range(parts[-1], text)
    outside = _range(parts[-2], text) if len(parts) > 1 and parts[-2] else [0] * len(inside)
    if len(outside) != len(inside):
        raise invalid("port", text, f"{len(outside)} ports of the host for {len(inside)} of the container", _HINT)
    if len(parts) == 2 and not parts[0]:
        raise invalid("port", text, "there is nothing before the colon", _HINT)
    shared: Body = {"host_ip": parts[0] if len(parts) == 3 else "", "protocol": _protocol(protocol if slash else "tcp", text)}
    return [{"port": there, "host_port": here, **shared} for here, there in zip(outside, inside, strict=True)]


def _range(text: str, whole: str) -> list[int]:
    first, dash, last = text.partition("-")
    numbers = [int(word) if word.isascii() and word.isdigit() and len(word) <= 5 else 0 for word in (first, last if dash else first)]
    if not 1 <= numbers[0] <= numbers[1] <= PORT_MAX:
        raise invalid("port", whole, f"{text!r} is neither a port from 1 to {PORT_MAX} nor a range of ports", _HINT)
    if numbers[1] - numbers[0] >= RANGE_MAX:
        raise invalid("port", whole, f"want at most {RANGE_MAX} ports")
    return list(range(numbers[0], numbers[1] + 1))


def _protocol(word: str, whole: str) -> str:
    if word not in ("tcp", "udp"):
        raise invalid("port", whole, f"{word!r} is neither tcp nor udp")
    return word
