"""What everyday commands import: a bare interpreter and little else. Names are compared, not times, so that the test cannot flake."""

import subprocess
import sys

import pytest

from tests.cli.scripted_node import SOURCE, Peer, ScriptedNode, environment

BANNED = {
    *(
        "argparse",
        "ast",
        "asyncio",
        "collections",
        "contextlib",
        "dataclasses",
        "datetime",
        "difflib",
        "enum",
        "functools",
        "inspect",
        "json",
    ),
    *(
        "logging",
        "msgspec",
        "operator",
        "pathlib",
        "re",
        "shutil",
        "signal",
        "site",
        "socket",
        "subprocess",
        "threading",
        "tomllib",
        "traceback",
    ),
    *("typing", "uvloop", "warnings", "weakref"),
}
ALSO_NOT_ON_SUCCESS = {"isopod.world.errors", "isopod.cli.manual", "isopod.cli.completion", "os"}
REPORT = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from isopod.cli.main import main; code = main(sys.argv[1:]); "
    "sys.stderr.write('\\n'.join(sys.modules)); sys.exit(code)"
)


def script(peer: Peer) -> None:
    peer.greet()
    while True:
        try:
            frame = peer.next()
        except EOFError:
            return
        if frame[0] == 0:
            peer.reply(frame[1], {"text": "", "exit_code": 0, "id": "c", "name": "web"})


@pytest.mark.parametrize(
    "line",
    [
        "ps",
        "ps -a --format json",
        "run img true",
        "run -d img",
        "exec web true",
        "logs web",
        "start web",
        "stop web",
        "rm web",
        "inspect web",
    ],
)
def test_everyday_commands_import_little(folder: str, line: str) -> None:
    with ScriptedNode(folder, script) as node:
        argv = [sys.executable, "-I", "-S", "-c", REPORT, SOURCE, "-H", node.path, *line.split()]
        ended = subprocess.run(argv, capture_output=True, env=environment(), timeout=30, check=False)
    imported = set(ended.stderr.decode().splitlines())
    assert ended.returncode == 0
    assert "isopod.cli.lean" in imported
    assert imported & BANNED == set()
    assert len([name for name in imported if name.startswith("isopod")]) <= 22
    assert imported & ALSO_NOT_ON_SUCCESS == set()
