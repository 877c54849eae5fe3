"""nix build: runs Nix with a deadline, its progress kept in a bounded log, its failure told in one line.

Not what is built, nor what becomes of it (`nix`).

Rules: what the user wrote reaches Nix as arguments of a program, never as text of a shell; the one shell word here is fixed and only points
Nix's two outputs at our pipes. Nix is asked to end before it is made to, so that it ends its builders. Flakes are turned on by argument:
the machine's own nix.conf need not.
Source: the manuals of nix(1), nix-build(1), nix-store(1), 2.8 and later.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from isopod.engine.launch import ENVIRONMENT
from isopod.world.disk import OpenFile
from isopod.world.errors import RuntimeFailed, ToolMissing, UnavailableError, from_os_error
from isopod.world.processes import Pipe, Process
from isopod.world.world import World

BUILD_TIMEOUT_S: Final = 1800.0
LOG_BYTES_MAX: Final = 4 << 20
"""What is kept of a build's progress; the rest is thrown away."""
_LAST_BYTES: Final = 16 << 10
_OUTPUT_BYTES_MAX: Final = 1 << 20
_WORDS_MAX: Final = 600
_ROOT_TIMEOUT_S: Final = 60.0
_END_TIMEOUT_S: Final = 5.0
_DRAIN_TIMEOUT_S: Final = 5.0
"""How long what Nix left behind may hold its outputs open."""
_SIGTERM: Final = 15
_NIX: Final = ("--extra-experimental-features", "nix-command flakes")
_TO_PIPES: Final = 'exec "$@" >"/proc/self/fd/$ISOPOD_OUT" 2>"/proc/self/fd/$ISOPOD_ERR"'
_NOISE: Final = ("(use '--show-trace'", "warning: ", "note: ")

OnLine = Callable[[str], None]
"""Called with each line of progress."""


class NixSettings(NamedTuple):
    """How Nix is used.

    Args:
        home: Whose flake registry counts (its .config/nix).
        env: More of its environment: NIX_REMOTE, NIX_STORE_DIR, ...
        timeout_s: The most that one build may take.
        offline: Never look at the network.
    """

    home: str = "/root"
    env: Mapping[str, str] = {}
    timeout_s: float = BUILD_TIMEOUT_S
    offline: bool = False


class _Output(msgspec.Struct):
    outputs: dict[str, str]


async def build(
    world: World, installable: str, link: str, *, name: str, log: str, settings: NixSettings, on_line: OnLine | None = None
) -> str:
    """Build one thing and return its path in the store.

    Args:
        world: The machine.
        installable: "path:/srv/vms#attribute".
        link: A symlink that is made to it, and keeps it from the garbage collector.
        name: The machine, for errors.
        log: File for the progress, begun anew.
        settings: How.
        on_line: Told of the progress.

    Raises:
        ToolMissing: There is no Nix.
        RuntimeFailed: It cannot be evaluated or built, or took too long; Nix's last words are in the message.
        UnavailableError: The disk failed.
    """
    nix = world.processes.which("nix")
    if nix is None:
        raise ToolMissing("nix", "nix-bin")
    argv = [nix, *_NIX, "build", "--json", "--print-build-logs", "--out-link", link]
    argv += [*(("--offline",) if settings.offline else ()), "--", installable]
    try:
        await world.disk.write(log, b"", mode=0o644)
        run = _Run(world, name=name, log=log, on_line=on_line)
        status = await run.run(argv, _environment(settings, link), settings.timeout_s)
    except OSError as error:
        raise from_os_error(error, "build", name) from error
    if status != 0:
        raise _failed(name, f"{last_words(run.last) or f'nix ended with status {status}'}", log)
    try:
        return msgspec.json.decode(run.output, type=list[_Output])[0].outputs["out"]
    except (msgspec.DecodeError, IndexError, KeyError) as error:
        raise _failed(name, "nix said nothing of what it built", log) from error


