"""The checker of linearizability: histories known to be right and wrong, and every small history against brute force."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isopod.testing.history import UNKNOWN, History, Operation
from isopod.testing.linearize import Verdict, check_linearizable
from isopod.testing.specifications import Delete, Get, Put, Register, Seen, Swap

REGISTER = Register()


def operation(client: int, call: object, result: object, invoked: int, returned: int | None, key: str = "x") -> Operation:
    return Operation(client, key, call, result, invoked, returned)


def by_brute_force(operations: Sequence[Operation]) -> bool:
    """Try every order of every choice of the unanswered operations."""
    answered = [each for each in operations if each.returned is not None]
    unanswered = [each for each in operations if each.returned is None]
    for n_taken in range(len(unanswered) + 1):
        for taken in itertools.combinations(unanswered, n_taken):
            if any(_fits(order) for order in itertools.permutations([*answered, *taken])):
                return True
    return False


def _fits(order: Sequence[Operation]) -> bool:
    for place, later in enumerate(order):
        if any(later.returned is not None and later.returned < earlier.invoked for earlier in order[:place]):
            return False
    state: Seen | None = REGISTER.initial()
    for each in order:
        assert state is not None
        state = REGISTER.step(state, each.call, each.result)
        if state is None:
            return False
    return True


VALUES = st.sampled_from(["a", "b"])
CALLS = st.one_of(
    st.builds(Put, VALUES),
    st.just(Get()),
    st.just(Delete()),
    st.builds(Swap, st.one_of(st.none(), VALUES), VALUES),
)


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Draw up to six operations whose answers are often, but not always, possible."""
    n_operations = draw(st.integers(1, 6))
    times = draw(st.permutations(range(2 * n_operations)))
    found = []
    state = REGISTER.initial()
    for number in range(n_operations):
        call = draw(CALLS)
        first, second = sorted(times[2 * number : 2 * number + 2])
        true = _answer(state, call)
        after = REGISTER.step(state, call, true)
        assert after is not None
        state = after
        result = true if draw(st.integers(0, 3)) else draw(st.sampled_from([_answer(Seen("a", 1), call), _answer(Seen(None, 0), call)]))
        if draw(st.integers(0, 4)):
            found.append(operation(number, call, result, first, second))
        else:
            found.append(operation(number, call, UNKNOWN, first, None))
    return found


def _answer(state: Seen, call: object) -> object:
    match call:
        case Get():
            return state
        case Put():
            return state.version + 1
        case Delete():
            return state.version > 0
        case Swap(expected, _):
            return state.value == expected
    raise TypeError(call)


@given(histories())
@settings(max_examples=600, deadline=None)
def test_the_search_agrees_with_brute_force(operations: list[Operation]) -> None:
    expected = Verdict.LINEARIZABLE if by_brute_force(operations) else Verdict.VIOLATED

    assert check_linearizable(operations, REGISTER).verdict is expected


@given(histories())
@settings(max_examples=200, deadline=None)
def test_what_is_shown_of_a_wrong_history_is_wrong_by_itself_and_small(operations: list[Operation]) -> None:
    finding = check_linearizable(operations, REGISTER)
    if finding.verdict is Verdict.VIOLATED:
        assert not by_brute_force(finding.operations)
        for number, each in enumerate(finding.operations):
            rest = [*finding.operations[:number], *finding.operations[number + 1 :]]
            assert not isinstance(each.call, Get) or by_brute_force(rest)
        assert finding.stuck
        assert "would have to be one of" in finding.explain()


@pytest.mark.row("B20")
def test_real_time_order_counts() -> None:
    """Serializable, but not linearizable: the read began after the write had been answered."""
    history = [operation(1, Put("a"), 1, 1, 2), operation(2, Get(), Seen(None, 0), 3, 4)]

    finding = check_linearizable(history, REGISTER)

    assert finding.verdict is Verdict.VIOLATED
    assert finding.operations == tuple(history)
    assert finding.stuck == (history[1],)
    assert finding.state == Seen("a", 1)


def test_a_read_that_overlaps_a_write_may_see_either() -> None:
    for seen in (Seen(None, 0), Seen("a", 1)):
        history = [operation(1, Put("a"), 1, 1, 4), operation(2, Get(), seen, 2, 3)]
        assert check_linearizable(history, REGISTER).verdict is Verdict.LINEARIZABLE


