"""Parsing a command line by the grammar, the way getopt_long(3) and docker do.

`-abc` is `-a -b -c`; `-nNAME`, `-n NAME`, `-n=NAME`, `--name NAME` and `--name=NAME` are the same; `--` ends the options; a flag
may be told `--rm=false`. Options may stand between positional arguments, except for commands whose rest belongs to another
program. Of an option given twice the last counts, unless it is repeatable.

Whatever the words are, the outcome is a `Parsed` or a `UsageError`.
"""

from __future__ import annotations

from isopod.cli import grammar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final

    from isopod.cli.grammar_parts import Command, Option
    from isopod.world.errors import UsageError

_BOOLEANS: Final = {"true": True, "false": False}


class Parsed:
    """A command line understood.

    `command` is None for the program's own help and version; `group` is then the first word of a family asked about
    ("network"), or "".
    """

    __slots__ = ("_flags", "_values", "command", "group", "words")

    def __init__(self) -> None:
        self.command: Command | None = None
        self.group = ""
        self.words: list[str] = []
        """The positional arguments."""
        self._flags: Final[dict[str, bool]] = {}
        self._values: Final[dict[str, list[str]]] = {}

    def flag(self, key: str) -> bool:
        """Tell whether a flag was given; `key` is its long name."""
        return self._flags.get(key, False)

    def value(self, key: str, default: str = "") -> str:
        """Return an option's value, the last one given."""
        return self._values[key][-1] if key in self._values else default

    def values(self, key: str) -> list[str]:
        """Return all values of a repeatable option, in order."""
        return self._values.get(key, [])

    def put(self, option: Option, value: str | bool) -> None:
        """Take note of an option."""
        if isinstance(value, bool):
            self._flags[option.key] = value
        else:
            self._values.setdefault(option.key, []).append(value)


def parse(argv: list[str]) -> Parsed:
    """Understand a command line.

    Args:
        argv: The words after the program's name.

    Raises:
        UsageError: It is not in the grammar; `exit_code` is what the command says for that.
    """
    parsed = Parsed()
    n_global = _options(argv, 0, (*grammar.GLOBAL_OPTIONS, grammar.VERSION), parsed, stop_at_word=True)
    rest = argv[n_global:]
    if not rest or parsed.flag("help") or parsed.flag("version"):
        return parsed
    command, n_words = grammar.find(rest)
    if command is None:
        return _family(rest, parsed)
    parsed.command = command
    if command in grammar.DAEMONS:
        parsed.words = rest[n_words:]
        return parsed
    try:
        _options(rest, n_words, (*command.options, *grammar.GLOBAL_OPTIONS), parsed, stop_at_word=command.rest)
        if not parsed.flag("help"):
            _check_arguments(parsed, command)
    except Exception as error:
        from isopod.world.errors import UsageError

        if isinstance(error, UsageError):
            error.exit_code = command.usage_exit_code
        raise
    return parsed


def _options(argv: list[str], start: int, options: tuple[Option, ...], parsed: Parsed, *, stop_at_word: bool) -> int:
    """Read options from `argv[start:]`, everything else into `parsed.words`; return where reading stopped.

    With `stop_at_word` that is the first positional word, and (inside a command) all from there on is positional.
    """
    by_name = {name: option for option in options for name in option.names}
    index = start
    while index < len(argv):
        word = argv[index]
        if word == "--":
            parsed.words += argv[index + 1 :]
            return len(argv)
        if len(word) < 2 or word[0] != "-":
            if stop_at_word:
                if start:
                    parsed.words += argv[index:]
                return index
            parsed.words.append(word)
            index += 1
            continue
        index += 1
        following = argv[index] if index < len(argv) else None
        if word.startswith("--"):
            index += _long(word, following, by_name, parsed)
        else:
            index += _cluster(word, following, by_name, parsed)
        if parsed.flag("help"):
            return len(argv)
    return index


