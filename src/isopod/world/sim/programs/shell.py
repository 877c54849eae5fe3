"""The simulated shell: busybox's `sh` in small, running what `shell_grammar` parses.

Commands, pipelines, subshells and background jobs are processes of their own, in the container's pid namespace and control group. As
in ash: a trap runs when the command in the foreground has ended (at once during `wait`); the last command of `-c` replaces the shell
if no trap is set; a failed fork is "can't fork", status 2; a command killed by a signal is 128 + signal. Texts are those of busybox 1.35.
"""

import asyncio
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, TypeVar

from isopod.world.sim.pipes import ReadEnd, Sink, open_pipe
from isopod.world.sim.programs.container import find_executable
from isopod.world.sim.programs.job import Job, why
from isopod.world.sim.programs.shell_grammar import (
    Both,
    Each,
    If,
    Loop,
    Node,
    Pipeline,
    Redirect,
    Simple,
    Steps,
    Subshell,
    SyntaxFault,
    parse,
)
from isopod.world.sim.programs.shell_words import Scope
from isopod.world.sim.table import SIGKILL, SimProcess

if TYPE_CHECKING:
    from isopod.world.sim.programs.commands import Runner

_End = TypeVar("_End", ReadEnd, Sink)
_NOT_FOUND: Final = 127
_NOT_RUNNABLE: Final = 126
_CANNOT_FORK: Final = 2


