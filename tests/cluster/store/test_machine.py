"""StoreMachine: what operations do, that equal logs make equal machines, and that nothing a command says can do harm."""

import os
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.api.store import messages as m
from isopod.api.store.messages import Condition, Delete, Deleted, DeletePrefix, Entry, Get, Page, Put, Range, Refusal, Txn, TxnResult
from isopod.cluster.raft.ports import Batch
from isopod.cluster.store.image import PIECE_BYTES, Image, finish, pack_in_pieces, unpack_in_pieces
from isopod.cluster.store.machine import MachineLimits, StoreMachine
from isopod.cluster.store.sessions import SessionLimits
from isopod.world.errors import BadRecord
from tests.cluster.store.rig import SECOND_NS, Feeder, command, decode_outcome, encode

pytestmark = pytest.mark.row("B12")
KEYS = st.sampled_from(["a", "a/1", "a/2", "ab", "b", "b/1", "ü"])
VALUES = st.binary(max_size=3)
PLAIN = st.one_of(
    st.builds(Put, KEYS, VALUES),
    st.builds(Delete, KEYS),
    st.builds(DeletePrefix, st.sampled_from(["a", "b/", "c"])),
    st.builds(Get, KEYS),
    st.builds(Range, st.sampled_from(["", "a", "a/", "z"]), st.integers(1, 3), st.sampled_from(["", "a", "a/1"])),
)
CONDITIONS = st.one_of(
    st.builds(
        Condition,
        KEYS,
        st.sampled_from(["version", "mod_revision", "create_revision"]),
        st.sampled_from("= != < >".split()),
        st.integers(0, 5),
    ),
    st.builds(lambda key, relation, value: Condition(key, "value", relation, 0, value), KEYS, st.sampled_from("= != < >".split()), VALUES),
)
TXNS = st.builds(
    lambda c, t, o: Txn(tuple(c), tuple(t), tuple(o)),
    st.lists(CONDITIONS, max_size=2),
    st.lists(PLAIN, max_size=4),
    st.lists(PLAIN, max_size=3),
)
OPS = st.one_of(PLAIN, TXNS)