def _long(word: str, following: str | None, by_name: dict[str, Option], parsed: Parsed) -> int:
    """Read `--name`, `--name=value`; return how many following words it took."""
    name, equals, value = word.partition("=")
    option = by_name.get(name)
    if option is None:
        raise _unknown(name, by_name)
    if not option.value:
        if equals and value not in _BOOLEANS:
            raise _usage(f"option {name} takes no value, but got {value!r}")
        parsed.put(option, _BOOLEANS[value] if equals else True)
        return 0
    if equals:
        _put_value(parsed, option, value, name)
        return 0
    _put_value(parsed, option, following, name)
    return 1


def _cluster(word: str, following: str | None, by_name: dict[str, Option], parsed: Parsed) -> int:
    """Read `-a`, `-abc`, `-nVALUE`, `-n VALUE`, `-n=VALUE`; return how many following words it took."""
    for position in range(1, len(word)):
        name = "-" + word[position]
        option = by_name.get(name)
        if option is None:
            raise _unknown(word if position == 1 and len(word) > 2 else name, by_name, short=name)
        rest = word[position + 1 :]
        if not option.value:
            parsed.put(option, True)
            continue
        if rest:
            _put_value(parsed, option, rest.removeprefix("="), name)
            return 0
        _put_value(parsed, option, following, name)
        return 1
    return 0


def _put_value(parsed: Parsed, option: Option, value: str | None, name: str) -> None:
    if value is None:
        raise _usage(f"option {name} needs a value: {option.value}")
    if option.choices and value not in option.choices:
        raise _usage(f"option {name} cannot be {value!r}", f"choose one of: {', '.join(option.choices)}")
    parsed.put(option, value)


def _check_arguments(parsed: Parsed, command: Command) -> None:
    """Compare the positional words with the arguments the command wants."""
    arguments = list(command.arguments)
    if command.name == "exec" and parsed.value("name"):
        arguments = arguments[1:]
    needed = [argument for argument in arguments if not argument.optional]
    if len(parsed.words) < len(needed):
        missing = needed[len(parsed.words)].name
        raise _usage(f"isopod {command.name} needs {missing}", f"see: isopod {command.name} --help")
    unlimited = bool(arguments) and arguments[-1].many
    if not unlimited and len(parsed.words) > len(arguments):
        surplus = parsed.words[len(arguments)]
        raise _usage(f"isopod {command.name} does not take {surplus!r}", f"see: isopod {command.name} --help")


def _family(words: list[str], parsed: Parsed) -> Parsed:
    """Understand what is no command: a family's name, or an error."""
    groups = [name for name, _help in grammar.GROUPS]
    if words[0] not in groups:
        names = [name for command in grammar.COMMANDS for name in command.names if " " not in name]
        raise _usage(f"no such command: {words[0]}", _closest(words[0], [*names, *groups]) or "see: isopod --help")
    group = words[0]
    rest = [word for word in words[1:] if word not in grammar.HELP.names]
    if not rest:
        parsed.group = group
        return parsed
    if rest[0].startswith("-"):
        raise _unknown(rest[0], dict.fromkeys(grammar.HELP.names, grammar.HELP))
    names = [name.split()[1] for command in grammar.COMMANDS for name in command.names if name.startswith(group + " ")]
    hint = _closest(rest[0], names)
    raise _usage(f"no such command: {group} {rest[0]}", hint or f"see: isopod {group} --help")


def _unknown(word: str, by_name: dict[str, Option], short: str = "") -> UsageError:
    """Make the error of an unknown option, with the closest one there is."""
    if short and word != short:
        long = "-" + word.partition("=")[0]
        if long in by_name:
            return _usage(f"no such option: {short} (in {word})", f"did you mean {long}?")
        return _usage(f"no such option: {short} (in {word})", "see the options with --help")
    closest = _closest(word, [name for name in by_name if name.startswith("--")])
    return _usage(f"no such option: {word}", closest or "see the options with --help")


def _closest(word: str, known: Iterable[str]) -> str:
    """Return a hint naming what `word` was probably meant to be, or ""."""
    from difflib import get_close_matches  # only a failing command line pays for it

    matches = get_close_matches(word, list(known), 1)
    return f"did you mean {matches[0]}?" if matches else ""


def _usage(message: str, hint: str = "") -> UsageError:
    from isopod.world.errors import UsageError

    return UsageError(message, hint)
