"""`isopod kv ...` against a real store behind a node's socket."""

import asyncio
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from isopod.world.host.world import make_host_world
from isopod.world.network import UnixAddress
from tests.cli.scripted_node import ScriptedNode, command_line, environment, isopod, refusing
from tests.cluster.store.rig import FakeLog


class Node(NamedTuple):
    """A store served on a socket, in a thread with a loop of its own."""

    path: str
    loop: asyncio.AbstractEventLoop
    log: FakeLog


@pytest.fixture
def node(folder: str) -> Iterator[Node]:
    path = os.path.join(folder, "node.sock")
    found: list[Node] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        world = make_host_world()
        async with FakeLog(world, 1) as log:
            await log.serve(1, UnixAddress(path))
            found.append(Node(path, asyncio.get_running_loop(), log))
            ready.set()
            await stop.wait()
        world.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(10)
    yield found[0]
    found[0].loop.call_soon_threadsafe(stop.set)
    thread.join(10)


def test_put_get_list_and_delete(node: Node) -> None:
    def kv(*words: str, stdin: bytes = b"") -> tuple[int, str, str]:
        done = isopod("-H", node.path, "kv", *words, stdin=stdin)
        return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode()

    assert kv("get", "a") == (1, "", "error: no such key: a\n")
    assert kv("put", "a", "hello") == (0, "1\n", "")
    assert kv("put", "--if-revision", "0", "a", "again")[0] == 1
    assert kv("put", "--if-revision", "1", "a", "-", stdin=b"\xff\x00") == (0, "2\n", "")
    assert kv("get", "a") == (0, "\xff\x00\n", "")
    facts = json.loads(kv("get", "--format", "json", "a")[1])
    assert (facts["value_base64"], facts["mod_revision"], facts["version"]) == ("/wA=", 2, 2)
    assert kv("put", "a/b", "x\ny")[0] == 0
    assert kv("list", "-q") == (0, "a\na/b\n", "")
    assert kv("list", "a/")[1].splitlines() == ["  REVISION  VERSION    BYTES  KEY", "         3        1        3  a/b"]
    assert kv("list", "nothing", "--format", "json") == (0, "", "")
    assert kv("delete", "nothing") == (1, "0\n", "")
    assert kv("delete", "--prefix", "a") == (0, "2\n", "")
    assert kv("get", "--consistency", "stale", "a")[0] == 1


