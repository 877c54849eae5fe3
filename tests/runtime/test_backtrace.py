"""Backtraces of the running code and of tasks."""

import asyncio

import pytest

from isopod.runtime.backtrace import TEXT_BYTES_MAX, current_backtrace, task_backtrace


def outer() -> str:
    return inner()


def inner() -> str:
    return str(current_backtrace())


@pytest.mark.row("S29")
def test_the_running_code_is_named_from_the_outside_in() -> None:
    lines = outer().splitlines()
    assert lines[0] == "running:"
    assert [line.split(" in ")[1] for line in lines if " in " in line and __file__ in line][-3:] == [
        "test_the_running_code_is_named_from_the_outside_in",
        "outer",
        "inner",
    ]
    assert lines[-1].strip() == "return str(current_backtrace())"


@pytest.mark.row("S29")
async def test_a_task_is_shown_down_to_what_it_waits_for() -> None:
    event = asyncio.Event()

    async def upper() -> None:
        await lower()

    async def lower() -> None:
        await event.wait()

    task = asyncio.get_running_loop().create_task(upper(), name="worker")
    await asyncio.sleep(0)
    found = task_backtrace(task)
    assert [frame.function.split(".")[-1] for frame in found.frames] == ["upper", "lower", "wait"]
    assert (found.what, found.waits_for) == ("worker", "Future")
    assert "waits for Future" in str(found)
    event.set()
    await task
    assert task_backtrace(task) == ("worker (done)", (), 0, "")
    other = asyncio.get_running_loop().create_task(upper(), name="other")
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)
    assert task_backtrace(other).what == "other (cancelled)"


@pytest.mark.row("S29")
async def test_the_text_is_bounded_however_deep_the_task() -> None:
    event = asyncio.Event()

    async def deep(n: int) -> None:
        if n:
            await deep(n - 1)
        else:
            await event.wait()

    task = asyncio.get_running_loop().create_task(deep(300))
    await asyncio.sleep(0)
    found = task_backtrace(task)
    assert (len(found.frames), found.n_left_out) == (64, 238)
    assert "238 outer frames" in str(found)
    assert len(str(task_backtrace(task, frames_max=1000))) <= TEXT_BYTES_MAX
    event.set()
    await task
