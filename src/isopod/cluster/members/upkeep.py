"""Upkeep: what must be done now and then on every node: its certificate renewed in time, the disk's copy of the addresses kept.

A certificate is renewed when a third of its time is left, with a new key, by any voter; a voter signs its own. Connections that stand keep
what they began with, new ones get the new certificate: nothing is started anew.
"""

import asyncio
from typing import Final

from isopod.cluster.members import wire as w
from isopod.cluster.members.book import Book
from isopod.cluster.members.config import ClusterConfig
from isopod.cluster.members.credentials import Credentials
from isopod.cluster.members.links import Links
from isopod.net.ca import certificate_request
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry as Metrics
from isopod.world.errors import HandshakeFailed, IsopodError, NotStarted

LOOK_S: Final = 60.0
RENEW_AT: Final = 1 / 3
CALL_S: Final = 10.0


class Upkeep:
    """The chores of one node.

    Args:
        config: What the node was told.
        credentials: Its certificate.
        book: Where the others are.
        links: Ways to them.
        logger: Told of renewals.
        metrics: Counts.
    """

    def __init__(
        self, config: ClusterConfig, credentials: Credentials, *, book: Book, links: Links, logger: Logger, metrics: Metrics
    ) -> None:
        self._config = config
        self._credentials = credentials
        self._book = book
        self._links = links
        self._logger = logger
        self._remaining = metrics.gauge("isopod_cluster_certificate_remaining_seconds", "How long this node's certificate is still valid.")
        self._renewals = metrics.counter("isopod_cluster_certificate_renewals_total", "Certificates this node got anew.")

    async def run(self) -> None:
        """Look now and then until cancelled."""
        while True:
            try:
                await self._book.save()
                await self.renew_if_due()
            except IsopodError as error:
                self._logger.warning("cluster.upkeep_failed", why=error.message)
            await asyncio.sleep(min(LOOK_S, self._config.certificate_s * RENEW_AT / 4))

    async def renew_if_due(self) -> bool:
        """Renew the certificate if little time is left; return whether that was done.

        Raises:
            IsopodError: No voter would sign it; it is tried again.
        """
        remaining_s = self._credentials.remaining_s()
        self._remaining.set(remaining_s)
        if remaining_s > self._config.certificate_s * RENEW_AT:
            return False
        await self.renew()
        return True

    async def renew(self) -> None:
        """Get a new certificate for a new key. Raises as `renew_if_due`."""
        bearer = self._credentials.bearer
        if bearer is None:
            return
        own = certificate_request(f"isopod node {bearer.node_id}")
        if self._credentials.authority is not None:
            certificate = self._credentials.sign(own.certificate, bearer, valid_s=self._config.certificate_s)
            reply = w.RenewReply(certificate=certificate, authorities=self._credentials.authorities)
        else:
            reply = await self._ask(w.RenewRequest(request=own.certificate))
        if reply.authorities != self._credentials.authorities:
            raise HandshakeFailed("the node that signs", "its certificate for us is of another authority: compare tls/ca.crt on both")
        await self._credentials.install(reply.certificate, own.key, reply.authorities)
        self._renewals.inc()
        self._logger.info("cluster.certificate_renewed", remaining_s=round(self._credentials.remaining_s()))

    async def _ask(self, request: w.RenewRequest) -> w.RenewReply:
        last: IsopodError = NotStarted("members", "no other node is known that could sign")
        for peer in self._book.all():
            if peer.role == "voter" and peer.node_id != self._config.node_id:
                try:
                    return await self._links.call(peer.node_id, w.RENEW, request, timeout_s=CALL_S)
                except IsopodError as error:
                    last = error
        raise last
