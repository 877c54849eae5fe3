"""Completion: three small scripts that ask `isopod __complete`, and what it answers.

The scripts know nothing but how their shell hands over words: the grammar stays the only list. Names of containers, images
and networks come from the node, if one answers at once; silence otherwise, for a shell's prompt is no place for errors.
"""

from __future__ import annotations

from isopod.cli import grammar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from isopod.cli.grammar_parts import Command, Option

NODE_TIMEOUT_S: Final = 1.0
SIGNALS: Final = ("HUP", "INT", "KILL", "QUIT", "TERM", "USR1", "USR2")

_BASH: Final = """\
# bash completion for isopod; load it with: source <(isopod completion bash)
_isopod() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}"
    local -a words
    # COMP_WORDS is cut at ':' and '=', which names of images hold: cut the line at blanks.
    IFS=$' \\t' read -ra words <<< "$line"
    [[ "$line" == *[[:blank:]] ]] && words+=("")
    COMPREPLY=($(isopod __complete "${words[@]:1}" 2>/dev/null))
    local whole="${words[-1]}" shown="${COMP_WORDS[COMP_CWORD]}"
    [[ "$shown" == ":" || "$shown" == "=" ]] && shown=""
    local prefix="${whole%"$shown"}"
    COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
    [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
    return 0
}
complete -o default -F _isopod isopod
"""
_ZSH: Final = """\
#compdef isopod
# zsh completion for isopod; put it into a folder of $fpath as _isopod
_isopod() {
    local -a found
    found=(${(f)"$(isopod __complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( ${#found} )); then
        compadd -- $found
    else
        _files
    fi
}
if [ "$funcstack[1]" = "_isopod" ]; then
    _isopod "$@"
else
    compdef _isopod isopod
fi
"""
_FISH: Final = """\
# fish completion for isopod; put it into ~/.config/fish/completions
function __isopod_complete
    set -l words (commandline -opc) (commandline -ct)
    isopod __complete $words[2..-1] 2>/dev/null
end
complete -c isopod -a '(__isopod_complete)'
"""
SCRIPTS: Final = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(shell: str) -> str:
    """Return the completion script of a shell.

    Raises:
        InvalidArgument: There is none for it.
    """
    if shell not in SCRIPTS:
        from isopod.world.errors import InvalidArgument

        raise InvalidArgument("shell", shell, f"choose one of: {', '.join(SCRIPTS)}")
    return SCRIPTS[shell]


def candidates(words: list[str]) -> list[str]:
    """Return what the last of `words` may become; [] where the shell should offer files."""
    *before, current = words or [""]
    socket, before = _without_globals(before)
    command, n_words = grammar.find(before)
    if command is None:
        return _matching(_names(before, current), current)
    options = (*command.options, *grammar.GLOBAL_OPTIONS)
    if command in grammar.DAEMONS:
        from isopod.cli.manual import options_of

        options = (*options_of(command), *grammar.global_options_of(command))
    given = before[n_words:]
    n_arguments, awaiting = _state(command, options, given)
    if awaiting is not None:
        return _matching([*awaiting.choices, *_objects(awaiting.complete, socket)], current)
    if command.rest and n_arguments and command not in grammar.DAEMONS:
        return []
    if current.startswith("-"):
        return _matching([name for option in options for name in option.names if name.startswith("--")], current)
    return _matching(_arguments(command, given, n_arguments, socket), current)


def _without_globals(words: list[str]) -> tuple[str, list[str]]:
    """Return the socket that leading options name, and the words after them."""
    socket = ""
    while words and words[0].startswith("-"):
        name, equals, value = words[0].partition("=")
        takes = name in grammar.SOCKET.names and not equals
        if name in grammar.SOCKET.names:
            socket = value if equals else "".join(words[1:2])
        words = words[2 if takes else 1 :]
    return socket, words


def _names(before: list[str], current: str) -> list[str]:
    """Return the commands, families and global options that may follow `before`."""
    if len(before) == 1:
        return [name.split()[1] for command in grammar.COMMANDS for name in command.names if name.startswith(before[0] + " ")]
    if before:
        return []
    if current.startswith("-"):
        return [name for option in (*grammar.GLOBAL_OPTIONS, grammar.VERSION) for name in option.names if name.startswith("--")]
    singles = [name for command in grammar.COMMANDS for name in command.names if " " not in name]
    return [*singles, *(name for name, _about in grammar.GROUPS)]


def _state(command: Command, options: tuple[Option, ...], given: list[str]) -> tuple[int, Option | None]:
    """Return how many arguments were given, and the option that still waits for its value."""
    by_name = {name: option for option in options for name in option.names}
    n_arguments = 0
    awaiting: Option | None = None
    for word in given:
        if awaiting is not None:
            awaiting = None
        elif word.startswith("-") and len(word) > 1 and not (command.rest and n_arguments):
            # Of a cluster like -it only the last letter can still wait for a value.
            option = by_name.get(word if word.startswith("--") else "-" + word[-1])
            awaiting = option if option is not None and option.value else None
        else:
            n_arguments += 1
    return n_arguments, awaiting


def _arguments(command: Command, given: list[str], n_arguments: int, socket: str) -> list[str]:
    if not command.arguments:
        return []
    argument = command.arguments[min(n_arguments, len(command.arguments) - 1)]
    if n_arguments >= len(command.arguments) and not argument.many:
        return []
    if argument.complete == "command":
        return _names(given, "")
    return _objects(argument.complete, socket)


def _objects(what: str, socket: str) -> list[str]:
    """Return the names of that kind; the node is asked for those it keeps."""
    if what == "signal":
        return list(SIGNALS)
    if what == "token action":
        return ["create", "list", "revoke"]
    if what == "shell":
        return list(SCRIPTS)
    if what not in ("container", "image", "network"):
        return []
    from isopod.world.errors import IsopodError

    try:
        found = _ask(what, socket)
    except IsopodError:
        return []
    return [*found, *(("none", "host") if what == "network" else ())]


def _ask(what: str, socket: str) -> list[str]:
    from isopod.cli.lean import Link, rows_of, text_of
    from isopod.cli.settings import socket_path

    with Link(socket_path(socket)) as link:
        answer = link.call(f"{what}.list", {"all": True} if what == "container" else {}, NODE_TIMEOUT_S)
    rows = rows_of(answer, what + "s")
    if what == "image":
        return [name for row in rows for name in rows_of(row, "names") if isinstance(name, str)]
    return [text_of(row, "name") for row in rows]


def _matching(words: list[str], current: str) -> list[str]:
    return sorted({word for word in words if word.startswith(current)})