@pytest.mark.parametrize(
    "words,says",
    [
        (("put", "a", "b", "--if-revision", "x"), "want a revision"),
        (("delete", "--prefix", "--if-revision", "1", "a"), "a prefix has no revision"),
        (("get", "a", "--timeout", "0"), "more than 0"),
        (("get", ""), "key"),
        (("put", "k" * 1025, "v"), "key"),
        (("get", "a", "--consistency", "eventual"), "eventual"),
        (("watch", "--from", "-1"), "want a revision"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(node: Node, words: tuple[str, ...], says: str) -> None:
    done = isopod("-H", node.path, "kv", *words)
    told = done.stderr.decode()
    assert done.returncode == 2
    assert told.startswith("error: ")
    assert says in told
    assert "Traceback" not in told


def test_a_transaction_does_all_of_one_branch(node: Node) -> None:
    def txn(*words: str, stdin: bytes = b"") -> tuple[int, str, str]:
        done = isopod("-H", node.path, "kv", "txn", *words, stdin=stdin)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    lock = ("--if", "version lock = 0", "--then", "put lock me and you", "--then", "put n 1", "--else", "get lock", "--else", "get x")
    assert txn(*lock) == (0, "then 1\nput lock\nput n\n", "")
    assert txn(*lock) == (1, "else 1\nlock me and you\nget x: nothing\n", "")
    assert txn("--if", "value lock = me and you", "--if", "mod n < 2", "--then", "delete n", "--then", "delete-prefix l") == (
        0,
        "then 2\ndelete n: 1\ndelete-prefix l: 1\n",
        "",
    )
    asked = {
        "if": [{"what": "version", "key": "a b", "is": "=", "than": 0}],
        "then": [{"do": "put", "key": "a b", "value_base64": "/wA="}, {"do": "put", "key": "c", "value": ""}, {"do": "list", "key": ""}],
    }
    code, told, err = txn("--format", "json", "-", stdin=json.dumps(asked).encode())
    assert (code, err) == (0, "")
    facts = json.loads(told)
    assert (facts["succeeded"], facts["revision"]) == (True, 3)
    assert [row["do"] for row in facts["results"]] == ["put", "put", "list"]
    assert [entry["key"] for entry in facts["results"][2]["entries"]] == ["a b", "c"]
    assert facts["results"][2]["entries"][0]["value_base64"] == "/wA="
    assert txn("-", stdin=json.dumps(asked).encode())[:2] == (1, "else 3\n")


@pytest.mark.parametrize(
    "words,stdin,says",
    [
        ((), b"", "it does nothing"),
        (("--if", "version a = 0"), b"", "it does nothing"),
        (("--if", "age a = 0", "--then", "get a"), b"", "want WHAT KEY RELATION VALUE"),
        (("--if", "version a >= 0", "--then", "get a"), b"", "want WHAT KEY RELATION VALUE"),
        (("--if", "version a = many", "--then", "get a"), b"", "want a whole number"),
        (("--then", "steal a"), b"", "want 'put KEY VALUE'"),
        (("--then", "delete a b"), b"", "want 'put KEY VALUE'"),
        (("--then", "get " + "k" * 1025), b"", "want 1 to 1024"),
        (("--then", "get a", "-"), b"{}", "in the options already"),
        (("-",), b"{", "not JSON"),
        (("-",), b"[" * 100_000, "not JSON"),
        (("-",), b"{}", "it does nothing"),
        (("-",), b'{"then": 1}', "want an object of lists"),
        (("-",), b'{"iff": [], "then": [{"do": "get", "key": "a"}]}', "want an object of lists"),
        (("-",), b'{"then": [{"do": "get", "key": 1}]}', "want an object of do"),
        (("-",), b'{"then": [{"do": "get", "key": "a", "values": 1}]}', "want an object of do"),
        (("-",), b'{"then": [{"do": "get", "key": "a", "value": "1"}]}', "only put has a value"),
        (("-",), b'{"then": [{"do": "put", "key": "a", "value_base64": "?"}]}', "not base64"),
        (("-",), b'{"if": [{"what": "version", "key": "a", "is": "=", "than": true}], "then": [{"do": "get", "key": "a"}]}', "what is one"),
        (("-",), b"x" * ((1 << 20) + 1), "more than 1048576 bytes"),
        (("/nowhere",), b"", "no such file"),
    ],
)
def test_a_transaction_that_makes_no_sense_is_said_in_a_line(words: tuple[str, ...], stdin: bytes, says: str) -> None:
    done = isopod("-H", "/nowhere/socket", "kv", "txn", *words, stdin=stdin)
    told = done.stderr.decode()
    assert done.returncode == (1 if words == ("/nowhere",) else 2)
    assert told.startswith("error: ")
    assert says in told
    assert len(told.splitlines()) <= 2


def test_what_was_not_answered_in_time_may_have_been_done_and_says_so(node: Node) -> None:
    node.log.elect(0)
    for words in (("put", "a", "b"), ("delete", "a"), ("txn", "--then", "put a b")):
        done = isopod("-H", node.path, "kv", *words, "--timeout", "300ms")
        assert (done.returncode, done.stdout) == (3, b"")
        assert "it may have been done all the same" in done.stderr.decode()


def test_a_read_without_a_leader_says_what_can_be_asked(folder: str) -> None:
    with ScriptedNode(folder, refusing("kv.read", "deadline_exceeded", "kv.read took longer than 5 s", exit_code=3)) as node:
        done = isopod("-H", node.path, "kv", "get", "a")
    assert done.returncode == 3
    assert "--consistency stale" in done.stderr.decode()


def test_many_pages_are_one_list(node: Node) -> None:
    async def fill() -> None:
        replica = node.log.replicas[1]
        await asyncio.gather(*(replica.put(f"k{number:04d}", b"v" * 300) for number in range(2500)))

    asyncio.run_coroutine_threadsafe(fill(), node.loop).result(20)
    done = isopod("-H", node.path, "kv", "list", "-q", "k")
    assert done.stdout.decode().splitlines() == [f"k{number:04d}" for number in range(2500)]


def test_watch_prints_changes_until_it_is_interrupted(node: Node) -> None:
    replica = node.log.replicas[1]

    async def put(key: str, value: bytes) -> None:
        await replica.put(key, value)

    asyncio.run_coroutine_threadsafe(put("a/1", b"one"), node.loop).result(10)
    process = subprocess.Popen(
        command_line("-H", node.path, "kv", "watch", "--from", "1", "a/"), stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "1 put a/1 one\n"
        asyncio.run_coroutine_threadsafe(put("b", b""), node.loop).result(10)
        asyncio.run_coroutine_threadsafe(put("a/2", b"t\nw\x1bo"), node.loop).result(10)
        assert process.stdout.readline() == "3 put a/2 t w o\n"
        asyncio.run_coroutine_threadsafe(replica.delete("a/1"), node.loop).result(10)
        assert process.stdout.readline() == "4 delete a/1\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.communicate()
