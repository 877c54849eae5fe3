"""Clock and Random, on both Worlds."""

import asyncio

from isopod.world.world import World


async def test_monotonic_time_covers_a_sleep(world: World) -> None:
    before_ns = world.clock.monotonic_ns()
    await asyncio.sleep(0.02)
    assert world.clock.monotonic_ns() - before_ns >= 19_000_000


async def test_wall_time_goes_on_with_monotonic_time(world: World) -> None:
    clock = world.clock
    # Each look at the one stands between two looks at the other: however long they take, it happened between these.
    before_ns, wall_ns, after_ns = clock.monotonic_ns(), clock.now_ns(), clock.monotonic_ns()
    await asyncio.sleep(0.02)
    late_before_ns, late_wall_ns, late_after_ns = clock.monotonic_ns(), clock.now_ns(), clock.monotonic_ns()
    assert late_before_ns - after_ns - 10_000_000 < late_wall_ns - wall_ns < late_after_ns - before_ns + 10_000_000


async def test_wall_time_is_of_this_century(world: World) -> None:
    assert 946_684_800 < world.clock.now_ns() / 1e9 < 4_102_444_800


async def test_a_stream_is_one_object_for_its_name(world: World) -> None:
    assert world.random.stream("backoff") is world.random.stream("backoff")
    assert world.random.stream("backoff") is not world.random.stream("names")
    assert world.random.stream("backoff").random() != world.random.stream("names").random()


async def test_tokens_are_hexadecimal_and_differ(world: World) -> None:
    tokens = [world.random.token_hex(16) for _ in range(100)]
    assert all(len(token) == 32 and int(token, 16) >= 0 for token in tokens)
    assert len(dict.fromkeys(tokens)) == 100
