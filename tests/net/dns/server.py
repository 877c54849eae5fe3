"""A name server made of dnspython, on the network of either World, that can be told to misbehave."""

from collections.abc import Callable

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from isopod.net.tcp import Connection, TcpServer
from isopod.net.udp import UdpServer, serve_udp
from isopod.world.network import TcpAddress, UdpAddress
from isopod.world.world import World

Zone = dict[tuple[str, str], list[str]]
"""("name", "TYPE") to the texts of its records; a CNAME answers for every type."""
SOA = "ns.example. admin.example. 1 2 3 4 60"


class NameServer:
    """Answers from a zone.

    Args:
        zone: What it knows.
    """

    def __init__(self, zone: Zone) -> None:
        self.zone = zone
        self.ttl_s = 300
        self.rcode = dns.rcode.NOERROR
        self.truncates = False
        self.is_silent = False
        self.mangle: Callable[[bytes], list[bytes]] = lambda wire: [wire]
        self.asked: list[tuple[str, str]] = []
        self.n_tcp = 0
        self._udp: UdpServer | None = None
        self._tcp: TcpServer | None = None

    async def start(self, world: World) -> UdpAddress:
        self._tcp = TcpServer(world, self._serve_tcp)
        listener = await self._tcp.listen(TcpAddress("127.0.0.1", 0))
        assert isinstance(listener.address, TcpAddress)
        address = UdpAddress("127.0.0.1", listener.address.port)
        self._udp = await serve_udp(world, address, self._answer_udp)
        return address

    async def stop(self) -> None:
        assert self._udp is not None
        assert self._tcp is not None
        self._udp.close()
        await self._tcp.close()

    def respond(self, wire: bytes, *, tcp: bool) -> bytes:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        response = dns.message.make_response(query)
        name, kind = question.name.to_text(omit_final_dot=True).lower(), dns.rdatatype.to_text(question.rdtype)
        self.asked.append((name, kind))
        response.set_rcode(self.rcode)
        if self.truncates and not tcp:
            response.flags |= dns.flags.TC
            return response.to_wire()
        self._fill(response, name, kind)
        return response.to_wire()

    def _fill(self, response: dns.message.Message, name: str, kind: str) -> None:
        while (name, "CNAME") in self.zone and kind != "CNAME":
            target = self.zone[name, "CNAME"][0]
            response.answer.append(dns.rrset.from_text(name + ".", self.ttl_s, "IN", "CNAME", target))
            name = target.removesuffix(".")
            if name.endswith(".elsewhere") or len(response.answer) > 20:
                return
        texts = self.zone.get((name, kind))
        if texts:
            response.answer.append(dns.rrset.from_text(name + ".", self.ttl_s, "IN", kind, *texts))
            return
        if not any(known == name for known, _ in self.zone) and self.rcode == dns.rcode.NOERROR:
            response.set_rcode(dns.rcode.NXDOMAIN)
        response.authority.append(dns.rrset.from_text("example.", 900, "IN", "SOA", SOA))

    def _answer_udp(self, data: bytes, sender: UdpAddress) -> bytes | None:
        if self.is_silent:
            return None
        *forged, last = self.mangle(self.respond(data, tcp=False))
        for each in forged:
            assert self._udp is not None
            assert self._udp._transport is not None
            self._udp._transport.sendto(each, tuple(sender))
        return last

    async def _serve_tcp(self, connection: Connection) -> None:
        self.n_tcp += 1
        query = await connection.readexactly(int.from_bytes(await connection.readexactly(2), "big"))
        answer = self.respond(query, tcp=True)
        connection.write(len(answer).to_bytes(2, "big") + answer)
        await connection.read()
