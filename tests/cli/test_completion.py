"""What completion offers, and that the shells' scripts are what their shells take."""

import shutil
import subprocess
import sys

import pytest

from isopod.cli import grammar
from isopod.cli.completion import SCRIPTS, candidates
from tests.cli.scripted_node import SOURCE, ScriptedNode, answering, environment, isopod

NOWHERE = ["-H", "/nonexistent/socket"]


@pytest.mark.parametrize(
    "words,expected",
    [
        (["ru"], ["run"]),
        (["network", ""], ["connect", "create", "disconnect", "inspect", "list", "ls", "remove", "rm"]),
        (["ne"], ["network"]),
        (["--v"], ["--version"]),
        (["run", "--d"], ["--detach", "--disk", "--driver"]),
        (["ps", "--format", ""], ["json", "table"]),
        (["kill", "-s", "USR"], ["USR1", "USR2"]),
        (["completion", ""], ["bash", "fish", "zsh"]),
        (["help", "net"], ["network"]),
        (["node", "--run-r"], ["--run-root"]),
        (["run", "img", "--d"], []),
        (["run", "-v", ""], []),
        ([*NOWHERE, "rm", ""], []),
        ([*NOWHERE, "run", "--network", ""], []),
        ([], sorted({name.split()[0] for command in grammar.COMMANDS for name in command.names})),
    ],
)
def test_candidates(words: list[str], expected: list[str]) -> None:
    assert candidates(words) == expected


def test_names_come_from_the_node(folder: str) -> None:
    with ScriptedNode(folder, answering("container.list", {"containers": [{"name": "web"}, {"name": "db"}]})) as node:
        assert isopod("__complete", "-H", node.path, "exec", "-it", "w").stdout == b"web\n"
    with ScriptedNode(folder, answering("image.list", {"images": [{"names": ["a:1", "b:1"]}]})) as node:
        assert isopod("__complete", "-H", node.path, "run", "--rm", "").stdout == b"a:1\nb:1\n"
    with ScriptedNode(folder, answering("network.list", {"networks": [{"name": "bridge"}]})) as node:
        assert isopod("__complete", "-H", node.path, "run", "--network", "").stdout == b"bridge\nhost\nnone\n"


@pytest.mark.parametrize(
    "line,expected", [("isopod ru", "run"), ("isopod network cr", "create"), ("isopod run --det", "--detach"), ("isopod run a:", ":1")]
)
def test_bash_takes_its_script(folder: str, line: str, expected: str) -> None:
    program = f"{folder}/isopod"
    with open(program, "w", encoding="ascii") as file:
        answer = f'#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, "{SOURCE}")\nfrom isopod.cli.main import main\n'
        file.write(answer + "sys.exit(main(sys.argv[1:]))\n")
    subprocess.run(["/bin/chmod", "755", program], check=True)
    words = line.replace(":", " : ").split() if ":" in line else line.split()
    script = (
        SCRIPTS["bash"]
        + f"""
COMP_LINE='{line}' COMP_POINT={len(line)} COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1}
_isopod
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    )
    with ScriptedNode(folder, answering("image.list", {"images": [{"names": ["a:1"]}]})) as node:
        env = environment({"PATH": f"{folder}:/usr/bin:/bin", "ISOPOD_SOCKET": node.path})
        ended = subprocess.run(["bash", "-c", script], env=env, capture_output=True, timeout=30, check=False)
    offered = ended.stdout.decode().splitlines()
    assert ended.stderr == b""
    assert offered == [expected.removeprefix(":")] if ":" in line else offered == [expected]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_printed_and_parse(folder: str, shell: str) -> None:
    ended = isopod("completion", shell)
    assert ended.stdout.decode() == SCRIPTS[shell]
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = f"{folder}/script"
    with open(path, "wb") as file:
        file.write(ended.stdout)
    subprocess.run([shell, "-n", path], check=True, timeout=30)
