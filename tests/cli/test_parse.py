"""The parser: what a line means, what is refused and with which code, and that nothing else can happen."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.cli import grammar
from isopod.cli.grammar_parts import Command
from isopod.cli.parse import Parsed, parse
from isopod.world.errors import UsageError

NAMES = [name for command in grammar.COMMANDS for name in command.names]
OPTIONS = [name for command in grammar.COMMANDS for option in command.options for name in option.names]


def named(parsed: Parsed) -> str:
    return parsed.command.name if parsed.command else ""


@pytest.mark.parametrize(
    "line,name,words",
    [
        ("run img", "run", ["img"]),
        ("run img ls -l --color", "run", ["img", "ls", "-l", "--color"]),
        ("run -it --rm img sh", "run", ["img", "sh"]),
        ("run -- img -x", "run", ["img", "-x"]),
        ("run img -- x", "run", ["img", "--", "x"]),
        ("container run img", "run", ["img"]),
        ("exec web ls -a", "exec", ["web", "ls", "-a"]),
        ("exec -n web ls -a", "exec", ["ls", "-a"]),
        ("rm a -f b", "rm", ["a", "b"]),
        ("rm a -- -f", "rm", ["a", "-f"]),
        ("container ls", "ps", []),
        ("image rm x", "rmi", ["x"]),
        ("image ls", "images", []),
        ("network list", "network ls", []),
        ("network create --subnet 10.0.0.0/24 n", "network create", ["n"]),
        ("import - name", "import", ["-", "name"]),
        ("logs -f web --tail 5", "logs", ["web"]),
        ("start web -d", "start", ["web"]),
        ("node --root /x -d", "node", ["--root", "/x", "-d"]),
        ("-H /s ps", "ps", []),
        ("create img sh -c x", "create", ["img", "sh", "-c", "x"]),
    ],
)
@pytest.mark.row("R2", "R7")
def test_line_means_command_and_words(line: str, name: str, words: list[str]) -> None:
    parsed = parse(line.split())
    assert (named(parsed), parsed.words) == (name, words)


@pytest.mark.parametrize(
    "line", ["run -n web img", "run --name web img", "run --name=web img", "run -nweb img", "run -n=web img", "run -itnweb img"]
)
def test_value_spellings(line: str) -> None:
    assert parse(line.split()).value("name") == "web"


def test_cluster_repetition_and_last_wins() -> None:
    parsed = parse("run -dit --rm=false -e A=1 -eB --env C=3 -m 1m -m 2m --pids-limit -1 img -d".split())
    assert [parsed.flag(key) for key in ("detach", "interactive", "tty", "rm")] == [True, True, True, False]
    assert parsed.values("env") == ["A=1", "B", "C=3"]
    assert (parsed.value("memory"), parsed.value("pids-limit")) == ("2m", "-1")
    assert parsed.words == ["img", "-d"]


def test_socket_before_and_after_the_command() -> None:
    assert parse(["-H", "/a", "ps"]).value("socket") == "/a"
    assert parse(["ps", "--socket=/b"]).value("socket") == "/b"
    assert parse(["-H", "/a", "ps", "-H", "/b"]).value("socket") == "/b"


@pytest.mark.parametrize(
    "line,exit_code,message,hint",
    [
        ("runn x", 2, "no such command: runn", "did you mean run?"),
        ("frobnicate", 2, "no such command: frobnicate", "see: isopod --help"),
        ("network crate x", 2, "no such command: network crate", "did you mean create?"),
        ("image zzz", 2, "no such command: image zzz", "see: isopod image --help"),
        ("ps --al", 2, "no such option: --al", "did you mean --all?"),
        ("ps -x", 2, "no such option: -x", "see the options with --help"),
        ("ps -ax", 2, "no such option: -x", "see the options with --help"),
        ("images -format json", 2, "no such option: -f (in -format)", "did you mean --format?"),
        ("-z", 2, "no such option: -z", "see the options with --help"),
        ("run --detatch img", 125, "no such option: --detatch", "did you mean --detach?"),
        ("run", 125, "isopod run needs IMAGE", "see: isopod run --help"),
        ("run -n", 125, "option -n needs a value: NAME", ""),
        ("exec web", 125, "isopod exec needs COMMAND", "see: isopod exec --help"),
        ("exec -n web", 125, "isopod exec needs COMMAND", "see: isopod exec --help"),
        ("rm", 2, "isopod rm needs CONTAINER", "see: isopod rm --help"),
        ("ps web", 2, "isopod ps does not take 'web'", "see: isopod ps --help"),
        ("ps --format yaml", 2, "option --format cannot be 'yaml'", "choose one of: table, json"),
        ("ps --all=maybe", 2, "option --all takes no value, but got 'maybe'", ""),
        ("network create --driver macvlan x", 2, "option --driver cannot be 'macvlan'", "choose one of: bridge"),
        ("commit a", 2, "isopod commit needs IMAGE", "see: isopod commit --help"),
    ],
)
def test_refused(line: str, exit_code: int, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(line.split())
    assert (caught.value.exit_code, caught.value.message, caught.value.hint) == (exit_code, message, hint)


@given(
    st.lists(
        st.one_of(st.sampled_from([*NAMES, *OPTIONS, "--", "-", "", "=", "-=", "--x=", "img", "--help"]), st.text(max_size=8)), max_size=8
    )
)
def test_any_words_end_in_a_meaning_or_a_usage_error(words: list[str]) -> None:
    argv = [part for word in words for part in (word.split() if word in NAMES else [word])]
    try:
        parsed = parse(argv)
    except UsageError as error:
        assert error.message
        assert "\n" not in error.hint
        assert error.exit_code in (2, 125)
    else:
        assert parsed.command is None or len(parsed.words) <= len(argv)


@given(st.sampled_from([c for c in grammar.COMMANDS if c.rest and c not in grammar.DAEMONS]), st.lists(st.text(max_size=6), max_size=5))
def test_rest_belongs_to_the_command_inside(command: Command, rest: list[str]) -> None:
    parsed = parse([*command.name.split(), "first", "second", *rest])
    assert parsed.words == ["first", "second", *rest]


def test_grammar_is_sound() -> None:
    assert len(set(NAMES)) == len(NAMES), "a name means two commands"
    groups = dict(grammar.GROUPS)
    for command in grammar.COMMANDS:
        spellings = [name for option in (*command.options, *grammar.GLOBAL_OPTIONS) for name in option.names]
        assert len(set(spellings)) == len(spellings), command.name
        assert not any(argument.many for argument in command.arguments[:-1]), command.name
        optional = [argument.optional for argument in command.arguments]
        assert optional == sorted(optional), f"{command.name}: what may be left out comes last"
        assert all(len(name.split()) == 1 or name.split()[0] in groups for name in command.names), command.name
        for example in command.examples:
            inner = example.split("isopod ", 1)[1].split(" > ")[0]
            assert named(parse(shlex.split(inner))) == command.name, example


def test_methods_are_in_the_contract() -> None:
    from isopod.api import cluster, methods
    from isopod.api.store import methods as store

    known = {method.name for method in (*methods.METHODS, *cluster.METHODS, *store.METHODS)}
    assert {command.method for command in grammar.COMMANDS if command.method} <= known
