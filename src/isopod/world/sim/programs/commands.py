"""The commands that run in simulated containers: a few applets of busybox, with its words and exit codes.

Which applet runs is decided as busybox does it: by the name it is called with, if the file is an ELF program (whatever it holds), or by
the first argument of `busybox`. A file that begins with "#!" is run by the shell; anything else is no program (ENOEXEC).
`tail /dev/zero` and `dd bs=N` use memory for real as far as the control group is concerned, so that a limit can be seen to hold.
"""

import re
import signal
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from isopod.world.sim.machine import Machine
from isopod.world.sim.programs.container import find_executable
from isopod.world.sim.programs.job import RESIDENT_BYTES, Job, why
from isopod.world.sim.programs.shell import Shell, signal_number
from isopod.world.sim.table import SimProcess

Applet = Callable[[Job, Sequence[str]], Awaitable[int]]
_ELF: Final = b"\x7fELF"
_NOT_FOUND: Final = 127
_NOT_RUNNABLE: Final = 126
_HOG_STEP_BYTES: Final = 4 << 20
_HOG_STEP_S: Final = 0.002
_CHUNK_BYTES: Final = 64 << 10
_SIZE_FACTORS: Final = {"": 1, "c": 1, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Runner:
    """Runs commands for the shell.

    Args:
        machine: The computer.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def fork(self, job: Job, argv: Sequence[str]) -> SimProcess:
        """Make a child process without code yet. EAGAIN."""
        child = self._machine.table.fork(job.process, argv)
        child.container = job.process.container
        container = job.container
        container.network.n_processes += 1
        child.on_exit.append(container.network.leave)
        return child

    async def become(self, job: Job, words: Sequence[str]) -> int:
        """Let a process become a command, to its end."""
        job.process.argv = tuple(words)
        return await run_command(self._machine, job.process)

    async def inline(self, job: Job, words: Sequence[str]) -> int:
        """Run an applet inside the process of the shell."""
        return await _APPLETS[words[0]](job, words)


async def run_command(machine: Machine, process: SimProcess) -> int:
    """Be the command that a process's arguments name, in its container."""
    job = Job(machine, process)
    machine.table.charge_memory(process, RESIDENT_BYTES)
    await job.work()
    argv = list(process.argv)
    try:
        executable = find_executable(job.view, argv[0], process.env, process.cwd)
    except OSError as error:
        await job.error(f"{argv[0]}: {why(error)}")
        return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_RUNNABLE
    head = bytes(executable.inode.data[:4])
    if head.startswith(b"#!"):
        return await _shell(job, ["sh", executable.path, *argv[1:]])
    if head != _ELF:
        await job.error(f"{argv[0]}: Exec format error")
        return _NOT_RUNNABLE
    name = argv[0].rpartition("/")[2]
    if name == "busybox" and len(argv) > 1:
        argv = argv[1:]
        name = argv[0]
    applet = _APPLETS.get(name)
    if applet is None:
        await job.error(f"{name}: applet not found")
        return _NOT_FOUND
    try:
        return await applet(job, argv)
    except BrokenPipeError:
        raise
    except OSError as error:
        await job.error(f"{name}: write error: {why(error)}")
        return 1


async def _shell(job: Job, argv: Sequence[str]) -> int:
    runner = Runner(job.machine)
    words = list(argv[1:])
    if words and words[0] == "-c":
        if len(words) < 2:
            await job.error("sh: -c requires an argument")
            return 2
        return await Shell(job, runner, words[2:] or [argv[0]]).main(words[1], replaces=True)
    if words:
        text = job.read_file(words[0]).decode(errors="surrogateescape")
        return await Shell(job, runner, words).main(text, replaces=False)
    if job.process.terminal is not None:
        return await _interact(job, Shell(job, runner, [argv[0]]))
    text = (await job.read_all()).decode(errors="surrogateescape")
    return await Shell(job, runner, [argv[0]]).main(text, replaces=False)


async def _interact(job: Job, shell: Shell) -> int:
    """Prompt and run, line by line, until the end of input."""
    job.process.handlers[int(signal.SIGINT)] = "ignore"
    job.process.handlers[int(signal.SIGTERM)] = "ignore"
    while True:
        await job.out("/ # ")
        line = await job.read_in()
        if not line:
            return 0
        if (status := await shell.interpret(line.decode(errors="surrogateescape"))) is not None:
            return status


async def _true(_job: Job, _argv: Sequence[str]) -> int:
    return 0


async def _false(_job: Job, _argv: Sequence[str]) -> int:
    return 1


async def _echo(job: Job, argv: Sequence[str]) -> int:
    words = list(argv[1:])
    ends_line = words[:1] != ["-n"]
    if words[:1] in (["-n"], ["-e"]):
        words.pop(0)
    await job.out(" ".join(words) + ("\n" if ends_line else ""))
    return 0


async def _printf(job: Job, argv: Sequence[str]) -> int:
    words = list(argv[2:])
    text = argv[1] if len(argv) > 1 else ""
    text = text.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")
    filled = re.sub(r"%[sd]", lambda _: words.pop(0) if words else "", text).replace("%%", "%")
    await job.out(filled)
    return 0


async def _cat(job: Job, argv: Sequence[str]) -> int:
    status = 0
    for name in argv[1:] or ["-"]:
        if name == "-":
            while data := await job.read_in():
                await job.out(data)
            continue
        try:
            await job.out(job.read_file(name))
        except OSError as error:
            status = 1
            text = "read error: Is a directory" if isinstance(error, IsADirectoryError) else f"can't open '{name}': {why(error)}"
            await job.error(f"cat: {text}")
    return status


async def _sleep(job: Job, argv: Sequence[str]) -> int:
    factors = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        seconds = sum(float(word.rstrip("smhd")) * factors[word[-1] if word[-1] in factors else "s"] for word in argv[1:])
    except ValueError:
        await job.error(f"sleep: invalid number '{argv[1]}'")
        return 1
    await job.sleep(seconds)
    return 0


async def _env(job: Job, _argv: Sequence[str]) -> int:
    await job.out("".join(f"{name}={value}\n" for name, value in job.process.env.items()))
    return 0


async def _pwd(job: Job, _argv: Sequence[str]) -> int:
    await job.out(job.process.cwd + "\n")
    return 0


async def _id(job: Job, argv: Sequence[str]) -> int:
    process = job.process
    if "-u" in argv or "-g" in argv:
        await job.out(f"{process.uid if '-u' in argv else process.gid}\n")
    else:
        await job.out(f"uid={process.uid} gid={process.gid}\n")
    return 0


async def _hostname(job: Job, _argv: Sequence[str]) -> int:
    await job.out(job.container.config.hostname + "\n")
    return 0


async def _uname(job: Job, argv: Sequence[str]) -> int:
    flags = "".join(argv[1:]).replace("-", "") or "s"
    words = {"s": "Linux", "n": job.container.config.hostname, "r": job.kernel.release, "m": job.machine.kernel.facts.architecture}
    await job.out(" ".join(word for flag, word in words.items() if flag in flags or "a" in flags) + "\n")
    return 0


async def _nproc(job: Job, _argv: Sequence[str]) -> int:
    await job.out(f"{job.kernel.n_cpus}\n")
    return 0


async def _date(job: Job, argv: Sequence[str]) -> int:
    now_s = job.kernel.now_ns() // 10**9
    wanted = argv[-1][1:].replace("%s", str(now_s)) if argv[-1].startswith("+") else "%a %b %e %H:%M:%S UTC %Y"
    await job.out(datetime.fromtimestamp(now_s, UTC).strftime(wanted) + "\n")
    return 0


async def _sync(job: Job, _argv: Sequence[str]) -> int:
    job.container.sync()
    return 0


async def _ls(job: Job, argv: Sequence[str]) -> int:
    names = [word for word in argv[1:] if not word.startswith("-")] or ["."]
    shows_hidden = any(word.startswith("-") and ("a" in word or "A" in word) for word in argv[1:])
    status = 0
    for name in names:
        node = job.find(name)
        if node is None:
            await job.error(f"ls: {name}: No such file or directory")
            status = 1
        elif node.inode.kind != "directory":
            await job.out(f"{name}\n")
        else:
            await job.out("".join(f"{each}\n" for each in node.list_names() if shows_hidden or not each.startswith(".")))
    return status


async def _touch(job: Job, argv: Sequence[str]) -> int:
    for name in argv[1:]:
        try:
            job.sink(name, append=True)
        except OSError as error:
            await job.error(f"touch: {name}: {why(error)}")
            return 1
    return 0


async def _mkdir(job: Job, argv: Sequence[str]) -> int:
    for name in [word for word in argv[1:] if not word.startswith("-")]:
        try:
            if "-p" in argv:
                job.view.make_folders(job.path(name), 0o755)
            else:
                job.view.create(job.path(name), "directory", 0o755)
        except OSError as error:
            await job.error(f"mkdir: can't create directory '{name}': {why(error)}")
            return 1
    return 0


async def _rm(job: Job, argv: Sequence[str]) -> int:
    flags = "".join(word for word in argv[1:] if word.startswith("-"))
    for name in [word for word in argv[1:] if not word.startswith("-")]:
        path = job.path(name)
        try:
            node = job.view.node(path, follow=False)
            if node.inode.kind == "directory" and "r" not in flags:
                await job.error(f"rm: '{name}' is a directory")
                return 1
            job.view.remove_tree(path)
        except OSError as error:
            if not ("f" in flags and isinstance(error, FileNotFoundError)):
                await job.error(f"rm: can't remove '{name}': {why(error)}")
                return 1
    return 0


async def _kill(job: Job, argv: Sequence[str]) -> int:
    words = list(argv[1:])
    number = int(signal.SIGTERM)
    if words and words[0].startswith("-"):
        option = words.pop(0)
        number = signal_number(words.pop(0) if option == "-s" and words else option[1:])
    status = 0
    for word in words:
        if not _signal_inside(job, word, number):
            await job.error(f"kill: can't kill pid {word}: No such process")
            status = 1
    return status


def _signal_inside(job: Job, word: str, number: int) -> bool:
    """Signal a process by its number in the pid namespace; its init is out of reach of SIGKILL from inside."""
    namespace = job.process.pid_namespace
    members = namespace.members if namespace is not None else []
    for member in members:
        if str(member.inner_pid) == word and member.is_alive:
            if not (number == signal.SIGKILL and member.is_namespace_init):
                job.machine.table.signal(member, number)
            return True
    return False


async def _head(job: Job, argv: Sequence[str]) -> int:
    by_bytes, count, names = _count(argv[1:])
    if names in (["/dev/zero"], ["/dev/urandom"], ["/dev/random"]):
        left = count if by_bytes else 0
        while left > 0:
            n_bytes = min(left, _CHUNK_BYTES)
            await job.out(bytes(n_bytes) if names == ["/dev/zero"] else job.kernel.random.randbytes(n_bytes))
            left -= n_bytes
        return 0
    data = job.read_file(names[0]) if names else await job.read_all()
    await job.out(data[:count] if by_bytes else b"".join(data.splitlines(keepends=True)[:count]))
    return 0


async def _tail(job: Job, argv: Sequence[str]) -> int:
    by_bytes, count, names = _count(argv[1:])
    if names and names[0] == "/dev/zero":
        return await _hog(job, job.kernel.memory_bytes, "tail")
    data = job.read_file(names[0]) if names else await job.read_all()
    await job.out(data[-count:] if by_bytes else b"".join(data.splitlines(keepends=True)[-count:]))
    return 0


def _count(words: Sequence[str]) -> tuple[bool, int, list[str]]:
    """Read -n N, -c N and -N."""
    by_bytes, count = False, 10
    names: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word[:2] in ("-n", "-c"):
            by_bytes = word[:2] == "-c"
            count = _size(word[2:] or (rest.pop(0) if rest else "10"))
        elif word.startswith("-") and word[1:].isdigit():
            count = int(word[1:])
        else:
            names.append(word)
    return by_bytes, count, names


def _size(text: str) -> int:
    digits = text.rstrip("ckKMG")
    return int(digits or "0") * _SIZE_FACTORS[text[len(digits) :]]


async def _hog(job: Job, n_bytes: int, name: str) -> int:
    """Use more and more memory; the machine's end is reached without a limit."""
    used = 0
    while used < n_bytes:
        job.machine.table.charge_memory(job.process, min(_HOG_STEP_BYTES, n_bytes - used))
        used += _HOG_STEP_BYTES
        await job.sleep(_HOG_STEP_S)
    if used >= job.kernel.memory_bytes:
        await job.error(f"{name}: out of memory")
        return 1
    return 0


async def _dd(job: Job, argv: Sequence[str]) -> int:
    options = dict(word.partition("=")[::2] for word in argv[1:])
    block, count = _size(options.get("bs", "512")), int(options.get("count", "1"))
    await _hog(job, block, "dd")
    try:
        sink = job.sink(options["of"], append=False) if "of" in options else job.process.stdout
        for _ in range(count):
            data = await _dd_input(job, options.get("if"), block)
            if sink is not None:
                await sink.write(data)
    except OSError as error:
        await job.error(f"dd: error writing '{options.get('of', 'stdout')}': {why(error)}")
        return 1
    await job.error(f"{count}+0 records in\n{count}+0 records out")
    return 0


async def _dd_input(job: Job, name: str | None, n_bytes: int) -> bytes:
    if name is None:
        return await job.read_all()
    return bytes(n_bytes) if name == "/dev/zero" else job.read_file(name)


async def _wc(job: Job, argv: Sequence[str]) -> int:
    names = [word for word in argv[1:] if not word.startswith("-")]
    data = job.read_file(names[0]) if names else await job.read_all()
    figures = {"-c": len(data), "-l": data.count(b"\n"), "-w": len(data.split())}
    wanted = [str(value) for flag, value in figures.items() if flag in argv] or [str(figures[flag]) for flag in ("-l", "-w", "-c")]
    await job.out(" ".join([*wanted, *names]) + "\n")
    return 0


async def _seq(job: Job, argv: Sequence[str]) -> int:
    bounds = [int(word) for word in argv[1:]]
    first, last = (bounds[0], bounds[-1]) if len(bounds) > 1 else (1, bounds[0])
    await job.out("".join(f"{number}\n" for number in range(first, last + 1)))
    return 0


async def _grep(job: Job, argv: Sequence[str]) -> int:
    words = [word for word in argv[1:] if not word.startswith("-")]
    data = job.read_file(words[1]) if len(words) > 1 else await job.read_all()
    found = [line for line in data.decode(errors="surrogateescape").splitlines() if re.search(words[0], line)]
    if "-q" not in argv:
        await job.out("".join(f"{line}\n" for line in found))
    return int(not found)


async def _yes(job: Job, argv: Sequence[str]) -> int:
    line = (" ".join(argv[1:]) or "y") + "\n"
    while True:
        await job.out(line * 512)
        await job.work()


async def _stty(job: Job, argv: Sequence[str]) -> int:
    terminal = job.process.terminal
    if terminal is None:
        await job.error("stty: standard input: Inappropriate ioctl for device")
        return 1
    if "size" in argv:
        await job.out(f"{terminal.rows} {terminal.columns}\n")
    return 0


async def _tty(job: Job, _argv: Sequence[str]) -> int:
    is_terminal = job.process.terminal is not None
    await job.out("/dev/pts/0\n" if is_terminal else "not a tty\n")
    return int(not is_terminal)


async def _test(job: Job, argv: Sequence[str]) -> int:
    words = [word for word in argv[1:] if word != "]"]
    negated = words[:1] == ["!"]
    return int(_holds(job, words[negated:]) == negated)


def _holds(job: Job, words: Sequence[str]) -> bool:
    match words:
        case [text]:
            return bool(text)
        case ["-n", text]:
            return bool(text)
        case ["-z", text]:
            return not text
        case ["-t", _]:
            return job.process.terminal is not None
        case [("-e" | "-f" | "-d" | "-s" | "-x" | "-L") as flag, name]:
            return _is(job, flag, name)
        case [left, "=", right]:
            return left == right
        case [left, "!=", right]:
            return left != right
        case [left, ("-eq" | "-ne" | "-lt" | "-le" | "-gt" | "-ge") as operator, right]:
            difference = int(left) - int(right)
            holding = {"-eq": difference == 0, "-ne": difference != 0, "-lt": difference < 0, "-le": difference <= 0}
            holding |= {"-gt": difference > 0, "-ge": difference >= 0}
            return holding[operator]
    return False


def _is(job: Job, flag: str, name: str) -> bool:
    node = job.find(name, follow=flag != "-L")
    if node is None:
        return False
    inode = node.inode
    answers = {"-e": True, "-f": inode.kind == "file", "-d": inode.kind == "directory", "-L": inode.kind == "symlink"}
    answers |= {"-s": inode.size_bytes > 0, "-x": bool(inode.mode & 0o111)}
    return answers[flag]


async def _readlink(job: Job, argv: Sequence[str]) -> int:
    node = job.find(argv[-1], follow=False)
    if node is None or node.inode.kind != "symlink":
        return 1
    await job.out(node.inode.target + "\n")
    return 0


_APPLETS: Final[dict[str, Applet]] = {
    "[": _test,
    ":": _true,
    "ash": _shell,
    "cat": _cat,
    "date": _date,
    "dd": _dd,
    "echo": _echo,
    "env": _env,
    "false": _false,
    "grep": _grep,
    "head": _head,
    "hostname": _hostname,
    "id": _id,
    "kill": _kill,
    "ls": _ls,
    "mkdir": _mkdir,
    "nproc": _nproc,
    "printf": _printf,
    "pwd": _pwd,
    "readlink": _readlink,
    "rm": _rm,
    "seq": _seq,
    "sh": _shell,
    "sleep": _sleep,
    "stty": _stty,
    "sync": _sync,
    "tail": _tail,
    "test": _test,
    "touch": _touch,
    "true": _true,
    "tty": _tty,
    "uname": _uname,
    "wc": _wc,
    "yes": _yes,
}