def test_a_read_must_not_go_back() -> None:
    history = [
        operation(1, Put("a"), UNKNOWN, 1, None),
        operation(2, Get(), Seen("a", 1), 2, 3),
        operation(2, Get(), Seen(None, 0), 4, 5),
    ]

    assert check_linearizable(history, REGISTER).verdict is Verdict.VIOLATED


def test_a_write_without_an_answer_may_come_late_or_never() -> None:
    late = [
        operation(1, Put("a"), UNKNOWN, 1, None),
        operation(2, Get(), Seen(None, 0), 2, 3),
        operation(2, Get(), Seen("a", 1), 4, 5),
    ]
    never = [operation(1, Put("a"), UNKNOWN, 1, None), operation(2, Get(), Seen(None, 0), 2, 3)]

    assert check_linearizable(late, REGISTER).verdict is Verdict.LINEARIZABLE
    assert check_linearizable(never, REGISTER).verdict is Verdict.LINEARIZABLE


def test_a_write_applied_twice_is_seen() -> None:
    history = [
        operation(1, Put("a"), 1, 1, 2),
        operation(2, Put("b"), 2, 3, 4),
        operation(2, Get(), Seen("a", 3), 5, 6),
    ]

    assert check_linearizable(history, REGISTER).verdict is Verdict.VIOLATED


def test_two_swaps_cannot_both_win() -> None:
    history = [operation(1, Swap(None, "a"), True, 1, 4), operation(2, Swap(None, "b"), True, 2, 3)]

    assert check_linearizable(history, REGISTER).verdict is Verdict.VIOLATED


def test_the_violation_names_its_key_and_leaves_out_what_cannot_matter() -> None:
    right = [operation(1, Get(), Seen(None, 0), 10 * number, 10 * number + 1, "y") for number in range(50)]
    reads = [operation(1, Get(), Seen(None, 0), 10 * number + 2, 10 * number + 3) for number in range(50)]
    wrong = [operation(1, Put("a"), 1, 600, 601), operation(2, Get(), Seen("b", 1), 602, 603)]

    finding = check_linearizable([*right, *reads, *wrong], REGISTER)

    assert (finding.verdict, finding.key, finding.operations) == (Verdict.VIOLATED, "x", tuple(wrong))
    assert "client 2: x Get() -> Seen(value='b', version=1)" in finding.explain()


def test_a_search_that_is_too_long_is_given_up_and_says_so() -> None:
    clients = range(14)
    writes = [operation(client, Put(str(client)), UNKNOWN, client, None) for client in clients]
    history = [*writes, operation(99, Get(), Seen("nothing of these", 3), 50, 51)]

    finding = check_linearizable(history, REGISTER, n_steps_max=1000)

    assert finding.verdict is Verdict.UNDECIDED
    assert "given up after 1001 steps" in finding.explain()


def test_a_long_history_is_checked_quickly() -> None:
    recorder = History()
    state = REGISTER.initial()
    for number in range(3000):
        begun = [recorder.invoke(client, "x", Put(f"{number} {client}")) for client in range(4)]
        for each in reversed(begun):
            state = Seen("?", state.version + 1)
            recorder.succeed(each, state.version)

    finding = check_linearizable(recorder.operations(), REGISTER)

    assert (finding.verdict, finding.explain()) == (Verdict.LINEARIZABLE, "")
    assert finding.n_steps < 60_000


def test_a_history_knows_what_was_refused_and_what_is_unknown() -> None:
    history = History()
    first, second, third = (history.invoke(client, "x", Get()) for client in (1, 2, 3))
    history.succeed(second, Seen(None, 0))
    history.refuse(third)

    assert [(each.client, each.result, each.invoked, each.returned) for each in history.operations()] == [
        (1, UNKNOWN, 1, None),
        (2, Seen(None, 0), 2, 4),
    ]
    assert (len(history), first, repr(UNKNOWN)) == (3, 0, "?")
    assert str(history.operations()[0]) == "[    1   ...] client 1: x Get() -> ?"


def test_a_register_knows_its_own_calls_only() -> None:
    with pytest.raises(TypeError, match="a register knows no 'pop'"):
        REGISTER.step(REGISTER.initial(), "pop", None)
