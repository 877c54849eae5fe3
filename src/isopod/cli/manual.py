"""Help as text, from the grammar: the overview, a family of commands, one command. Needs no node."""

from __future__ import annotations

from isopod.cli import grammar
from isopod.cli.grammar_parts import Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from isopod.cli.grammar_parts import Argument, Command

_INDENT: Final = "  "
_GAP: Final = 2
_LEFT_COLUMNS_MAX: Final = 30
_LINE_COLUMNS: Final = 100


def overview() -> str:
    """Return the help of the program."""
    lines = [grammar.ABOUT, "", f"Usage: {grammar.PROGRAM} [OPTIONS] COMMAND ..."]
    for title, commands in grammar.SECTIONS:
        shown = [(command.name, command.help) for command in commands if command.name.split()[0] not in _families()]
        if title == "Networks":
            shown = [(command.name, command.help) for command in commands]
        if shown:  # the rest stands under the families
            lines += ["", f"{title}:", *_columns(shown)]
    lines += ["", "Families (their commands under a common first word):"]
    lines += _columns([(f"{name} ...", about) for name, about in grammar.GROUPS])
    lines += ["", "Options:", *_options((*grammar.GLOBAL_OPTIONS, grammar.VERSION))]
    lines += ["", f"`{grammar.PROGRAM} COMMAND --help` explains a command; docs/cli.md has all of them."]
    return _text(lines)


def family(name: str) -> str:
    """Return the help of the commands that begin with `name`."""
    about = dict(grammar.GROUPS)[name]
    rows = []
    for command in grammar.COMMANDS:
        own = next((alias for alias in command.names if alias.startswith(name + " ")), None)
        if own is not None:
            others = [alias for alias in command.names if alias != own and " " not in alias]
            rows.append((own, command.help + (f" (also: {', '.join(others)})" if others else "")))
    return _text([f"{grammar.PROGRAM} {name}: {about}", "", "Commands:", *_columns(rows)])


def page(command: Command) -> str:
    """Return the help of one command."""
    lines = [f"Usage: {usage(command)}", "", command.help[0].upper() + command.help[1:] + "."]
    if command.about:
        lines += ["", *_wrapped(command.about)]
    if len(command.names) > 1:
        lines += ["", "Also called: " + ", ".join(command.names[1:])]
    lines += ["", "Options:", *_options((*options_of(command), *grammar.global_options_of(command)))]
    if command.examples:
        lines += ["", "Examples:", *(_INDENT + example for example in command.examples)]
    return _text(lines)


def usage(command: Command) -> str:
    """Return the one-line form: isopod rm [OPTIONS] CONTAINER..."""
    return " ".join([grammar.PROGRAM, command.name, "[OPTIONS]", *map(argument_form, command.arguments)])


def argument_form(argument: Argument) -> str:
    """Return NAME, NAME..., [NAME] or [NAME...]."""
    name = argument.name + ("..." if argument.many else "")
    return f"[{name}]" if argument.optional else name


def options_of(command: Command) -> tuple[Option, ...]:
    """Return a command's own options; those of the daemon come from the table of paths."""
    if command is not grammar.NODE:
        return command.options
    from isopod.world.paths import PATHS

    paths = [Option(row.flag, row.help, "PATH", default=row.default, complete="file") for row in PATHS]
    return (*command.options, *(option for option in paths if option.key != grammar.SOCKET.key))


def option_form(option: Option) -> str:
    """Return the spelling of an option in lists: -n, --name NAME."""
    spelled = ", ".join(option.names)
    if not option.names[0].startswith("--"):
        return f"{spelled} {option.value}".rstrip()
    return f"    {spelled} {option.value}".rstrip()


def option_help(option: Option) -> str:
    """Return an option's help with its default and whether it repeats."""
    notes = []
    if option.choices:
        notes.append("one of " + ", ".join(option.choices))
    if option.default:
        notes.append("default: " + option.default)
    if option.repeatable:
        notes.append("repeatable")
    return option.help + (f" ({'; '.join(notes)})" if notes else "")


def _families() -> list[str]:
    return [name for name, _about in grammar.GROUPS]


def _options(options: tuple[Option, ...]) -> list[str]:
    return _columns([(option_form(option), option_help(option)) for option in options])


def _columns(rows: list[tuple[str, str]]) -> list[str]:
    """Return rows as two columns; a left side that is too wide gets a line of its own."""
    width = max((len(left) for left, _ in rows if len(left) <= _LEFT_COLUMNS_MAX), default=0)
    lines: list[str] = []
    for left, right in rows:
        if len(left) > width:
            lines += [_INDENT + left, _INDENT + " " * (width + _GAP) + right]
        else:
            lines.append(_INDENT + left.ljust(width + _GAP) + right)
    return lines


def _wrapped(paragraph: str) -> list[str]:
    lines = [""]
    for word in paragraph.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > _LINE_COLUMNS:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


def _text(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
