"""The core's ring as Python sees it; what it does inside is tested in Rust."""

import os

import pytest

from isopod import _core

SMALL = 4096


@pytest.mark.row("S29")
def test_messages_pass_between_the_two_ends() -> None:
    left, right = pair()
    messages = [b"", b"one", b"x" * 3000]

    assert left.push(messages) == (3, False)
    assert right.pop(1 << 20) == (messages, False)
    assert right.pop(1 << 20) == ([], False)
    assert right.push([b"back"]) == (1, False)
    assert left.pop(1 << 20) == ([b"back"], False)


def test_a_sleeper_is_woken_once() -> None:
    left, right = pair()

    assert right.may_sleep()
    assert left.push([b"a"]) == (1, True)
    assert left.push([b"b"]) == (1, False)
    assert not right.may_sleep()
    assert right.pop(1 << 20) == ([b"a", b"b"], False)
    assert right.may_sleep()


def test_a_full_ring_takes_the_rest_later() -> None:
    left, right = pair()
    rest = [bytes([number]) * 1500 for number in range(10)] + [b"z" * 50_000]
    wanted, found = list(rest), []

    for _ in range(1000):
        n_done, _ = left.push(rest)
        del rest[:n_done]
        messages, _ = right.pop(1000)
        found += messages
        if len(found) == len(wanted):
            break
    assert found == wanted


def test_pop_is_bounded() -> None:
    left, right = pair()
    left.push([b"x" * 100] * 10)

    assert [len(right.pop(250)[0]) for _ in range(4)] == [3, 3, 3, 1]


def test_what_is_refused() -> None:
    left, right = pair(message_bytes_max=100)
    with pytest.raises(_core.RingError, match="101 bytes is over 100"):
        left.push([b"x" * 101])
    with pytest.raises(TypeError):
        left.push(["text"])  # type: ignore[list-item]
    for n_bytes in (0, 5000, 1 << 31):
        with pytest.raises(OSError, match="Invalid argument"):
            _core.create_ring(n_bytes)
    with pytest.raises(OSError, match="Bad file descriptor"):
        _core.Ring(-1, 0, 100)
    read_end, write_end = os.pipe()
    with pytest.raises(OSError, match="Invalid argument"):
        _core.Ring(read_end, 0, 100)
    os.close(read_end)
    os.close(write_end)
    assert right.pop(1) == ([], False)


def pair(*, message_bytes_max: int = 1 << 20) -> tuple[_core.Ring, _core.Ring]:
    fd = _core.create_ring(SMALL)
    ends = _core.Ring(fd, 0, message_bytes_max), _core.Ring(fd, 1, message_bytes_max)
    os.close(fd)
    return ends
