"""VmOrders: having another node start or stop a machine of its own, through the replicated store.

    isopod/vm-orders/NODE/ID     what is asked of a node; hangs on a lease, and goes when whoever asks is gone
    isopod/vm-answers/ID         what became of it; hangs on the same lease

The node that is meant watches its orders. It takes one by a transaction that removes it, does it, and writes the answer: so it is done once
or not at all. Whoever asks takes an order back, by the like transaction, if it lies too long: then it was not done, and never will be. One
that was taken and not answered in time may still be done, and that is what is said.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Literal

import msgspec

from isopod.api.store import Condition, Delete, Entry, KvChanges, StoreOperations, Txn
from isopod.faces.grpc.node import START_S, NodeLink
from isopod.runtime.tasks import TaskGroup
from isopod.world.errors import DeadlineExceeded, IsopodError, NotFound, UnavailableError, from_code

ORDERS: Final = "isopod/vm-orders/"
ANSWERS: Final = "isopod/vm-answers/"
TAKE_S: Final = 5.0
"""An order that nobody took by then is taken back."""
LEASE_S: Final = START_S + 30.0
AT_ONCE_MAX: Final = 16
AGAIN_S: Final = 1.0
Verb = Literal["start", "stop"]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked: of the machine `name`, to be done within so many seconds."""

    name: str
    verb: Verb
    within_s: float


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of it: nothing if it was done, else an error of the tree."""

    code: str = ""
    message: str = ""
    hint: str = ""


Do = Callable[[Order], Awaitable[None]]


class VmOrders:
    """Orders to other nodes, and those for this one.

    Args:
        node: This one.
        store: The replicated store.
        do: Carries out an order for this node; raises why it could not.
    """

    def __init__(self, node: NodeLink, store: StoreOperations, do: Do) -> None:
        self._node = node
        self._store = store
        self._do = do
        self._own = f"{ORDERS}{node.node_id}/"
        self._room = asyncio.Semaphore(AT_ONCE_MAX)

    async def give(self, node_id: int, order: Order) -> None:
        """Have a node carry out an order; return when it has.

        Args:
            node_id: Which.
            order: What; `within_s` bounds the wait for its answer.

        Raises:
            UnavailableError: The node takes no orders now; nothing was done.
            DeadlineExceeded: It has taken the order and not answered: it may still be done.
            IsopodError: What the node said, or the store.
        """
        until_s = asyncio.get_running_loop().time() + order.within_s
        identifier = self._node.world.random.token_hex(16)
        key = f"{ORDERS}{node_id}/{identifier}"
        lease = await self._store.lease_grant(LEASE_S, timeout_s=order.within_s)
        try:
            async with self._store.watch(f"{ANSWERS}{identifier}", exact=True, from_revision=1 + await self._revision()) as watch:
                await self._store.put(key, msgspec.json.encode(order), lease=lease)
                answer = await self._wait(watch.__aiter__(), min(TAKE_S, order.within_s))
                if answer is None:
                    if await self._remove(key):
                        hint = "is it up, and is its setting grpc.listen set?"
                        raise UnavailableError(f"node {node_id} takes no orders for its machines now: nothing was done", hint)
                    answer = await self._wait(watch.__aiter__(), until_s - asyncio.get_running_loop().time())
        finally:
            await self._forget(lease)
        if answer is None:
            raise DeadlineExceeded(f"to {order.verb} VM '{order.name}' on node {node_id} (it may still be done)", order.within_s)
        if answer.code:
            raise from_code(answer.code, answer.message, answer.hint)

    async def run(self) -> None:
        """Carry out what is asked of this node, until cancelled."""
        entries, revision = await self._store.list_all(self._own)
        async with TaskGroup("vm orders") as group:
            for entry in entries:
                group.create_task(self._carry_out(entry))
            async with self._store.watch(self._own, from_revision=revision + 1) as watch:
                async for changes in watch:
                    for entry in changes.entries:
                        if not entry.is_deleted:
                            group.create_task(self._carry_out(entry))

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _carry_out(self, entry: Entry) -> None:
        try:
            order = msgspec.json.decode(entry.value, type=Order)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return  # the key space is everybody's
        try:
            async with self._room:
                if not await self._remove(entry.key, entry.mod_revision):
                    return  # it was taken back
                answer = await self._answer(order)
            await self._store.put(ANSWERS + entry.key.removeprefix(self._own), msgspec.json.encode(answer), lease=entry.lease)
        except NotFound:
            pass  # the lease is over: nobody waits any more
        except IsopodError as error:
            self._node.logger.warning("grpc.order_lost", name=order.name, verb=order.verb, why=error.message)

    async def _answer(self, order: Order) -> Answer:
        try:
            async with asyncio.timeout(min(START_S, order.within_s)):
                await self._do(order)
        except TimeoutError:
            error: IsopodError = DeadlineExceeded(f"to {order.verb} VM '{order.name}'", order.within_s)
        except IsopodError as failure:
            error = failure
        else:
            return Answer()
        return Answer(code=error.code, message=error.message, hint=error.hint)

    async def _wait(self, changes: AsyncIterator[KvChanges], timeout_s: float) -> Answer | None:
        """Return the answer, None if there is none in time."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                async for each in changes:
                    for entry in each.entries:
                        if not entry.is_deleted:
                            return msgspec.json.decode(entry.value, type=Answer)
        except TimeoutError:
            pass
        return None

    async def _revision(self) -> int:
        return (await self._store.get(self._own)).revision

    async def _remove(self, key: str, revision: int = 0) -> bool:
        """Remove an order if it is still there; return whether it was."""
        condition = Condition(key, "mod_revision", "=", revision) if revision else Condition(key, "version", ">", 0)
        return (await self._store.txn(Txn((condition,), (Delete(key),)))).succeeded

    async def _forget(self, lease: int) -> None:
        try:
            await self._store.lease_revoke(lease)
        except IsopodError as error:  # it ends by itself
            self._node.logger.debug("grpc.lease_left", why=error.message)
