"""Proposals: commands that wait for their turn, and those whose entry is under way, until their result is known.

All that waits in one turn of the loop goes into one entry (several, if it is much). At most `rounds_max` such rounds are under way: while
the disk and the followers are busy with them, the next round fills up. So the number of entries follows the disk's speed and not the number
of callers.

Every proposal ends in exactly one of: its result; `DeadlineExceeded` or `LeadershipLost` (it may or may not be applied); `NotLeader`
(it certainly is not). Rules: nothing here awaits; what waits is bounded in number and bytes; a deadline costs no timer of its own.
"""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any, Final

from isopod.cluster.raft.codec import encode_envelope
from isopod.cluster.raft.core import ProposalDropped, RaftCore
from isopod.cluster.raft.ports import Waiter
from isopod.cluster.raft.settings import RaftSettings
from isopod.net.rpc.deadlines import Deadlines
from isopod.world.errors import DeadlineExceeded, Exhausted, IsopodError, TooLarge

RETRY_AFTER_S: Final = 0.05
_Open = tuple[Waiter, float, float, int]
"""Who waits for the result, until when, since when, and the command's length."""


class Proposals:
    """The proposals of one node.

    Args:
        loop: Whose time counts.
        settings: Bounds.
        round_bytes_max: After how much a round takes no further entry.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, settings: RaftSettings, *, round_bytes_max: int = 4 << 20) -> None:
        self.n_proposed = 0
        self.n_failed = 0
        self.n_alone = 0
        """How many in a row came while none was under way."""
        self._loop = loop
        self._settings = settings
        self._round_bytes_max = round_bytes_max
        self._open: dict[int, _Open] = {}
        self._n_ids = 0
        self._n_bytes = 0
        self.waiting: list[tuple[int, bytes]] = []
        """What was not proposed yet; to be looked at only."""
        self._rounds: dict[int, tuple[int, list[int]]] = {}
        self._round_ends: dict[int, None] = {}
        self._deadlines = Deadlines(loop, self._open_deadlines, self._on_expired)

    def __len__(self) -> int:
        """Return how many have no result yet."""
        return len(self._open)

    @property
    def has_waiting(self) -> bool:
        """Whether a round could begin."""
        return bool(self.waiting) and len(self._round_ends) < self._settings.rounds_max

    def add(self, command: bytes, timeout_s: float, waiter: Waiter) -> None:
        """Queue a command; the waiter gets its result.

        Raises:
            TooLarge: It is over the limit.
            Exhausted: Too much waits already; it was not begun.
        """
        settings = self._settings
        n_bytes = len(command)
        if n_bytes > settings.command_bytes_max:
            raise TooLarge("a proposal", n_bytes, settings.command_bytes_max)
        if len(self._open) >= settings.proposals_max:
            raise Exhausted("proposals under way", str(settings.proposals_max), retry_after_s=RETRY_AFTER_S)
        if self._n_bytes + n_bytes > settings.proposal_bytes_max:
            raise Exhausted("bytes of proposals under way", str(settings.proposal_bytes_max), retry_after_s=RETRY_AFTER_S)
        now = self._loop.time()
        self.n_alone = 0 if self._open else self.n_alone + 1
        self._n_ids = number = self._n_ids + 1
        self._open[number] = (waiter, now + timeout_s, now, n_bytes)
        self._n_bytes += n_bytes
        self.waiting.append((number, command))
        self._deadlines.note(now + timeout_s)

    def propose(self, core: RaftCore, term: int, stamp_ns: int) -> int:
        """Hand what waits to the core as one round of entries; return the index of the last one, 0 if it took none.

        Args:
            core: A leader's.
            term: The present one.
            stamp_ns: The leader's time.

        Raises:
            ProposalDropped: The core is no leader any more.
        """
        entries: list[bytes] = []
        members: list[list[int]] = []
        n_bytes = n_taken = 0
        for numbers, commands, position in self._fill():
            members.append(numbers)
            entries.append(encode_envelope(stamp_ns, commands))
            n_taken = position
            n_bytes += len(entries[-1])
            if n_bytes >= self._round_bytes_max:
                break
        if not entries:
            self.waiting.clear()
            return 0
        try:
            last_index = core.propose_many(entries)
        except ProposalDropped as error:
            if error.why == "not_leader":
                raise
            return 0  # what is uncommitted will be committed, or a hand-over end: they wait
        del self.waiting[:n_taken]
        index = last_index - len(members)
        for numbers in members:
            index += 1
            self._rounds[index] = (term, numbers)
            self.n_proposed += len(numbers)
        self._round_ends[last_index] = None
        return last_index

    def applied(self, index: int, term: int, results: Sequence[Any]) -> None:
        """An entry was applied: its callers get their results, if it is the one that was proposed here."""
        found = self._rounds.pop(index, None)
        if found is None:
            return
        self._round_ends.pop(index, None)
        own_term, numbers = found
        if own_term != term:  # a later leader's entry took this index; leaving the term told the callers already
            return
        is_open = self._open
        for number, result in zip(numbers, results, strict=True):
            entry = is_open.pop(number, None)
            if entry is not None:
                self._n_bytes -= entry[3]
                if not entry[0].done():
                    entry[0].set_result(result)

    def lose(self, unknown: IsopodError, not_begun: IsopodError) -> None:
        """This node leads no more.

        Args:
            unknown: For those whose entries are under way.
            not_begun: For those that waited.
        """
        waiting = dict(self.waiting)
        for number in list(self._open):
            self._fail(number, not_begun if number in waiting else unknown)
        self.waiting.clear()
        self._rounds.clear()
        self._round_ends.clear()

    def close(self, error: IsopodError) -> None:
        """Fail what is open."""
        self._deadlines.close()
        self.lose(error, error)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _fill(self) -> Iterator[tuple[list[int], list[bytes], int]]:
        """Cut what waits into entries, each with its end in the queue; those who gave up meanwhile are left out."""
        entry_bytes_max = self._settings.entry_bytes_max
        numbers: list[int] = []
        commands: list[bytes] = []
        n_bytes = 0
        is_open = self._open
        for position, (number, command) in enumerate(self.waiting):
            if number not in is_open:
                continue
            if n_bytes + len(command) > entry_bytes_max and commands:
                yield numbers, commands, position
                numbers, commands, n_bytes = [], [], 0
            numbers.append(number)
            commands.append(command)
            n_bytes += len(command)
        if commands:
            yield numbers, commands, len(self.waiting)

    def _fail(self, number: int, error: IsopodError) -> None:
        waiter, _, _, n_bytes = self._open.pop(number)
        self._n_bytes -= n_bytes
        self.n_failed += 1
        if not waiter.done():
            waiter.set_exception(error)

    def _open_deadlines(self) -> Iterator[tuple[int, float | None]]:
        for number, entry in self._open.items():
            yield number, entry[1]

    def _on_expired(self, number: int) -> None:
        entry = self._open.get(number)
        if entry is not None:
            self._fail(number, DeadlineExceeded("the proposal", entry[1] - entry[2]))
