"""Names to addresses: a caching resolver over the machine's own, and a DNS client of our own for records the machine's cannot ask for."""

from isopod.net.dns.client import Answer, DnsClient
from isopod.net.dns.message import MalformedMessage, RecordType
from isopod.net.dns.resolver import Lookup, Resolver, ResolverLimits, ResolverStatistics

__all__ = [
    "Answer",
    "DnsClient",
    "Lookup",
    "MalformedMessage",
    "RecordType",
    "Resolver",
    "ResolverLimits",
    "ResolverStatistics",
]