async def keep(world: World, path: str, link: str, *, name: str, settings: NixSettings) -> None:
    """Make a symlink to a thing in the store that keeps it from the garbage collector.

    Raises:
        ToolMissing: There is no Nix.
        RuntimeFailed: Nix refused.
    """
    program = world.processes.which("nix-store")
    if program is None:
        raise ToolMissing("nix-store", "nix-bin")
    argv = [program, "--add-root", link, "--indirect", "--realise", path]
    done = await world.processes.run(argv, env=_environment(settings, link), timeout_s=_ROOT_TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeFailed("keep", name, last_words(done.stderr) or f"nix-store ended with status {done.returncode}")


def last_words(output: bytes) -> str:
    """Return Nix's reason on one line: what follows its last "error:", less what says nothing."""
    lines = [line.strip() for line in output.decode("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith(_NOISE)]
    begins = [number for number, line in enumerate(lines) if line.startswith("error:")]
    line = " ".join(" ".join(lines[begins[-1] if begins else -3 :]).split())
    line = line.removeprefix("error: ")
    return line if len(line) <= _WORDS_MAX else line[: _WORDS_MAX - 3] + "..."


class _Run:
    """One run of Nix.

    Args:
        world: The machine.
        name: The machine it is for.
        log: Where its progress goes.
        on_line: Told of it too.
    """

    def __init__(self, world: World, *, name: str, log: str, on_line: OnLine | None) -> None:
        self._world = world
        self._name = name
        self._log = log
        self._on_line = on_line
        self.output = b""
        self.last = b""

    async def run(self, argv: Sequence[str], env: Mapping[str, str], timeout_s: float) -> int:
        """Run to the end and return the exit status. Raises RuntimeFailed after the time."""
        wrapped = ["/bin/sh", "-c", _TO_PIPES, "sh", *argv]
        process = await self._world.processes.spawn(wrapped, env=env, pipes={"ISOPOD_OUT": "read", "ISOPOD_ERR": "read"})
        out, err = process.pipes["ISOPOD_OUT"], process.pipes["ISOPOD_ERR"]
        taking = asyncio.gather(self._take_output(out), self._take_progress(err))
        try:
            async with asyncio.timeout(timeout_s):
                status = await process.wait()
            async with asyncio.timeout(_DRAIN_TIMEOUT_S):
                await taking
        except TimeoutError as error:
            await _stop(self._world, process)
            raise _failed(self._name, f"it took longer than {timeout_s:g} s: {last_words(self.last)}".rstrip(": "), self._log) from error
        except BaseException:
            await _stop(self._world, process)
            raise
        else:
            return status
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
            out.close()
            err.close()

    async def _take_output(self, pipe: Pipe) -> None:
        while data := await pipe.read():
            if len(self.output) + len(data) <= _OUTPUT_BYTES_MAX:
                self.output += data

    async def _take_progress(self, pipe: Pipe) -> None:
        """Keep what is told: the beginning in the log, the end in memory."""
        log = await self._world.disk.open_append(self._log)
        left = LOG_BYTES_MAX
        line = b""
        try:
            while data := await pipe.read():
                left -= len(data)
                if left >= 0:
                    left = await _append(log, data, left)
                self.last = (self.last + data)[-_LAST_BYTES:]
                *whole, line = (line + data).split(b"\n")
                line = line[-_LAST_BYTES:]
                if self._on_line is not None:
                    for each in whole:
                        self._on_line(each.decode("utf-8", "replace"))
        finally:
            log.close()


async def _append(log: OpenFile, data: bytes, left: int) -> int:
    """Write to the log and return `left`, or -1 if the disk takes no more: a build does not end for want of a log."""
    try:
        await log.append(data)
    except OSError:
        return -1
    return left


async def _stop(world: World, process: Process) -> None:
    """Ask Nix to end, with its builders; then end it."""
    world.processes.signal(process.identity, _SIGTERM)
    try:
        async with asyncio.timeout(_END_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        pass
    finally:
        await process.end()


def _environment(settings: NixSettings, link: str) -> dict[str, str]:
    cache = f"{link.rpartition('/')[0]}/cache"
    return {**ENVIRONMENT, "HOME": settings.home, "XDG_CACHE_HOME": cache, **settings.env}


def _failed(name: str, why: str, log: str) -> UnavailableError:
    error = RuntimeFailed("build", name, why)
    error.hint = f"the whole log is {log}"
    return error
