"""docs/cli.md, made from the grammar: `python -m isopod.cli.reference > docs/cli.md`."""

from __future__ import annotations

from isopod.cli import grammar, manual
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isopod.cli.grammar_parts import Command, Option

_HEAD = """\
# The command line

Made from `isopod.cli.grammar` by `python -m isopod.cli.reference`; a test compares. Errors are one line `error: ...` on standard
error, with a line `hint: ...` where something can be done. Data goes to standard output, everything else to standard error.

Options may stand before or after other words, except in `run`, `create` and `exec`: what follows the image or the container belongs
to the command inside. `-it` is `-i -t`; `--name=web`, `--name web`, `-n web` and `-nweb` are the same; `--` ends the options.
"""


def reference() -> str:
    """Return the reference as Markdown."""
    parts = [_HEAD, "## Options of every command\n", _table((*grammar.GLOBAL_OPTIONS, grammar.VERSION))]
    for title, commands in grammar.SECTIONS:
        parts.append(f"## {title}\n")
        parts += [_section(command) for command in commands]
    parts += ["## Exit codes\n", "| code | meaning |\n|---|---|"]
    text = "\n".join(parts) + "\n" + "".join(f"| {code} | {meaning} |\n" for code, meaning in grammar.EXIT_CODES)
    return text + "\nAttached `run`, `exec` and `start` return the command's own exit code.\n"


def main() -> None:
    """Print the reference."""
    console.write_all(console.STDOUT, reference().encode())


def _section(command: Command) -> str:
    parts = [f"### isopod {command.name}\n", f"`{manual.usage(command)}`\n", f"{command.help[0].upper()}{command.help[1:]}.\n"]
    if command.about:
        parts.append(command.about + "\n")
    facts = []
    if len(command.names) > 1:
        facts.append("Also: " + ", ".join(f"`{name}`" for name in command.names[1:]) + ".")
    if command.method:
        facts.append(f"RPC method: `{command.method}`.")
    if facts:
        parts.append(" ".join(facts) + "\n")
    options = manual.options_of(command)
    if options:
        parts.append(_table(options))
    if command.examples:
        parts.append("```\n" + "\n".join(command.examples) + "\n```\n")
    return "\n".join(parts)


def _table(options: tuple[Option, ...]) -> str:
    rows = [f"| `{manual.option_form(option).strip()}` | {manual.option_help(option)} |" for option in options]
    return "| option | meaning |\n|---|---|\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
