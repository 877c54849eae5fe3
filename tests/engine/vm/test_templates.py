"""The bookkeeping of templates: what is kept, what is thrown away, what is noticed."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from isopod.engine.vm.templates import META_FILE, SAMPLE_BYTES, TemplateKey, Templates
from isopod.runtime.logger import Logger
from isopod.world.errors import RuntimeFailed
from isopod.world.world import World

KEY = TemplateKey("sha256:a", "guest", "QEMU 7.2", "microvm", "tcg", 1, 1 << 20, 1 << 30, 1, "[[],null]")
MEMORY = bytes(range(256)) * (3 * SAMPLE_BYTES // 256)


def templates(world: World, folder: str, *, n_max: int = 8, bytes_max: int = 1 << 30, lines: list[bytes] | None = None) -> Templates:
    said = lines if lines is not None else []
    return Templates(world, f"{folder}/templates", n_max=n_max, bytes_max=bytes_max, logger=Logger(said.append, world.clock))


def maker(world: World, memory: bytes = MEMORY) -> Callable[[str], Awaitable[None]]:
    async def make(folder: str) -> None:
        await world.disk.write(f"{folder}/memory", memory)
        await world.disk.write(f"{folder}/state", b"state")
        await world.disk.write(f"{folder}/upper.img", b"disk")

    return make


async def made(world: World, folder: str, *keys: TemplateKey, n_max: int = 8) -> Templates:
    found = templates(world, folder, n_max=n_max)
    await found.open()
    for key in keys:
        found.make_nowait(key, maker(world))
        await found.wait_idle()
    return found


@pytest.mark.row("V6")
async def test_one_is_made_once_and_used_often(world: World, folder: str) -> None:
    kept = await made(world, folder, KEY)
    assert await kept.take(KEY._replace(vcpus=2), "other") is None
    template = await kept.take(KEY, "a")
    assert template is not None
    assert await world.disk.read(template.memory_file) == MEMORY
    kept.make_nowait(KEY, maker(world))
    await kept.wait_idle()
    assert await kept.take(KEY, "b") == template
    statistics = kept.statistics()
    assert (statistics.n_templates, statistics.n_made, statistics.n_used) == (1, 1, 2)
    await kept.close()


@pytest.mark.row("V6")
async def test_it_outlives_the_daemon_but_not_what_is_half_made(world: World, folder: str) -> None:
    await (await made(world, folder, KEY)).close()
    await world.disk.make_directory(f"{folder}/templates/{'0' * 32}.part")
    await world.disk.make_directory(f"{folder}/templates/junk")
    again = await made(world, folder)
    assert await again.take(KEY, "a") is not None
    await again.wait_idle()  # its whole digest was compared
    assert again.statistics().n_templates == 1
    assert await world.disk.list(f"{folder}/templates") == [KEY.name]
    await again.close()


async def test_one_of_another_boot_or_version_is_removed(world: World, folder: str) -> None:
    await (await made(world, folder, KEY)).close()
    path = f"{folder}/templates/{KEY.name}/{META_FILE}"
    text = await world.disk.read(path)
    await world.disk.write(path, text.replace(world.processes.boot_id().encode(), b"another boot"))
    again = await made(world, folder)
    assert await again.take(KEY, "a") is None
    assert await world.disk.list(f"{folder}/templates") == []
    await again.close()


@pytest.mark.row("V6")
@pytest.mark.parametrize(
    ("file", "data"), [("memory", b"short"), ("memory", b"\1" + MEMORY[1:]), ("memory", MEMORY[:-1] + b"\0"), ("state", b"STATE")]
)
async def test_a_damaged_one_is_not_used(world: World, folder: str, file: str, data: bytes) -> None:
    kept = await made(world, folder, KEY)
    await world.disk.write(f"{folder}/templates/{KEY.name}/{file}", data)
    assert await kept.take(KEY, "a") is None
    assert kept.statistics().n_damaged == 1
    assert await world.disk.list(f"{folder}/templates") == []
    kept.make_nowait(KEY, maker(world))
    await kept.wait_idle()
    assert await kept.take(KEY, "a") is not None
    await kept.close()


async def test_damage_in_the_middle_is_found_by_the_whole_digest(world: World, folder: str) -> None:
    await (await made(world, folder, KEY)).close()
    middle = len(MEMORY) // 2
    await world.disk.write(f"{folder}/templates/{KEY.name}/memory", MEMORY[:middle] + b"\0\0\0" + MEMORY[middle + 3 :])
    again = await made(world, folder)
    assert await again.take(KEY, "a") is not None  # it is not seen quickly
    await again.wait_idle()
    assert await again.take(KEY, "b") is None
    await again.close()


@pytest.mark.row("V6")
async def test_the_longest_unused_goes_first_and_never_one_in_use(world: World, folder: str) -> None:
    keys = [KEY._replace(vcpus=number) for number in (1, 2, 3, 4)]
    kept = await made(world, folder, *keys[:2], n_max=2)
    assert await kept.take(keys[0], "a") is not None
    kept.release("a")
    kept.make_nowait(keys[2], maker(world))
    await kept.wait_idle()
    assert await kept.take(keys[1], "b") is None
    assert await kept.take(keys[0], "c") is not None
    assert await kept.take(keys[2], "d") is not None
    kept.make_nowait(keys[3], maker(world))
    await kept.wait_idle()
    assert await kept.take(keys[3], "e") is None  # both others are in use
    kept.release("c")
    kept.make_nowait(keys[3], maker(world))
    await kept.wait_idle()
    assert await kept.take(keys[3], "e") is not None
    await kept.close()


async def test_bounds(world: World, folder: str) -> None:
    none = templates(world, folder, n_max=0)
    none.make_nowait(KEY, maker(world))
    await none.wait_idle()
    assert none.statistics().n_made == 0
    small = templates(world, folder, bytes_max=KEY.memory_bytes - 1)
    small.make_nowait(KEY, maker(world))
    await small.wait_idle()
    assert small.statistics().n_made == 0
    assert await world.disk.list(f"{folder}/templates") == []


async def test_one_that_cannot_be_made_is_not_tried_for_ever(world: World, folder: str) -> None:
    lines: list[bytes] = []
    kept = templates(world, folder, lines=lines)

    async def fail(_: str) -> None:
        raise RuntimeFailed("boot", "template", "it did not come up")

    for _ in range(4):
        kept.make_nowait(KEY, fail)
        await kept.wait_idle()
    assert kept.statistics().n_failed == 2
    assert sum(b"it did not come up" in line for line in lines) == 2
    assert await world.disk.list(f"{folder}/templates") == []


async def test_closing_gives_up_what_is_being_made(world: World, folder: str) -> None:
    kept = templates(world, folder)
    begun = asyncio.Event()

    async def hang(part: str) -> None:
        await world.disk.write(f"{part}/memory", b"x")
        begun.set()
        await asyncio.Event().wait()

    kept.make_nowait(KEY, hang)
    await begun.wait()
    await kept.close()
    assert await world.disk.list(f"{folder}/templates") == []


@pytest.mark.row("V6")
@pytest.mark.parametrize("change", ["image", "guest", "vmm"])
async def test_what_is_outdated_is_thrown_away(world: World, folder: str, change: str) -> None:
    kept = await made(world, folder, KEY)
    await kept.sweep(images=lambda _: True, guest="guest", vmm="QEMU 7.2")
    assert kept.statistics().n_templates == 1
    await kept.sweep(
        images=lambda image: not (change == "image" and image == KEY.image_id),
        guest="other" if change == "guest" else "guest",
        vmm="QEMU 8" if change == "vmm" else "QEMU 7.2",
    )
    assert kept.statistics().n_templates == 0
    assert await world.disk.list(f"{folder}/templates") == []
    await kept.close()