class Model:
    """The store as simply as it can be said: key to (value, create, mod, version)."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[bytes, int, int, int]] = {}
        self.revision = 0

    def do(self, op: Any, revision: int | None = None) -> Any:
        at = self.revision + 1 if revision is None else revision
        match op:
            case Put(key=key, value=value):
                old = self.rows.get(key)
                self.rows[key] = (value, old[1] if old else at, at, old[3] + 1 if old else 1)
                self.revision = at
                return at
            case Delete(key=key):
                return self._delete([key] if key in self.rows else [], at)
            case DeletePrefix(prefix=prefix):
                return self._delete([key for key in self.rows if key.startswith(prefix)], at)
            case Get(key=key):
                return self._page([key] if key in self.rows else [], 10)
            case Range(prefix=prefix, limit=limit, after=after):
                return self._page([key for key in sorted(self.rows) if key.startswith(prefix) and key > after], limit)
            case Txn():
                ok = all(self._holds(condition) for condition in op.conditions)
                results = tuple(self.do(part, at) for part in (op.then if ok else op.otherwise))
                return TxnResult(ok, self.revision, results)
        raise AssertionError(op)

    def _delete(self, keys: list[str], at: int) -> Deleted:
        for key in keys:
            del self.rows[key]
            self.revision = at
        return Deleted(self.revision, len(keys))

    def _page(self, keys: list[str], limit: int) -> Page:
        entries = tuple(m.Entry(key, *self.rows[key], 0) for key in keys[:limit])
        return Page(entries, len(keys) > limit)

    def _holds(self, condition: Condition) -> bool:
        row = self.rows.get(condition.key)
        if condition.what == "value":
            return condition.relation == "!=" if row is None else self._compare(row[0], condition.relation, condition.value)
        place = {"create_revision": 1, "mod_revision": 2, "version": 3}[condition.what]
        return self._compare(0 if row is None else row[place], condition.relation, condition.number)

    @staticmethod
    def _compare(found: Any, relation: str, wanted: Any) -> bool:
        return {"=": bool(found == wanted), "!=": bool(found != wanted), "<": bool(found < wanted), ">": bool(found > wanted)}[relation]


@given(st.lists(st.lists(OPS, min_size=1, max_size=6), max_size=10))
@settings(max_examples=200, deadline=None)
def test_does_what_a_dict_would(commands: list[list[Any]]) -> None:
    feeder, model = Feeder(), Model()
    for ops in commands:
        [outcome] = feeder.feed(command(*ops))
        assert outcome.results == [model.do(op) for op in ops]
    assert {key: (e.value, e.create_revision, e.mod_revision, e.version) for key, e in feeder.machine.keys.entries.items()} == model.rows
    assert [entry.key for entry in feeder.machine.entries("")] == sorted(model.rows)


@given(st.lists(st.lists(OPS, min_size=1, max_size=4), max_size=12), st.integers(0, 12), st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_snapshot_and_the_rest_of_the_log_are_as_the_whole_log(batches: list[list[Any]], cut: int, asked: bool) -> None:
    whole = Feeder()
    restored = StoreMachine()
    for number, ops in enumerate(batches):
        if number == cut:
            restored.restore(whole.machine.snapshot())
        if asked:
            whole.machine.digest()  # looking changes nothing
        whole.feed(command(*ops), after_s=1)
    if cut >= len(batches):
        restored.restore(whole.machine.snapshot())
    for batch in whole.batches[cut:]:
        restored.apply(batch)
    assert restored.digest() == whole.machine.digest()
    assert restored.snapshot() == whole.machine.snapshot()


SCRIPT = """
import random
from tests.cluster.store.rig import Feeder, command, encode
from isopod.api.store import messages as m
chance = random.Random(7)
feeder = Feeder()
words = []
for number in range(300):
    key = f"k{chance.randrange(40)}/{chance.randrange(4)}"
    op = chance.choice([m.Put(key, chance.randbytes(5)), m.Delete(key), m.DeletePrefix(key[:2]), m.LeaseGrant(2000), m.SessionOpen(),
                        m.Put(key, b"x", chance.randrange(9)), m.LeaseRevoke(chance.randrange(9)), m.Range("k", 5), m.Checkpoint(),
                        m.Compact(max(0, feeder.machine.revision - 5))])
    words.append(repr(feeder.feed(command(op), after_s=chance.random())))
