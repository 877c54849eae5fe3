"""The program: a command line in, an exit code out. Understands, dispatches, and turns every failure into one line and a hint.

Everyday commands run right here, on the interpreter's bare modules; `node` first makes the installed packages importable.
Each command imports only what it needs: a call lives for milliseconds.
"""

from __future__ import annotations

from isopod.cli import grammar
from isopod.cli.parse import parse
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from isopod.cli.grammar_parts import Command
    from isopod.cli.parse import Parsed

    Handler = Callable[[Parsed], int]

EXIT_INTERRUPTED: Final = 130
EXIT_BROKEN_PIPE: Final = 141
EXIT_BUG: Final = 70


def main(argv: list[str], *, site_packages: str = "") -> int:
    """Run one command line.

    Args:
        argv: The words after the program's name.
        site_packages: The folder of installed packages that an isolated interpreter does not look into by itself; the
            daemon needs them. "" if they are importable already.

    Returns:
        The exit code, as `grammar.EXIT_CODES` says.
    """
    parsed: Parsed | None = None
    try:
        console.hold_standard_descriptors()
        if argv[:1] == ["__complete"]:
            from isopod.cli.completion import candidates

            return _print("".join(word + "\n" for word in candidates(argv[1:])))
        parsed = parse(argv)
        _check_text(argv)
        return _run(parsed, site_packages)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except Exception as error:  # noqa: BLE001  the root of the program: nothing above could show it
        return _report(error, parsed)


def _check_text(argv: list[str]) -> None:
    for word in argv:
        if not word.isascii() and any("\ud800" <= c <= "\udfff" for c in word):
            from isopod.world.errors import InvalidArgument

            raise InvalidArgument("argument", word.encode("utf-8", "replace").decode(), "not UTF-8")


def _run(parsed: Parsed, site_packages: str) -> int:
    command = parsed.command
    if command is None:
        return _about(parsed)
    if command is grammar.NODE:
        return _node(parsed, site_packages)
    if command is grammar.PULSE:
        return _pulse(parsed, site_packages)
    if parsed.flag("help"):
        from isopod.cli.manual import page

        return _print(page(command))
    if command.name == "help":
        return _help(parsed)
    if command.name == "completion":
        from isopod.cli.completion import script

        return _print(script(parsed.words[0]))
    return _room(command, site_packages)(parsed)


def _room(command: Command, site_packages: str) -> Handler:
    """Return what carries out a command, importing only its room, and the installed packages where it needs them."""
    if command.name == "restore":
        _find_packages(site_packages)
        from isopod.cli.backup import put_back

        return put_back
    if command.name.startswith("cluster "):
        if command.name == "cluster recover":
            _find_packages(site_packages)
        from isopod.cli.cluster import main as cluster

        return cluster
    if command.name.startswith("kv "):
        from isopod.cli.kv import main as kv

        return kv
    if command.name in ("port", "top"):
        return _table(command.name)
    if command.name.startswith("vm "):
        from isopod.cli import vm

        return vm.VERBS[command.name]
    if command.name.startswith("config "):
        _find_packages(site_packages)
        from isopod.cli.config import VERBS

        return VERBS[command.name]
    if command.name.startswith("journal "):
        _find_packages(site_packages)
        from isopod.cli.journal import main as journal

        return journal
    if command.name == "pulse demo":
        _find_packages(site_packages)
        from isopod.node.pulse import demo

        return lambda parsed: demo(parsed.value("sandboxes"), parsed.value("listen-address"))
    if command.name == "sim":
        _find_packages(site_packages)
        from isopod.cli.sim import main as sim

        return sim
    return _handler(command.method)


def _table(name: str) -> Handler:
    """Return what carries out a command that makes its table itself."""
    if name == "port":
        from isopod.cli.ports import port

        return port
    from isopod.cli.top import main as top

    return top


def _handler(method: str) -> Handler:
    """Return what carries out commands of this RPC method, importing only its room."""
    room, _, verb = method.partition(".")
    if room == "container":
        from isopod.cli import containers

        return containers.VERBS[verb]
    if room == "image":
        from isopod.cli import images

        return images.VERBS[verb]
    from isopod.cli import networks

    return networks.VERBS[method]


def _about(parsed: Parsed) -> int:
    from isopod.cli import manual

    if parsed.flag("version"):
        from isopod import __version__

        return _print(f"{grammar.PROGRAM} {__version__}\n")
    return _print(manual.family(parsed.group) if parsed.group else manual.overview())


def _help(parsed: Parsed) -> int:
    from isopod.cli import manual

    if not parsed.words:
        return _print(manual.overview())
    command, _n_words = grammar.find(parsed.words)
    if command is not None:
        return _print(manual.page(command))
    return _about(parse(parsed.words[:1]))


def _node(parsed: Parsed, site_packages: str) -> int:
    words = parsed.words
    if any(word in grammar.HELP.names for word in words):
        from isopod.cli.manual import page

        return _print(page(grammar.NODE))
    _find_packages(site_packages)
    from isopod.node.main import main as node_main

    socket = parsed.value("socket")
    return node_main([*(["--socket", socket] if socket else []), *words])


def _pulse(parsed: Parsed, site_packages: str) -> int:
    if any(word in grammar.HELP.names for word in parsed.words):
        from isopod.cli.manual import page

        return _print(page(grammar.PULSE))
    if parsed.words in (["--version"], ["version"]):
        from isopod import __version__

        return _print(f"{grammar.PULSE.name} {__version__}\n")
    _find_packages(site_packages)
    from isopod.node.pulse import main as pulse_main

    return pulse_main(parsed.words)


def _find_packages(site_packages: str) -> None:
    """Make the installed packages importable, if they are not."""
    if site_packages:
        import site

        site.addsitedir(site_packages)


def _print(text: str) -> int:
    console.write_all(console.STDOUT, text.encode())
    return 0


def _report(error: Exception, parsed: Parsed | None) -> int:
    """Say what failed; return the exit code."""
    from isopod.cli.say import complain
    from isopod.world.errors import BugError, IsopodError, from_os_error

    if isinstance(error, OSError):
        failure: IsopodError = from_os_error(error, "use", str(error.filename or "the terminal or an output of this command"))
    elif isinstance(error, IsopodError):
        failure = error
    else:
        failure = BugError(f"{type(error).__name__}: {error}")
    complain(failure.message, failure.hint)
    command = parsed.command if parsed else None
    if parsed is None or command is None or failure.code == "command_not_runnable":
        return failure.exit_code
    if command.name == "start" and not (parsed.flag("attach") or parsed.flag("interactive")):
        return failure.exit_code
    return command.failure_exit_code or failure.exit_code
