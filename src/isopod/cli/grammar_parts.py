"""What a grammar is made of, and the arguments and options that several commands share. See `grammar`."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


class Option:
    """One option.

    Args:
        names: All spellings, the long one last: "-d --detach".
        help: One line.
        value: The name of its value in help; "" for a flag.
        repeatable: May be given several times, all of which count.
        default: What holds if it is not given, in words; shown in help.
        choices: The only values allowed.
        complete: What completion offers for its value: "network", "signal", "file" or "".
    """

    __slots__ = ("choices", "complete", "default", "help", "key", "names", "repeatable", "value")

    def __init__(
        self,
        names: str,
        help: str,  # noqa: A002  the word users know
        value: str = "",
        *,
        repeatable: bool = False,
        default: str = "",
        choices: tuple[str, ...] = (),
        complete: str = "",
    ) -> None:
        self.names: Final = tuple(names.split())
        self.key: Final = self.names[-1].lstrip("-")
        self.help: Final = help
        self.value: Final = value
        self.repeatable: Final = repeatable
        self.default: Final = default
        self.choices: Final = choices
        self.complete: Final = complete


class Argument:
    """One positional argument.

    Args:
        name: As help shows it.
        many: One or more (with `optional`: none or more).
        optional: May be left out.
        complete: What completion offers: "container", "image", "network", "file", "folder" or "".
    """

    __slots__ = ("complete", "many", "name", "optional")

    def __init__(self, name: str, *, many: bool = False, optional: bool = False, complete: str = "") -> None:
        self.name: Final = name
        self.many: Final = many
        self.optional: Final = optional
        self.complete: Final = complete


class Command:
    """One command.

    Args:
        names: All its names, the one of the help first; a name is one or two words.
        help: One line.
        about: What else to know, a paragraph; "".
        arguments: Positional arguments in order; only the last may be `many` or `optional`.
        options: Its options, without the global ones.
        examples: Whole command lines.
        method: The RPC method behind it; "" for none.
        rest: Options end at the first positional argument: what follows belongs to the command inside.
        usage_exit_code: What a malformed command line returns.
        failure_exit_code: What an engine error returns while a container is attached; 0 for the error's own.
    """

    __slots__ = (
        "about",
        "arguments",
        "examples",
        "failure_exit_code",
        "help",
        "method",
        "name",
        "names",
        "options",
        "rest",
        "usage_exit_code",
    )

    def __init__(
        self,
        names: tuple[str, ...],
        help: str,  # noqa: A002  the word users know
        *,
        about: str = "",
        arguments: tuple[Argument, ...] = (),
        options: tuple[Option, ...] = (),
        examples: tuple[str, ...] = (),
        method: str = "",
        rest: bool = False,
        usage_exit_code: int = 2,
        failure_exit_code: int = 0,
    ) -> None:
        self.names: Final = names
        self.name: Final = names[0]
        self.help: Final = help
        self.about: Final = about
        self.arguments: Final = arguments
        self.options: Final = options
        self.examples: Final = examples
        self.method: Final = method
        self.rest: Final = rest
        self.usage_exit_code: Final = usage_exit_code
        self.failure_exit_code: Final = failure_exit_code


FORMAT: Final = Option("--format", "how to print", "FORMAT", default="table", choices=("table", "json"))
QUIET: Final = Option("-q --quiet", "print only names or ids, one a line")
CONTAINER: Final = Argument("CONTAINER", complete="container")
CONTAINERS: Final = Argument("CONTAINER", many=True, complete="container")
IMAGES: Final = Argument("IMAGE", many=True, complete="image")
NETWORKS: Final = Argument("NETWORK", many=True, complete="network")
COMMAND: Final = Argument("COMMAND", many=True, optional=True)
JOURNAL: Final = Argument("FOLDER", complete="folder")
PUBLISH: Final = Option(
    "-p --publish",
    "lead a port of the host, or a range, to one inside; without HOST a free one is chosen",
    "[[IP:]HOST:]PORT[/udp]",
    repeatable=True,
)
NETWORK_RATE: Final = Option("--network-rate", "bytes a second at most: 10m, or 10m:1m to receive and to send", "RATE", default="no limit")
