"""Which configuration files there are: the search path, and the drop-ins beside what was found.

Of the search path the first file that exists is taken (folders in order; in each the names in order; of each the endings toml, yaml, yml,
json). Drop-ins lie in the folder named like the file, with ".d" for its ending (`config.toml` and `config.d/`); all of them are read in
the order of their names, so that "20-shards.toml" speaks after "10-site.yaml".

The search is a generator that asks for files and folders and is told what is there: so the same steps run over blocking calls at the start
of a program, over the disk port of either World later, and over a dict in a test.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Final, NamedTuple

from isopod.runtime.config.layers import FileText
from isopod.runtime.config.texts import FORMATS, TEXT_BYTES_MAX
from isopod.world.disk import Disk
from isopod.world.errors import InvalidArgument, UsageError

DROP_INS_MAX: Final = 256


class ReadFile(NamedTuple):
    """Wanted: a file's bytes, or None."""

    path: str


class ListFolder(NamedTuple):
    """Wanted: the names in a folder; none if there is no folder."""

    path: str


Wanted = ReadFile | ListFolder
Answer = bytes | Sequence[str] | None
Search = Generator[Wanted, Answer, tuple[FileText, ...]]


def search(path: str, *, folders: Sequence[str] = (), names: Sequence[str] = ()) -> Search:
    """Look for the configuration file and its drop-ins.

    Args:
        path: The file, if it is known: then it must exist. "" to look for one.
        folders: Where to look, absolute.
        names: What it may be called, without an ending.

    Raises:
        InvalidArgument: The named file does not exist, or there are too many drop-ins.
        UsageError: A file is not UTF-8.
    """
    candidates = [path] if path else [f"{folder.rstrip('/')}/{name}.{ending}" for folder in folders for name in names for ending in FORMATS]
    found: list[FileText] = []
    for candidate in candidates:
        data = yield ReadFile(candidate)
        if isinstance(data, bytes):
            found.append(FileText(candidate, _text(data, candidate)))
            break
    if path and not found:
        raise InvalidArgument("config file", path, "no such file")
    drop_folders = [drop_in_folder(file.path) for file in found] or list(dict.fromkeys(map(drop_in_folder, candidates)))
    for folder in drop_folders:
        listed = yield ListFolder(folder)
        assert listed is not None
        assert not isinstance(listed, bytes)
        drop_ins = sorted(name for name in listed if name.rpartition(".")[2] in FORMATS and not name.startswith("."))
        if len(drop_ins) > DROP_INS_MAX:
            raise InvalidArgument("folder of drop-ins", folder, f"more than {DROP_INS_MAX} files")
        for name in drop_ins:
            data = yield ReadFile(f"{folder}/{name}")
            if isinstance(data, bytes):
                found.append(FileText(f"{folder}/{name}", _text(data, f"{folder}/{name}"), "drop-in"))
        if drop_ins:
            break
    return tuple(found)


def drop_in_folder(path: str) -> str:
    """Return where the drop-ins of a configuration file lie: /etc/isopod/config.toml has /etc/isopod/config.d."""
    folder, _, name = path.rpartition("/")
    return f"{folder}/{name.rpartition('.')[0] or name}.d"


def run_search(steps: Search, read: Callable[[str], bytes | None], names: Callable[[str], Sequence[str]]) -> tuple[FileText, ...]:
    """Run a search over blocking calls.

    Args:
        steps: What `search` returned.
        read: Returns a file's bytes, None if there is none; at most TEXT_BYTES_MAX + 1 of them are looked at.
        names: Returns the names in a folder, none if there is no such folder.

    Raises:
        UsageError: A file cannot be read; or what `search` raises.
    """
    answer: Answer = None
    while True:
        try:
            wanted = steps.send(answer)
        except StopIteration as done:
            return _files(done.value)
        try:
            answer = read(wanted.path) if isinstance(wanted, ReadFile) else names(wanted.path)
        except OSError as error:
            raise UsageError(f"cannot read config file {wanted.path}: {error.strerror or error}") from error


async def search_disk(steps: Search, disk: Disk) -> tuple[FileText, ...]:
    """Run a search over a World's disk. Raises as `run_search`."""
    answer: Answer = None
    while True:
        try:
            wanted = steps.send(answer)
        except StopIteration as done:
            return _files(done.value)
        try:
            answer = await _read(disk, wanted.path) if isinstance(wanted, ReadFile) else await _list(disk, wanted.path)
        except OSError as error:
            raise UsageError(f"cannot read config file {wanted.path}: {error.strerror or error}") from error


async def _read(disk: Disk, path: str) -> bytes | None:
    try:
        return await disk.read(path, n_bytes_max=TEXT_BYTES_MAX)
    except (FileNotFoundError, NotADirectoryError):
        return None


async def _list(disk: Disk, path: str) -> Sequence[str]:
    try:
        return await disk.list(path)
    except NotADirectoryError:
        return []


def _files(value: object) -> tuple[FileText, ...]:
    assert isinstance(value, tuple)
    return value


def _text(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read config file {path}: {error}") from error
