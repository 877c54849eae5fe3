"""What is seen of a core at its port: votes count as given when they are durable, and not before."""

from collections.abc import Sequence
from typing import Any, cast

from isopod.cluster.raft.codec import address_of
from isopod.cluster.raft.core import ConfState, CoreConfig, RaftCore, Ready, open_core
from isopod.testing.observe import ObservedCore, Watch

VOTE_OF_TERM_7 = b"\x08\x06" + address_of(1, 3) + b"\x20\x07"
REFUSED = VOTE_OF_TERM_7 + b"\x50\x01"


class Script:
    """A core that hands out scripted messages."""

    def __init__(self, core: RaftCore, *readies: Sequence[tuple[int, bytes]], must_sync: Sequence[int]) -> None:
        self._core = core
        self._must_sync = must_sync
        self._readies = list(enumerate(readies, 1))
        self.persisted: list[int] = []

    def ready(self) -> Ready | None:
        number, messages = self._readies.pop(0)
        return Ready(number, None, b"", b"", 0, 0, number in self._must_sync, [], list(messages), [], None, [], [])

    def on_persisted(self, number: int) -> None:
        self.persisted.append(number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


def watched(*readies: Sequence[tuple[int, bytes]], must_sync: Sequence[int] = ()) -> tuple[ObservedCore, Watch]:
    config = CoreConfig(id=1, seed=1, conf_state=ConfState(voters=(1, 2, 3)))
    watch = Watch(lambda: 0)
    return ObservedCore(cast(RaftCore, cast(Any, Script(open_core(config), *readies, must_sync=must_sync))), config, watch), watch


def restart(watch: Watch) -> list[str]:
    """Return what a start in term 7 without a vote breaks."""
    watch.invariants.on_start(1, 7, vote=0)
    return [violation.rule for violation in watch.invariants.violations]


def test_a_vote_counts_when_it_is_durable() -> None:
    core, watch = watched([(3, VOTE_OF_TERM_7)])
    core.ready()

    assert restart(watch) == []
    core.on_persisted(1)
    assert restart(watch) == ["durable vote"]


def test_writes_are_counted_that_the_core_waited_for_one_after_the_other() -> None:
    """Two that were written together are one, and what needed no write is none."""
    core, watch = watched([], [], [], [], must_sync=(1, 2, 4))
    for _ in range(3):
        core.ready()
    core.on_persisted(1)
    assert watch.n_durable == {1: 0}, "a newer one is still to be written"
    core.on_persisted(3)
    assert watch.n_durable == {1: 1}
    core.on_persisted(3)
    core.ready()
    core.on_persisted(4)
    assert watch.n_durable == {1: 2}


def test_what_is_durable_later_says_the_same_of_what_was_before() -> None:
    core, watch = watched([(3, VOTE_OF_TERM_7)], [])
    core.ready()
    core.ready()
    core.on_persisted(2)

    assert restart(watch) == ["durable vote"]


def test_a_refused_vote_is_none() -> None:
    core, watch = watched([(3, REFUSED)])
    core.ready()
    core.on_persisted(1)

    assert restart(watch) == []
