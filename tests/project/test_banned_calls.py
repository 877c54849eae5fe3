"""Time, chance, network, disk, processes and kernel are reached through the World only; task sets are not used at all.

Ruff keeps the same rule with messages for the writer (`banned-api` in pyproject.toml), but it is switched off by folder and cannot see the
builtin `open`. Here each place that may do more is listed with exactly what it may use:
the command line is not among them, it reaches the machine through `isopod.world.host` too.
"""

import ast
from collections.abc import Iterator
from typing import Final

import pytest

from tests.project.sources import Module, modules

BANNED_MODULES: Final = frozenset(
    "_socket concurrent.futures ctypes fcntl glob multiprocessing pathlib pty random secrets select selectors shutil socket "
    "socketserver ssl subprocess tarfile tempfile termios threading time tty uvloop zipfile".split()
)
BANNED_NAMES: Final = frozenset(
    "asyncio.TaskGroup asyncio.as_completed asyncio.create_subprocess_exec asyncio.create_subprocess_shell asyncio.open_connection "
    "asyncio.open_unix_connection asyncio.start_server asyncio.start_unix_server asyncio.to_thread asyncio.wait datetime.date.today "
    "datetime.datetime.now datetime.datetime.today datetime.datetime.utcnow io.open isopod._core os.environ os.environb os.getenv "
    "os.path.exists os.path.getmtime os.path.getsize os.path.isdir os.path.isfile os.path.islink os.path.ismount os.path.lexists "
    "os.path.realpath os.path.samefile "
    "signal.alarm signal.pthread_kill signal.raise_signal signal.setitimer signal.signal sys.stdin uuid.uuid1 uuid.uuid4".split()
)
BANNED_BUILTINS: Final = frozenset({"open", "input", "exec", "eval", "__import__", "breakpoint"})
# What of `os` is pure: everything else in it asks the kernel.
PURE_OS: Final = frozenset(
    "path strerror fspath fsencode fsdecode PathLike sep major makedev minor stat_result waitstatus_to_exitcode".split()
)

# Who may use what of the above, by the beginning of the module's name: a name, all of a module, or "*", everything but the task sets.
ALLOWED: Final = {
    "isopod.world.host": frozenset({"*"}),
    "isopod.world.clock": frozenset({"random"}),
    # A pure function of bytes.
    "isopod.wire.mask": frozenset({"isopod._core"}),
    "isopod.journal.crc": frozenset({"isopod._core"}),
    # Text in, text out.
    "isopod.pulse.core": frozenset({"isopod._core"}),
    # A state machine without I/O, clock or chance.
    "isopod.cluster.raft.core": frozenset({"isopod._core"}),
    # TLS works on memory in both Worlds; a key reaches OpenSSL through a file in memory.
    "isopod.world.tls": frozenset({"ssl", "os.memfd_create", "os.write", "os.close"}),
    "isopod.world.tls_stream": frozenset({"ssl"}),
    # The simulation: seeded generators; the memory disk's reader of archives, which writes nothing.
    "isopod.world.sim": frozenset({"random"}),
    "isopod.world.sim.layers": frozenset({"tarfile"}),
    "isopod.world.sim.programs.guest_files": frozenset({"tarfile"}),
    "isopod.world.sim.tls": frozenset({"ssl"}),
}
NEVER: Final = frozenset({"asyncio.TaskGroup", "asyncio.wait", "asyncio.as_completed"})


def test_the_rule_sees_what_it_bans() -> None:
    source = """
import os, time as t, asyncio
from os.path import exists
from asyncio import TaskGroup
from datetime import datetime
def f(p):
    t.monotonic(); os.stat(p); os.path.join(p, p); exists(p); asyncio.wait([]); datetime.now(); os.environ["A"]; open(p); io_open = p.open
"""
    module = Module("isopod.engine.example", modules("src")[0].path, ast.parse(source))

    assert [what for what, _ in uses(module)] == [
        "time",
        "os.path.exists",
        "asyncio.TaskGroup",
        "os.stat",
        "asyncio.wait",
        "datetime.datetime.now",
        "os.environ",
        "open",
    ]


@pytest.mark.parametrize("module", modules("src"), ids=lambda module: module.name)
def test_module_uses_only_what_its_place_allows(module: Module) -> None:
    allowed = _allowed(module.name)

    assert [f"line {line}: {what}" for what, line in uses(module) if what in NEVER or not _is_allowed(what, allowed)] == []


def test_every_exception_names_a_place_that_exists() -> None:
    names = [module.name for module in modules("src")]

    assert [place for place in ALLOWED if place not in names] == []


def uses(module: Module) -> Iterator[tuple[str, int]]:
    """Yield each banned thing that a module uses, as (dotted name, line), in the order of the text."""
    aliases = dict(_aliases(module.tree))
    found: list[tuple[int, int, str]] = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.extend((node.lineno, node.col_offset, name) for name in _imported(node) if _is_banned(name))
        elif isinstance(node, ast.Attribute):
            name = _dotted(node, aliases)
            # What is reached through a banned module was reported where that was imported.
            if _is_banned(name) and name.split(".")[0] not in BANNED_MODULES:
                found.append((node.lineno, node.col_offset, name))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BANNED_BUILTINS:
            found.append((node.lineno, node.col_offset, node.func.id))
    for line, _, name in sorted(found):
        yield name, line


def _aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0], alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if node.module in BANNED_MODULES:
        return [node.module]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _dotted(node: ast.Attribute, aliases: dict[str, str]) -> str:
    parts = [node.attr]
    inner = node.value
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    if not isinstance(inner, ast.Name) or inner.id not in aliases:
        return ""
    return ".".join([aliases[inner.id], *reversed(parts)])


def _is_banned(name: str) -> bool:
    if name in BANNED_NAMES or name in BANNED_MODULES:
        return True
    first, _, rest = name.partition(".")
    return first == "os" and rest != "" and rest.split(".")[0] not in PURE_OS and not rest.isupper()


def _allowed(name: str) -> frozenset[str]:
    return frozenset().union(*(what for place, what in ALLOWED.items() if name == place or name.startswith(place + ".")))


def _is_allowed(what: str, allowed: frozenset[str]) -> bool:
    return "*" in allowed or what in allowed or what.partition(".")[0] in allowed
