"""`isopod node` and `isopod cluster` by hand: three real processes on one machine, as the README shows them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.cli.scripted_node import SOURCE

PROGRAM: Final = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from isopod.cli.main import main; "
    "sys.exit(main(sys.argv[2:], site_packages=sys.argv[1]))"
)
SECRET: Final = "a-secret-of-these-tests-0123456789"
WAIT_S: Final = 40.0


def command_line(*words: str) -> list[str]:
    """Return the program as it is installed: an isolated interpreter that is told where the packages are."""
    import msgspec

    return [sys.executable, "-I", "-S", "-c", PROGRAM, SOURCE, str(Path(msgspec.__file__).parent.parent), *words]


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return an environment in which no setting of this machine counts."""
    return {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **(extra or {})}


def isopod(*words: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[bytes]":
    """Run a command line to its end."""
    return subprocess.run(
        command_line(*words), capture_output=True, timeout=60, env=environment(env), check=False, stdin=subprocess.DEVNULL
    )


class Machine:
    """Nodes of one cluster on this machine, each a process with a folder of its own."""

    def __init__(self, folder: Path, first_port: int) -> None:
        self.folder = folder
        self.first_port = first_port
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def address(self, number: int) -> str:
        return f"127.0.0.1:{self.first_port + number}"

    def start(self, number: int, *words: str, token: str = SECRET) -> None:
        """Start a node; it is the same line for each of them but for its number."""
        argv = command_line("node", "--role", "control", "--id", str(number), "--bind", self.address(number))
        argv += ["--data-dir", str(self.folder / f"n{number}"), *words]
        with open(self.folder / f"n{number}.log", "ab") as log:
            env = environment({"ISOPOD_CLUSTER_TOKEN": token})
            self.processes[number] = subprocess.Popen(argv, stderr=log, stdin=subprocess.DEVNULL, env=env)

    def ask(self, number: int, *words: str) -> subprocess.CompletedProcess[bytes]:
        return isopod("--socket", str(self.folder / f"n{number}" / "isopod.sock"), "cluster", *words)

    def status(self, number: int) -> dict[str, Any]:
        """Return a node's status, {} if it does not answer."""
        ended = self.ask(number, "status", "--format", "json")
        found: dict[str, Any] = json.loads(ended.stdout) if ended.returncode == 0 else {}
        return found

    def until(self, condition: Callable[[], bool], what: str) -> None:
        ends_at = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > ends_at:
                logs = "".join((self.folder / f"n{number}.log").read_text()[-2000:] for number in self.processes)
                pytest.fail(f"not in {WAIT_S:g} s: {what}\n{logs}")
            time.sleep(0.1)

    def agree(self, numbers: list[int]) -> bool:
        """Whether these nodes all vote, and say the same of leader, term and voters."""
        found = [self.status(number) for number in numbers]
        if not all(each.get("voters") == numbers and each["leader_id"] in numbers for each in found):
            return False
        return len({(each["cluster_id"], each["leader_id"], each["term"]) for each in found}) == 1

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def machine(tmp_path: Path, worker_port: int) -> Iterator[Machine]:
    """An empty machine."""
    made = Machine(tmp_path, worker_port)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def worker_port() -> int:
    """Ports that no other test uses."""
    return 17_500 + 20 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.row("B3")
@pytest.mark.row("B5")
@pytest.mark.row("B12")
@pytest.mark.row("B29")
@pytest.mark.row("S18")
def test_three_nodes_by_one_line_survive_a_kill_and_let_one_go(machine: Machine) -> None:
    peers = [word for number in (1, 2, 3) for word in ("--peer", f"{number}:{machine.address(number)}")]
    for number in (1, 2, 3):
        machine.start(number, *peers)
    machine.until(lambda: machine.agree([1, 2, 3]), "three nodes agree")
    table = machine.ask(1, "status").stdout.decode()
    leader = machine.status(1)["leader_id"]
    assert f"leader id: {leader} at {machine.address(leader)}" in table
    assert "term: " in table
    assert table.count("follower") == 2

    token = machine.ask(2, "token", "create", "--uses", "2").stdout.decode().strip()
    assert token.startswith("isopod-join-")
    machine.processes[leader].kill()
    machine.processes[leader].wait()
    left = [number for number in (1, 2, 3) if number != leader]
    machine.until(lambda: machine.status(left[0]).get("leader_id") in left, "another leads")
    listed = json.loads(machine.ask(left[0], "token", "list", "--format", "json").stdout)
    assert {row["uses_left"] for row in listed} >= {2}, "what was acknowledged is there"
    assert machine.ask(left[1], "token", "create").returncode == 0, "and writing goes on"

    machine.start(leader, *peers)
    machine.until(lambda: machine.agree([1, 2, 3]), "it is back")
    machine.until(lambda: machine.ask(left[0], "check").returncode == 0, "all replicas hold the same state")

    machine.start(4, "--join", machine.address(left[0]), token=token)
    machine.until(lambda: machine.agree([1, 2, 3, 4]), "a fourth has joined")
    ended = machine.ask(left[0], "leave", "4", "--timeout", "30")
    assert ended.stdout.decode() == "Node 4 successfully removed from cluster\n"
    machine.until(lambda: machine.processes[4].poll() is not None, "the removed node ends")
    assert machine.processes[4].returncode == 1
    machine.until(lambda: machine.agree([1, 2, 3]), "three are left")

    for number in (1, 2, 3):
        machine.processes[number].send_signal(signal.SIGTERM)
    assert [machine.processes[number].wait(timeout=20) for number in (1, 2, 3)] == [0, 0, 0]
    machine.start(4, "--join", machine.address(1), token=token)
    assert machine.processes[4].wait(timeout=20) == 1
    assert "no member any more" in (machine.folder / "n4.log").read_text()


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.row("S18")
def test_a_node_on_an_old_copy_of_its_disk_ends_with_what_to_do(machine: Machine) -> None:
    peers = [word for number in (1, 2, 3) for word in ("--peer", f"{number}:{machine.address(number)}")]
    for number in (1, 2, 3):
        machine.start(number, *peers)
    machine.until(lambda: machine.agree([1, 2, 3]), "three nodes agree")
    leader = machine.status(1)["leader_id"]
    victim = next(number for number in (3, 2) if number != leader)
    raft = machine.folder / f"n{victim}" / "raft"

    def kill() -> None:
        machine.processes[victim].kill()
        machine.processes[victim].wait()

    kill()
    shutil.copytree(raft, machine.folder / "old")
    machine.start(victim, *peers)
    machine.until(lambda: machine.agree([1, 2, 3]), "it is back")
    for _ in range(5):
        assert machine.ask(leader, "token", "create").returncode == 0
    applied = machine.status(leader)["applied"]
    machine.until(lambda: machine.status(victim).get("applied", 0) >= applied, "it has all of it")
    kill()
    shutil.rmtree(raft)
    shutil.copytree(machine.folder / "old", raft)
    for match in ("counts on entries that are not in it", "its disk lost part of the log"):
        machine.start(victim, *peers)
        assert machine.processes[victim].wait(timeout=30) != 0
        said = (machine.folder / f"n{victim}.log").read_text()
        assert f"error: {'record' if 'counts' in match else 'node'}" in said
        assert match in said
        assert f"isopod cluster leave {victim}" in said
        assert "Traceback" not in said
    assert machine.ask(leader, "leave", str(victim), "--timeout", "30").returncode == 0


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.row("B2")
@pytest.mark.row("B32")
@pytest.mark.row("B33")
def test_one_node_and_what_the_command_line_says_of_it(machine: Machine) -> None:
    machine.start(1)
    machine.until(lambda: machine.status(1).get("state") == "leader", "it leads")
    said = isopod("--socket", str(machine.folder / "n1" / "isopod.sock"), "info").stdout.decode()
    assert "runtime: none (--role control: this node runs no containers)" in said
    assert "  state: leader" in said
    for words, exit_code, message in [
        (["leave", "1"], 1, "error: Cannot remove self from cluster. Use shutdown instead."),
        (["leave", "7"], 1, "Node 7 not found in cluster configuration"),
        (["leave", "0"], 2, "must be non-zero"),
        (["leave", "x"], 2, "want a number"),
        (["leave"], 2, "needs NODE"),
        (["transfer", "9"], 1, "no such voter: 9"),
        (["join", "127.0.0.1:1", "--token", SECRET], 1, "a member of cluster"),
        (["token", "make"], 2, "choose one of: create, list, revoke"),
        (["token", "revoke"], 2, "revoke needs one"),
        (["token", "revoke", "aaaaaaaaaaaa"], 1, "no such join token"),
        (["token", "create", "--uses", "0"], 2, "want 1 to 10000"),
        (["status", "--timeout", "0"], 2, "--timeout"),
        (["status", "--addr", "10.9.9.9:1"], 1, "no such node: 10.9.9.9:1"),
        (["restore", str(machine.folder / "n1.log")], 5, "it does not begin as one"),
        (["recover", str(machine.folder / "n1")], 4, "owns"),
        (["recover", str(machine.folder / "nowhere")], 1, "no such replica in"),
    ]:
        ended = machine.ask(1, *words)
        assert (ended.returncode, message in ended.stderr.decode()) == (exit_code, True), (words, ended.stderr)
        assert "Traceback" not in ended.stderr.decode()
    error = json.loads(machine.ask(1, "leave", "7", "--format", "json").stderr)["error"]
    assert (error["code"], error["service"], error["node"]) == ("not_found", "cluster", f"unix:{machine.folder}/n1/isopod.sock")
    assert error["timestamp"].endswith("Z")
    assert error["hint"]

    machine.start(2, "--join-cluster")
    machine.until(lambda: "it waits to be told" in machine.status(2).get("why", ""), "it waits")
    token = machine.ask(1, "token", "create").stdout.decode().strip()
    ended = machine.ask(2, "join", machine.address(1), "--token", token, "--timeout", "30")
    assert ended.stdout.decode() == "Node 2 successfully joined cluster\n", ended.stderr
    machine.until(lambda: machine.status(1).get("voters") == [1, 2], "it votes")
    assert json.loads(machine.ask(1, "status", "--addr", machine.address(2), "--format", "json").stdout)["node_id"] == 2

    backup = machine.folder / "x.backup"
    assert machine.ask(2, "backup", str(backup)).returncode == 0
    assert backup.read_bytes().startswith(b"isopod cluster backup 1\n")
    assert machine.ask(1, "restore", str(backup)).stdout.decode().startswith("0 keys, as of cluster")

    os.kill(machine.processes[1].pid, signal.SIGSTOP)
    try:
        machine.until(lambda: machine.status(2).get("leader_id") == 0, "a voter of two is alone")
        ended = machine.ask(2, "token", "create", "--timeout", "1")
        assert ended.returncode != 0
        assert ended.stderr.decode().startswith("error: ")
    finally:
        os.kill(machine.processes[1].pid, signal.SIGCONT)


@pytest.mark.host
@pytest.mark.parametrize(
    "words,message",
    [
        (["--bind", "nowhere"], "bind address 'nowhere'"),
        (["--bind", "127.0.0.1:0", "--id", "0"], "--id '0'"),
        (["--bind", "127.0.0.1:0", "--voters-max", "2"], "--voters-max '2'"),
        (["--bind", "127.0.0.1:0", "--peer", "x"], "peer 'x'"),
        (["--bind", "127.0.0.1:0", "--join", "127.0.0.1:1", "--token", "short"], "it is not 24 to 512"),
        (["--bind", "127.0.0.1:0", "--init-primary", "--init-secondary"], "a node founds or joins"),
        (["--bind", "0.0.0.0:0"], "--advertise"),
    ],
)
def test_flags_that_make_no_sense(tmp_path: Path, words: list[str], message: str) -> None:
    ended = isopod("node", "--role", "control", "--data-dir", str(tmp_path / "n"), *words, env={"ISOPOD_CLUSTER_TOKEN": ""})
    assert ended.returncode in (1, 2)
    lines = [line for line in ended.stderr.decode().splitlines() if not line.startswith("{")]
    assert message in " ".join(lines), ended.stderr
    assert "Traceback" not in ended.stderr.decode()


@pytest.mark.host
@pytest.mark.row("B14")
def test_a_taken_address_is_named(machine: Machine) -> None:
    machine.start(1)
    machine.until(lambda: machine.status(1).get("state") == "leader", "it leads")
    machine.start(2, "--bind", machine.address(1))
    assert machine.processes[2].wait(timeout=30) == 4
    assert f"cannot listen on {machine.address(1)}: Address already in use" in (machine.folder / "n2.log").read_text()


def test_without_a_node_the_command_says_so(tmp_path: Path) -> None:
    ended = isopod("--socket", str(tmp_path / "no.sock"), "cluster", "status")
    assert ended.returncode == 3
    assert b"cannot reach the isopod node" in ended.stderr
