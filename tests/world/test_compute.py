"""Compute, on both Worlds: what a function returns and raises, and that the loop goes on meanwhile."""

import asyncio
import hashlib

import pytest

from isopod.world.world import World


async def test_what_a_function_returns_and_raises_comes_back(world: World) -> None:
    assert await world.compute.run(int, "12") == 12
    with pytest.raises(ValueError, match="invalid literal"):
        await world.compute.run(int, "twelve")


async def test_the_loop_goes_on_meanwhile(world: World) -> None:
    turns = 0
    computing = asyncio.ensure_future(world.compute.run(hashlib.pbkdf2_hmac, "sha256", b"x", b"salt", 20_000))
    while not computing.done():
        turns += 1
        await asyncio.sleep(0)
    assert await computing == hashlib.pbkdf2_hmac("sha256", b"x", b"salt", 20_000)
    assert turns > 1
