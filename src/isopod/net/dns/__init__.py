"""Names to addresses: a caching resolver over the machine's own, a DNS client of our own for what that cannot be asked, a small server."""

from isopod.net.dns.client import Answer, DnsClient
from isopod.net.dns.message import MalformedMessage, RecordType
from isopod.net.dns.resolver import Lookup, Resolver, ResolverLimits, ResolverStatistics
from isopod.net.dns.server import DnsServer, Known, ServerLimits, ServerStatistics

__all__ = [
    "Answer",
    "DnsClient",
    "DnsServer",
    "Known",
    "Lookup",
    "MalformedMessage",
    "RecordType",
    "Resolver",
    "ResolverLimits",
    "ResolverStatistics",
    "ServerLimits",
    "ServerStatistics",
]
