"""Mapped pages: whole when they appear, seen by every reader, never moving under a mapping; on both Worlds."""

import os

import pytest

from isopod.world.world import World


async def test_what_a_writer_stores_a_reader_sees(world: World, folder: str) -> None:
    path = f"{folder}/metrics/a.page"
    written = world.pages.create(path, 8192, b"head")
    read = world.pages.open(path)
    assert bytes(read.view[:6]) == b"head\0\0"
    assert len(read.view) == len(written.view) == 8192
    written.view[8:16].cast("d")[0] = 2.5
    assert read.view[8:16].cast("d")[0] == 2.5
    with pytest.raises(TypeError):
        read.view[0] = 1
    for page in (read, written, written):
        page.close()


async def test_a_page_replaced_and_removed_lives_on_for_its_readers(world: World, folder: str) -> None:
    path = f"{folder}/a.page"
    old = world.pages.create(path, 4096, b"old")
    reader = world.pages.open(path)
    new = world.pages.create(path, 4096, b"new")
    assert bytes(reader.view[:3]) == b"old"
    later = world.pages.open(path)
    assert bytes(later.view[:3]) == b"new"
    assert list(world.pages.names(folder)) == ["a.page"]
    world.pages.remove(path)
    world.pages.remove(path)
    assert list(world.pages.names(folder)) == []
    assert bytes(later.view[:3]) == b"new"
    for page in (old, reader, new, later):
        page.close()
    with pytest.raises(FileNotFoundError):
        world.pages.open(path)
    assert list(world.pages.names(f"{folder}/nowhere")) == []


async def test_views_outlive_a_closed_page(world: World, folder: str) -> None:
    page = world.pages.create(f"{folder}/a.page", 4096, b"")
    cell = page.view[64:72].cast("d")
    page.close()
    cell[0] = 1.0
    assert cell[0] == 1.0


async def test_locks_and_writers(world: World) -> None:
    assert world.pages.writer_id() == world.pages.writer_id()
    with world.pages.lock():
        pass


async def test_what_is_no_page_is_refused(host_world: World, folder: str) -> None:
    with open(f"{folder}/empty.page", "wb"):
        pass
    os.mkfifo(f"{folder}/fifo.page")
    with open(f"{folder}/other", "wb") as other:
        other.write(b"x" * 4096)
    os.symlink("other", f"{folder}/link.page")
    with pytest.raises(OSError, match="symbolic links"):
        host_world.pages.open(f"{folder}/link.page")
    for name in ("empty.page", "fifo.page"):
        with pytest.raises(OSError, match="not a page"):
            host_world.pages.open(f"{folder}/{name}")


async def test_a_crash_before_the_rename_shows_nothing(host_world: World, folder: str) -> None:
    with open(f"{folder}/.new-a.page", "wb") as left:
        left.write(b"half")
    assert list(host_world.pages.names(folder)) == []
    host_world.pages.create(f"{folder}/a.page", 4096, b"x").close()
    assert sorted(os.listdir(folder)) == ["a.page"]