class _Exit(Exception):
    """The shell ends."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Break(Exception):
    """A loop ends (`again`: its round ends)."""

    def __init__(self, *, again: bool) -> None:
        super().__init__()
        self.again = again


class Shell:
    """One shell process.

    Args:
        job: Its process and surroundings.
        runner: Runs applets by name.
        positional: $0, $1, ...
    """

    def __init__(self, job: Job, runner: "Runner", positional: Sequence[str]) -> None:
        self._job = job
        self._runner = runner
        self._scope = Scope(dict(job.process.env), positional, pid=job.process.inner_pid, capture=self._capture)
        self._traps: dict[int, str] = {}
        self._exit_trap = ""
        self._pending: list[int] = []
        self._waiting: asyncio.Future[None] | None = None
        self._background: list[SimProcess] = []

    async def main(self, text: str, *, replaces: bool) -> int:
        """Run a script to its end.

        Args:
            text: The script.
            replaces: Whether its last command may take the shell's place.
        """
        try:
            node = parse(text)
        except SyntaxFault as fault:
            await self._job.error(f"{self._name}: syntax error: {fault}")
            return 2
        return await self._guarded(node, replaces=replaces)

    async def interpret(self, line: str) -> int | None:
        """Run one line typed at a prompt; return the exit status if it ended the shell."""
        try:
            await self._run(parse(line))
        except SyntaxFault as fault:
            await self._job.error(f"{self._name}: syntax error: {fault}")
        except _Break:
            return None
        except _Exit as end:
            return end.status
        return None

    async def _guarded(self, node: Node, *, replaces: bool) -> int:
        try:
            await self._run(node, last=replaces)
            status = self._scope.status
        except _Exit as end:
            status = end.status
        except _Break:
            status = self._scope.status
        if self._exit_trap:
            command, self._exit_trap = self._exit_trap, ""
            try:
                await self._run(parse(command))
            except _Exit as end:
                status = end.status
        return status

    @property
    def _name(self) -> str:
        return self._scope.positional[0] if self._scope.positional else "sh"

    # -- nodes -----------------------------------------------------------------------------------------------------------------------

    async def _run(self, node: Node, *, last: bool = False) -> None:
        match node:
            case Simple():
                await self._simple(node, last=last)
            case Steps(items):
                for number, (item, background) in enumerate(items):
                    if background:
                        await self._start_background(item)
                    else:
                        await self._run(item, last=last and number == len(items) - 1)
            case Both(left, operator, right):
                await self._run(left)
                if (self._scope.status == 0) == (operator == "&&"):
                    await self._run(right, last=last)
            case Pipeline(commands, negated):
                await self._pipeline(commands)
                self._scope.status = int(self._scope.status == 0) if negated else self._scope.status
            case Subshell(body):
                self._scope.status = await self._wait_for(await self._fork(body))
            case If(branches, otherwise):
                await self._if(branches, otherwise)
            case Loop() | Each():
                await self._loop(node)
        await self._run_traps()

    async def _if(self, branches: Sequence[tuple[Node, Node]], otherwise: Node | None) -> None:
        for condition, body in branches:
            await self._run(condition)
            if self._scope.status == 0:
                await self._run(body)
                return
        self._scope.status = 0
        if otherwise is not None:
            await self._run(otherwise)

    async def _loop(self, node: Loop | Each) -> None:
        words = await self._scope.fields(node.words) if isinstance(node, Each) else []
        round_number, status = 0, 0
        while True:
            if isinstance(node, Each):
                if round_number >= len(words):
                    break
                self._scope.variables[node.name] = words[round_number]
                round_number += 1
            else:
                await self._run(node.condition)
                if (self._scope.status == 0) == node.until:
                    break
            try:
                await self._run(node.body)
                status = self._scope.status
            except _Break as end:
                if not end.again:
                    break
            await self._job.work()
        self._scope.status = status

    async def _pipeline(self, commands: Sequence[Node]) -> None:
        table, process = self._job.machine.table, self._job.process
        members: list[SimProcess] = []
        source = process.stdin
        for number, command in enumerate(commands):
            reader, writer = (None, process.stdout) if number == len(commands) - 1 else open_pipe(process.owner, process.owner)
            members.append(await self._fork(command, stdin=source, stdout=writer))
            for end in (source, writer):
                if end is not None and end not in (process.stdin, process.stdout):
                    end.close()
            source = reader
        for member in members:
            self._scope.status = await self._wait_for(member)
        assert all(not member.is_alive or table.get(member.pid) for member in members)

    async def _start_background(self, node: Node) -> None:
        child = await self._fork(node)
        self._background.append(child)
        self._scope.last_background = child.inner_pid
        self._scope.status = 0

    async def _fork(self, node: Node, *, stdin: ReadEnd | None = None, stdout: Sink | None = None) -> SimProcess:
        """Start a subshell for a node; a fork that fails ends this shell."""
        process = self._job.process
        try:
            child = self._runner.fork(self._job, process.argv)
        except OSError as error:
            await self._job.error(f"{self._name}: can't fork: {why(error)}")
            raise _Exit(_CANNOT_FORK) from None
        if stdin is not None:
            child.stdin = _swap(child.stdin, stdin.dup(child.owner))
        if stdout is not None:
            child.stdout = _swap(child.stdout, stdout.dup(child.owner))
        subshell = Shell(Job(self._job.machine, child), self._runner, self._scope.positional)
        subshell._scope.variables.update(self._scope.variables)

        async def body(_: SimProcess) -> int:
            return await subshell._guarded(node, replaces=True)

        self._job.machine.table.run(child, body)
        return child

    # -- simple commands -------------------------------------------------------------------------------------------------------------

    async def _simple(self, node: Simple, *, last: bool) -> None:
        words = await self._scope.fields(node.words)
        assigned = {name: await self._scope.text(word) for name, word in node.assignments}
        if not words:
            self._scope.variables.update(assigned)
            self._charge()
            self._scope.status = 0
            return
        await self._job.work()
        saved = self._job.process.stdin, self._job.process.stdout, self._job.process.stderr
        try:
            await self._redirect(node.redirects)
            await self._dispatch(words, assigned, last=last and not self._traps and not self._exit_trap and not node.redirects)
        except OSError as error:
            await self._job.error(f"{self._name}: can't {error.args[1]}")
            self._scope.status = 1
        finally:
            self._restore(saved)

    async def _dispatch(self, words: list[str], assigned: dict[str, str], *, last: bool) -> None:
        builtin = _BUILTINS.get(words[0])
        if builtin is not None:
            self._scope.variables.update(assigned)
            self._scope.status = await builtin(self, words)
            return
        env = {**{name: value for name, value in self._scope.variables.items() if name in self._job.process.env}, **assigned}
        try:
            find_executable(self._job.view, words[0], {"PATH": self._scope.variables.get("PATH", "")}, self._job.process.cwd)
        except FileNotFoundError:
            await self._job.error(f"{self._name}: {words[0]}: not found")
            self._scope.status = _NOT_FOUND
        except OSError:
            await self._job.error(f"{self._name}: {words[0]}: Permission denied")
            self._scope.status = _NOT_RUNNABLE
        else:
            if last:
                self._job.process.env = env
                raise _Exit(await self._runner.become(self._job, words))
            self._scope.status = await self._wait_for(await self._fork_command(words, env))

    async def _fork_command(self, words: list[str], env: dict[str, str]) -> SimProcess:
        try:
            child = self._runner.fork(self._job, words)
        except OSError as error:
            await self._job.error(f"{self._name}: can't fork: {why(error)}")
            raise _Exit(_CANNOT_FORK) from None
        child.env = env
        self._job.machine.table.run(child, lambda _: self._runner.become(Job(self._job.machine, child), words))
        return child

    async def _wait_for(self, child: SimProcess) -> int:
        """Wait for the foreground; traps have to wait too."""
        status = await child.wait()
        if status == -SIGKILL:
            await self._job.error("Killed")
        return status if status >= 0 else 128 - status

    # -- redirection -----------------------------------------------------------------------------------------------------------------

    async def _redirect(self, redirects: Sequence[Redirect]) -> None:
        """Open what the redirections name. OSError, its text in the shell's words, if one cannot be."""
        process = self._job.process
        for redirect in redirects:
            target = await self._scope.text(redirect.target)
            try:
                if redirect.operator == ">&":
                    self._set_output(redirect.number, process.stdout if target == "1" else process.stderr)
                elif redirect.operator == "<":
                    process.stdin = self._file_input(target)
                else:
                    self._set_output(redirect.number, self._job.sink(target, append=redirect.operator == ">>"))
            except OSError as error:
                verb, missing = ("open", "no such file") if redirect.operator == "<" else ("create", "nonexistent directory")
                text = missing if isinstance(error, FileNotFoundError) else why(error)
                raise OSError(error.errno, f"{verb} {target}: {text}") from error

    def _set_output(self, number: int, end: Sink | None) -> None:
        if number == 1:
            self._job.process.stdout = end
        elif number == 2:
            self._job.process.stderr = end

    def _file_input(self, path: str) -> ReadEnd:
        """Return an end from which a file's bytes can be read."""
        owner = self._job.process.owner
        reader, writer = open_pipe(owner, owner)
        reader.channel.data += self._job.read_file(path)
        writer.close()
        return reader

    def _restore(self, saved: tuple[ReadEnd | None, Sink | None, Sink | None]) -> None:
        process = self._job.process
        ends = (process.stdin, process.stdout, process.stderr)
        process.stdin, process.stdout, process.stderr = saved
        for end in ends:
            if end is not None and end not in saved:
                end.close()

    async def _capture(self, text: str) -> str:
        process = self._job.process
        reader, writer = open_pipe(process.owner, process.owner)
        child = await self._fork(parse(text), stdout=writer)
        writer.close()
        parts = []
        while part := await reader.read():
            parts.append(part)
        reader.close()
        self._scope.status = await self._wait_for(child)
        return b"".join(parts).decode(errors="surrogateescape").rstrip("\n")

    def _charge(self) -> None:
        """Variables are memory: a shell that doubles one for ever runs out of it."""
        n_bytes = sum(len(value) for value in self._scope.variables.values())
        extra = n_bytes - self._job.process.memory_bytes
        if extra > 0:
            self._job.machine.table.charge_memory(self._job.process, extra)

    # -- signals ---------------------------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        self._pending.append(number)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def _run_traps(self) -> None:
        while self._pending:
            command = self._traps.get(self._pending.pop(0), "")
            status = self._scope.status
            if command:
                await self._run(parse(command))
            self._scope.status = status

    # -- builtins --------------------------------------------------------------------------------------------------------------------

    async def exit(self, words: list[str]) -> int:
        """Run `exit [N]`."""
        raise _Exit(int(words[1]) & 0xFF if len(words) > 1 else self._scope.status)

    async def trap(self, words: list[str]) -> int:
        """Run `trap` COMMAND SIGNAL..."""
        command, names = (words[1], words[2:]) if len(words) > 2 else ("-", words[1:])
        for name in names:
            if name in ("EXIT", "0"):
                self._exit_trap = "" if command == "-" else command
                continue
            number = signal_number(name)
            self._traps.pop(number, None)
            handlers = self._job.process.handlers
            if command == "-":
                handlers.pop(number, None)
            elif command == "":
                handlers[number] = "ignore"
            else:
                self._traps[number] = command
                handlers[number] = lambda number=number: self._on_signal(number)  # type: ignore[misc]
        return 0

    async def wait(self, words: list[str]) -> int:
        """Run `wait` [PID...]: a trapped signal interrupts it."""
        wanted = [child for child in self._background if len(words) < 2 or str(child.inner_pid) in words[1:]]
        for child in wanted:
            ended = asyncio.ensure_future(child.wait())
            self._waiting = self._job.machine.loop.create_future()
            ended.add_done_callback(lambda _, waiting=self._waiting: None if waiting.done() else waiting.set_result(None))  # type: ignore[misc]
            if not self._pending:
                await self._waiting
            if self._pending:
                ended.cancel()
                return 128 + self._pending[0]
            status = ended.result()
            self._scope.status = status if status >= 0 else 128 - status
            self._background.remove(child)
        return self._scope.status if len(words) > 1 else 0

    async def cd(self, words: list[str]) -> int:
        """Run `cd` [FOLDER]."""
        target = words[1] if len(words) > 1 else self._scope.variables.get("HOME", "/")
        try:
            self._job.view.folder(self._job.path(target))
        except OSError as error:
            await self._job.error(f"{self._name}: cd: can't cd to {target}: {why(error)}")
            return 2
        self._job.process.cwd = self._job.view.spot(self._job.path(target)).path
        self._scope.variables["PWD"] = self._job.process.cwd
        return 0

    async def export(self, words: list[str]) -> int:
        """Run `export` NAME[=VALUE]..."""
        for word in words[1:]:
            name, equals, value = word.partition("=")
            if equals:
                self._scope.variables[name] = value
            self._job.process.env[name] = self._scope.variables.get(name, "")
        return 0

    async def read(self, words: list[str]) -> int:
        """Run `read` NAME: one line."""
        line = bytearray()
        while (byte := await self._job.read_in(1)) not in (b"", b"\n"):
            line += byte
        self._scope.variables[words[1] if len(words) > 1 else "REPLY"] = line.decode(errors="surrogateescape")
        return 0 if byte else 1

    async def exec(self, words: list[str]) -> int:
        """Run `exec` COMMAND: become it."""
        if len(words) < 2:
            return 0
        self._job.process.env = {name: value for name, value in self._scope.variables.items() if name in self._job.process.env}
        raise _Exit(await self._runner.become(self._job, words[1:]))

    async def set_or_shift(self, words: list[str]) -> int:
        """Run `shift`; set and umask are accepted without effect."""
        if words[0] == "shift" and len(self._scope.positional) > 1:
            del self._scope.positional[1]
        return 0

    async def loop_control(self, words: list[str]) -> int:
        """Run `break`, continue."""
        raise _Break(again=words[0] == "continue")

    async def run_inline(self, words: list[str]) -> int:
        """A command that needs no process: echo, true, kill, ..."""
        return await self._runner.inline(self._job, words)


_BUILTINS: Final = {
    "exit": Shell.exit,
    "trap": Shell.trap,
    "wait": Shell.wait,
    "cd": Shell.cd,
    "export": Shell.export,
    "read": Shell.read,
    "exec": Shell.exec,
    "set": Shell.set_or_shift,
    "shift": Shell.set_or_shift,
    "umask": Shell.set_or_shift,
    "break": Shell.loop_control,
    "continue": Shell.loop_control,
    **dict.fromkeys((":", "true", "false", "echo", "printf", "pwd", "kill", "test", "["), Shell.run_inline),
}


def signal_number(name: str) -> int:
    """Return the number of a signal by name or number; 0 if there is none."""
    if name.isdigit():
        return int(name)
    found = getattr(signal, f"SIG{name.upper().removeprefix('SIG')}", None)
    return int(found) if isinstance(found, signal.Signals) else 0


def _swap(old: _End | None, new: _End) -> _End:
    """Close the end that a child inherited, and return the one it has instead."""
    if old is not None:
        old.close()
    return new
