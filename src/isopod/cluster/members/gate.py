"""Gate: which verbs of the cluster's port a caller reaches, by the certificate it showed.

    no certificate, or none of this cluster     member.enrol alone
    a member's, whose record is another life's  nothing: it was removed, or its id is another node's now
    an agent's                                  what agents do: signs of life, new certificates, messages, looking at the status
    a current member's, voter or learner        everything

An agent's machine runs other people's containers: whoever takes it over must not get at tokens, keys or votes.

The listener asks for a certificate without demanding one, because a node that enrols has none yet; this is where it is demanded. It wraps
every handler, so a verb that is added later is shut by default. A connection's answer is found once and kept for as long as the records do
not change.
"""

import inspect
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Final

from isopod.cluster.members.book import Book
from isopod.cluster.members.credentials import bearer_of
from isopod.cluster.members.wire import ENROL
from isopod.net.rpc.call import AnyCall, AnyHandler, AnyMethod, Caller
from isopod.world.errors import ForeignCluster, IdentityConflict, RefusedError

OPEN: Final = (ENROL.name,)
"""What anybody may call."""
AGENTS: Final = ("member.admit", "member.beat", "member.renew", "message.send", "cluster.status")
"""What agents may call besides."""


class Gate:
    """Wraps handlers.

    Args:
        book: Who is who.
        secured: False lets everybody in: without TLS there is nothing to look at.
    """

    def __init__(self, book: Book, *, secured: bool) -> None:
        self._book = book
        self._is_secured = secured
        self._passed: weakref.WeakKeyDictionary[Caller, tuple[int, bool]] = weakref.WeakKeyDictionary()

    def wrap(self, handlers: Mapping[AnyMethod, AnyHandler] | Iterable[tuple[AnyMethod, AnyHandler]]) -> dict[AnyMethod, AnyHandler]:
        """Return the handlers, each behind the gate unless it is open to all."""
        table = dict(handlers)
        if not self._is_secured:
            return table
        return {method: handler if method.name in OPEN else self._guard(handler) for method, handler in table.items()}

    def check(self, call: AnyCall) -> None:
        """Let a call pass.

        Raises:
            RefusedError: It may not; what to do is in the hint.
        """
        caller = call.caller
        registry = self._book.registry
        version = registry.version if registry is not None else -1
        passed = self._passed.get(caller)
        if passed is None or passed[0] != version:
            passed = self._passed[caller] = (version, self._look(call))
        if passed[1] and call.method not in AGENTS:
            raise RefusedError(f"an agent may not call {call.method}", "ask a node that holds a replica")

    def _look(self, call: AnyCall) -> bool:
        """Look at a certificate; return whether it is an agent's."""
        bearer = bearer_of(call.identity)
        if bearer is None:
            raise RefusedError("only members of the cluster may ask that", "enrol first: isopod node --join ADDRESS --token TOKEN")
        if bearer.cluster_id != self._book.cluster_id:
            raise ForeignCluster(f"node {bearer.node_id}", bearer.cluster_id, self._book.cluster_id)
        if not self._book.is_current(bearer.node_id, bearer.incarnation):
            raise removed_error(bearer.node_id)
        return bearer.role == "agent"

    def _guard(self, handler: AnyHandler) -> AnyHandler:
        check = self.check
        if inspect.iscoroutinefunction(handler):

            async def wait(call: AnyCall, request: Any) -> Any:  # of the method's types
                check(call)
                return await handler(call, request)

            return wait

        def answer(call: AnyCall, request: Any) -> Any:  # of the method's types
            check(call)
            return handler(call, request)

        return answer


def removed_error(node_id: int) -> IdentityConflict:
    """Return the error of a node whose life in the cluster is over, or whose id belongs to another."""
    return IdentityConflict(
        node_id,
        "this incarnation of it is no member any more: it left, was removed, or its id was given to another",
        "to come back: empty its data folder, and join with a new token",
    )