print(feeder.machine.digest(), hash(encode(words)) * 0, len("".join(words)))
"""


@pytest.mark.row("B22")
def test_equal_logs_make_equal_machines_whatever_the_hash_seed() -> None:
    found = []
    for seed in ("0", "1", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(["src", "."])}
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True, timeout=50)
        found.append(done.stdout)
    assert found[0].strip()
    assert found == [found[0]] * 3


@pytest.mark.parametrize("op", [Put("a", b"!"), Put("c", b"1"), Delete("b"), m.LeaseGrant(1000), m.SessionOpen(), m.Compact(1)])
def test_a_digest_says_when_states_differ_and_only_then(op: m.Op) -> None:
    one, other = Feeder(), Feeder()
    one.do(Put("a", b"1"), Put("b", b"2"))
    other.do(Put("a", b"1"))
    assert one.machine.digest() != other.machine.digest()
    other.do(Put("b", b"2"))
    assert one.machine.digest() == other.machine.digest(), "how many batches it took is no part of the state"
    one.do(op)
    other.do(Get("a"))
    assert one.machine.digest() != other.machine.digest()


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_a_command_that_comes_again_is_answered_again_and_not_applied() -> None:
    feeder = Feeder()
    session = feeder.do(m.SessionOpen()).session
    put = command(Put("a", b"1"), Txn((), (Put("b", b"2"),)), session=session, seq=1, floor=1)
    first = feeder.feed(put)
    digest = feeder.machine.digest()
    assert feeder.feed(put, put) == first * 2
    assert feeder.machine.digest() == digest
    assert feeder.machine.revision == 2
    # A snapshot keeps what was answered.
    restored = Feeder(StoreMachine())
    restored.machine.restore(feeder.machine.snapshot())
    assert restored.feed(put) == first


def test_replies_that_were_received_are_forgotten() -> None:
    feeder = Feeder()
    session = feeder.do(m.SessionOpen()).session
    first = command(Put("a", b"1"), session=session, seq=1, floor=1)
    feeder.feed(first)
    feeder.feed(command(Put("a", b"2"), session=session, seq=2, floor=2))
    [late] = feeder.feed(first)
    assert late.refusal is not None
    assert late.refusal.code == "refused"
    assert feeder.machine.keys.entries["a"].value == b"2"


def test_a_session_has_bounds() -> None:
    limits = MachineLimits(sessions=SessionLimits(sessions_max=2, idle_ns_max=10 * SECOND_NS))
    feeder = Feeder(StoreMachine(limits))
    one, two = feeder.do(m.SessionOpen()).session, feeder.do(m.SessionOpen()).session
    assert feeder.do(m.SessionOpen()).code == "exhausted"
    assert feeder.feed(command(Put("a", b"1"), session=one, seq=5000, floor=1))[0].refusal == Refusal(
        "exhausted", f"session {one} exhausted: too many replies wait to be received", "receive some first"
    )
    assert feeder.feed(command(Put("a", b"1"), session=one, seq=2, floor=3))[0].refusal is not None
    # Only time that the log tells counts, and use begins it anew.
    feeder.feed(command(Put("a", b"1"), session=one, seq=1, floor=1), after_s=9)
    [outcome] = feeder.feed(command(Put("b", b"1"), session=two, seq=1, floor=1), after_s=2)
    assert outcome.refusal is not None
    assert outcome.refusal.code == "session_expired"
    assert feeder.feed(command(Put("c", b"1"), session=one, seq=2, floor=1))[0].results == [2]
    assert feeder.do(m.SessionClose(one)) == Deleted(2, 1)
    assert len(feeder.machine.sessions) == 0


# --- leases -----------------------------------------------------------------------------------------------------------


def test_keys_go_with_their_lease_at_one_revision() -> None:
    feeder = Feeder()
    lease = feeder.do(m.LeaseGrant(5000)).lease
    feeder.do(Put("a", b"1", lease), Put("b", b"2", lease), Put("c", b"3"), Put("d", b"4", lease))
    feeder.do(Put("d", b"5"))  # it hangs on nothing any more
    feeder.do(Delete("b"), Put("b", b"6", lease))
    assert feeder.do(m.LeaseExpire((lease, 77))) == Deleted(8, 2)
    assert list(feeder.machine.keys.entries) == ["c", "d"]
    assert [entry.mod_revision for entry in feeder.machine.keys.history][-2:] == [8, 8]
    assert feeder.do(m.LeaseRevoke(lease)) == Refusal("not_found", f"no such lease: {lease}")
    assert feeder.do(Put("a", b"1", lease)).code == "not_found"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0, 0, 1, 2])), min_size=1, max_size=12), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_however_puts_are_grouped_keys_hang_on_the_lease_of_their_last_put(puts: list[tuple[str, int]], size: int) -> None:
    feeder, one_by_one = Feeder(), Feeder()
    for each in (feeder, one_by_one):
        each.do(m.LeaseGrant(5000), m.LeaseGrant(5000))
    ops = [Put(key, b"x", lease) for key, lease in puts]
    for first in range(0, len(ops), size):
        feeder.feed(command(*ops[first : first + size]))
    for op in ops:
        one_by_one.feed(command(op))
    last = dict(puts)
    for number in (1, 2):
        assert sorted(feeder.machine.leases.by_id[number].keys) == sorted(key for key, lease in last.items() if lease == number)
    assert feeder.machine.digest() == one_by_one.machine.digest()


def test_a_transaction_with_a_lease_that_is_gone_writes_nothing() -> None:
    feeder = Feeder()
    assert feeder.do(Txn((), (Put("a", b"1"), Put("b", b"1", 9)))).code == "not_found"
    assert feeder.machine.revision == 0


# --- bounds and bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"\x95\x01\x00\x00\x00\x90", encode([1, 0, 0, 0, [[99, "a"]]]), encode([1, 0, 0, 0, [[1, "", b""]]]), encode("x" * 99),
     encode([1, 0, 0, 0, [[1, "k" * 1025, b""]]]), encode([1, -1, 0, 0, [[4, "a"]]]), b"\x91" * 9000, encode([1, 0, 0, 0, [[5, "", 0]]])],
)  # fmt: skip
def test_bytes_that_are_no_command_are_refused_and_change_nothing(data: bytes) -> None:
    feeder = Feeder()
    [outcome] = feeder.feed(data)
    assert outcome.refusal is not None
    assert outcome.refusal.code == "invalid_argument"
    assert feeder.machine.revision == 0


def test_words_of_a_later_level_are_refused() -> None:
    [outcome] = Feeder().feed(command(Put("a", b"1"), level=2))
    assert outcome.refusal is not None
    assert outcome.refusal.code == "unsupported"


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_bytes_make_it_raise(data: bytes) -> None:
    machine = StoreMachine()
    [outcome] = machine.apply(Batch(1, 1, 1, [data]))
    decode_outcome(outcome)


def test_what_is_too_much_is_refused() -> None:
    feeder = Feeder(StoreMachine(MachineLimits(keys_max=2, leases_max=1)))
    [outcome] = feeder.feed(b"x" * (m.COMMAND_BYTES_MAX + 1))
    assert outcome.refusal is not None
    assert outcome.refusal.code == "too_large"
    feeder.do(Put("a", b"1"), Put("b", b"1"))
    assert feeder.do(Put("c", b"1")).code == "exhausted"
    assert feeder.do(Put("a", b"2")) == 3, "a key that is there may be written"
    assert feeder.do(m.LeaseGrant(1000)).lease == 1
    assert feeder.do(m.LeaseGrant(1000)).code == "exhausted"
    assert feeder.do(m.Compact(99)).code == "invalid_argument"


def test_an_answer_has_a_bound() -> None:
    feeder = Feeder()
    value = bytes(m.VALUE_BYTES_MAX)
    feeder.do(Put("a", value))
    feeder.do(Put("b", value))
    feeder.do(Put("c", value))
    results = feeder.do(Get("a"), Get("b"), Get("c"))
    assert [type(result) for result in results] == [Page, Page, Refusal]
    page = feeder.do(Range(""))
    assert [entry.key for entry in page.entries] == ["a"]
    assert page.more
    assert [entry.key for entry in feeder.do(Range("", after="b")).entries] == ["c"]
    assert [entry.value for entry in feeder.do(Range("", keys_only=True)).entries] == [b""] * 3


# --- history ----------------------------------------------------------------------------------------------------------


def test_history_is_bounded_by_number_bytes_and_age_and_never_splits_a_revision() -> None:
    feeder = Feeder(StoreMachine(MachineLimits(history_max=4, history_bytes_max=1000, history_age_ns=10 * SECOND_NS)))
    keys = feeder.machine.keys
    feeder.do(Txn((), (Put("a", b""), Put("b", b""), Put("c", b""))))
    feeder.do(Put("d", b""))
    assert (len(keys.history), keys.compacted) == (4, 0)
    feeder.do(Put("e", b""))
    assert (len(keys.history), keys.compacted) == (2, 1), "the first revision goes as a whole"
    feeder.do(Put("f", bytes(700)))
    assert (len(keys.history), keys.compacted) == (1, 3)
    feeder.do(Get("f"), after_s=11)
    assert (len(keys.history), keys.compacted) == (0, 4)
    assert keys.history_bytes == 0


def test_compacting_is_explicit_too() -> None:
    feeder = Feeder()
    feeder.do(Put("a", b"1"), Put("a", b"2"), Put("a", b"3"))
    assert feeder.do(m.Compact(2)) == Deleted(3, 2)
    assert [entry.value for entry in feeder.machine.keys.changes_since(2)] == [b"3"]
    assert feeder.do(m.Compact(1)) == Deleted(3, 0)
    assert feeder.machine.keys.compacted == 2


# --- snapshots --------------------------------------------------------------------------------------------------------


def test_a_snapshot_that_is_damaged_or_foreign_is_refused_and_the_state_stays() -> None:
    feeder = Feeder()
    lease = feeder.do(m.LeaseGrant(5000)).lease
    feeder.do(Put("a", b"1", lease))
    data = feeder.machine.snapshot()
    digest = feeder.machine.digest()
    bad = [b"", b"hello", data[:-1], data + b"x", data[:13] + bytes(32) + data[45:], data.replace(b"store\x01", b"store\x02")]
    bad += [data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] for place in range(0, len(data), 3)]
    for wrong in bad:
        with pytest.raises(BadRecord):
            feeder.machine.restore(wrong)
    assert feeder.machine.digest() == digest
    with pytest.raises(BadRecord) as caught:
        StoreMachine(MachineLimits(keys_max=5)).restore(data)
    assert "same limits" in caught.value.hint


def test_leases_still_hold_their_keys_after_a_snapshot() -> None:
    feeder = Feeder()
    lease = feeder.do(m.LeaseGrant(5000)).lease
    feeder.do(Put("a", b"1", lease))
    restored = Feeder()
    restored.machine.restore(feeder.machine.snapshot())
    assert restored.do(m.LeaseExpire((lease,))) == Deleted(2, 1)


def test_a_checkpoint_notes_the_digest_at_its_place() -> None:
    one, other = Feeder(), Feeder()
    for feeder in (one, other):
        feeder.do(Put("a", b"1"))
        assert feeder.do(m.Checkpoint()) == 2
    one.do(Put("a", b"2"))
    assert one.machine.checkpoint_at(2) == other.machine.checkpoint_at(2) != ""
    assert one.machine.checkpoint_at(1) == ""


def test_a_capture_is_of_its_moment_and_in_small_pieces() -> None:
    feeder = Feeder()
    for number in range(3000):
        feeder.do(Put(f"k{number % 2000:05}", b"%d" % number * 100))
    before = feeder.machine.snapshot()
    pieces = feeder.machine.capture()
    taken = [next(pieces)]
    feeder.do(Put("k00001", b"changed"), Put("new", b""), Delete("k00002"))
    taken += pieces
    assert b"".join(taken) == before != feeder.machine.snapshot()
    assert max(map(len, taken)) < 2 * PIECE_BYTES
    assert sum(not piece for piece in taken) >= len(before) // PIECE_BYTES, "breaks while it is packed"


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 65535, 65536, 65537])
def test_pieces_are_what_packing_in_one_go_makes(n: int) -> None:
    entries = [Entry(f"k{number:06}", b"", 1, number, 1) for number in range(n)]
    image = Image(1, n, 0, 7, 9, [], entries[:20], [(1, 2)], 3, [], 4, [])
    data = b"".join(pack_in_pieces(image, iter(entries), n, ("", "", "digest")))
    found = finish(unpack_in_pieces(data))
    assert found == msgspec.structs.replace(image, entries=entries, digest="digest")
    assert data.endswith(msgspec.msgpack.encode(found))


def test_what_was_prepared_is_taken_over_and_nothing_else() -> None:
    feeder = Feeder()
    lease = feeder.do(m.LeaseGrant(1000)).lease
    for number in range(3000):
        feeder.do(Put(f"k{number:05}", b"x" * 100, lease if number < 3 else 0))
    data = feeder.machine.snapshot()
    machine = StoreMachine()
    before = machine.digest()
    n_pieces = sum(1 for _ in machine.prepare(data))
    assert n_pieces > 5, "others have their turn in between"
    assert machine.digest() == before, "nothing was changed yet"
    machine.restore(data)
    assert machine.digest() == feeder.machine.digest()
    assert list(machine.leases.by_id[lease].keys) == ["k00000", "k00001", "k00002"]

    # Other bytes than those that were prepared are restored as they are.
    feeder.do(Put("later", b""))
    later = feeder.machine.snapshot()
    finish(machine.prepare(data))
    machine.restore(later)
    assert machine.digest() == feeder.machine.digest()
    # Who goes on by entries lets go of what was prepared.
    finish(machine.prepare(data))
    machine.apply(Batch(99_999, 1, feeder.stamp_ns, []))
    assert machine._prepared is None
    with pytest.raises(BadRecord):
        finish(machine.prepare(data[:-1]))
    assert machine._prepared is None
