"""What clients do over the shim's socket: start, attach, exec, archives, signals, the console, and how much they may be sent."""

import contextlib
import os
import signal
import struct
import time

import pytest

from isopod.wire.agent import PAYLOAD_BYTES_MAX, WINDOW_BYTES, Kind, encode_json
from tests.shim.bench import Bench, Client, texts, wait_until

pytestmark = pytest.mark.host


@pytest.mark.row("V3")
def test_a_command_runs_attached_from_before_its_start(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client, bench.connect() as other:
        first, second = client.open("attach", stdin=True), other.open("attach", stdin=False)
        assert client.response(first) == other.response(second) == {"ok": {}}
        client.send(Kind.STDIN, first, b"typed early\n")
        client.begin("start", "cat")
        assert client.call("status")["main"] == "running"
        assert client.read_bytes(first, b"\n") == b"typed early\n"
        client.send(Kind.RESIZE, first, struct.pack("<HH", 40, 100))
        assert client.read_bytes(first, b"columns\n") == b"40 rows, 100 columns\n"
        client.send(Kind.STDIN_END, first)
        exit_ = {"code": 0, "signal": None, "out_of_memory": False}
        assert client.read_to_end(first) == (b"", b"", exit_)
        assert other.read_to_end(second) == (b"typed early\n40 rows, 100 columns\n", b"", exit_)
    assert bench.end() == {"code": 0, "why": "the command ended with 0", "kind": "command", "out_of_memory": False, "exit_file": 0}
    assert texts(bench.log())["stdout"] == b"typed early\n40 rows, 100 columns\n"


def test_the_main_command_starts_once_and_a_missing_one_is_told(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        assert client.refusal("start", argv=["missing"]) == ("not_found", "no such command")
        assert client.call("status")["main"] == "none"
        client.begin("start", "wait")
        assert client.refusal("start", argv=["wait"]) == ("busy", "the main command was started already")


def test_commands_archives_and_files_pass_through_with_their_streams(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client, bench.connect() as other:
        streams = [(one, one.open("exec", argv=["echo", f"{index}"])) for index, one in enumerate((client, other, client))]
        for index, (one, stream) in enumerate(streams):
            assert one.response(stream)["ok"]["pid"] > 0
            assert one.read_to_end(stream)[0] == b"%d" % index
        failing = client.begin("exec", "error", "oh")
        assert client.read_to_end(failing)[1] == b"oh"
        archive = client.open("archive", path="/x")
        assert client.response(archive)["ok"]["n_bytes"] == 10
        assert client.read_to_end(archive) == (b"0123456789", b"", None)
        extract = client.open("extract", path="/x")
        for _ in range(10):
            client.send(Kind.DATA, extract, bytes(PAYLOAD_BYTES_MAX))
            granted = client.next(extract)
            assert granted.number() == PAYLOAD_BYTES_MAX
        client.send(Kind.DATA_END, extract)
        assert client.response(extract) == {"ok": {"n_bytes": 10 * PAYLOAD_BYTES_MAX}}
        assert client.refusal("dance") == ("unsupported", "what is dance?")


def test_signals_reach_the_main_command_and_others(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        assert client.refusal("signal", signal=15) == ("failed", "the main command does not run")
        other = client.begin("exec", "wait")
        client.send(Kind.SIGNAL, other, b"\x0a")
        exit_ = client.read_to_end(other)[2]
        assert exit_ is not None
        assert exit_["code"] == 138
        client.begin("start", "wait")
        assert client.refusal("signal", signal=0)[0] == "invalid"
        assert client.call("signal", signal=15) == {}
    end = bench.end()
    assert (end["code"], end["kind"], end["why"]) == (143, "command", "the command was killed by signal 15")


def test_who_comes_late_hears_the_end(bench: Bench) -> None:
    bench.config["stop_timeout_s"] = 2
    bench.use_fake().start()
    with bench.ready() as client:
        client.begin("start", "misbehave", "stubborn")  # it has ended with 5, the guest refuses to go
        wait_until(lambda: client.call("status")["main"] == "exited", "the command's end")
        assert client.call("status")["exit"]["code"] == 5
        late = client.open("attach", stdin=False)
        client.response(late)
        assert client.read_to_end(late)[2] == {"code": 5, "signal": None, "out_of_memory": False}
    assert bench.end()["code"] == 5


def test_all_output_arrives_however_much(bench: Bench) -> None:
    bench.use_fake().start()
    n_bytes = 20 << 20
    with bench.ready() as client:
        stream = client.open("attach", stdin=False)
        client.response(stream)
        client.begin("start", "flood", str(n_bytes))
        stdout, _, exit_ = client.read_to_end(stream)
    assert (len(stdout), exit_) == (n_bytes, {"code": 0, "signal": None, "out_of_memory": False})
    bench.end()


def test_a_client_that_does_not_read_is_dropped_and_delays_nobody(bench: Bench) -> None:
    """One never grants anything, one does not even read its socket; the log and a third get all."""
    bench.config["log_bytes_max"] = 1 << 30
    bench.use_fake().start()
    n_bytes = 8 << 20
    with bench.ready() as client, bench.connect() as idle, bench.connect() as deaf:
        good, stuck, unread = (one.open("attach", stdin=False) for one in (client, idle, deaf))
        client.response(good)
        idle.response(stuck)
        deaf.grant(unread, 1 << 31)
        client.begin("start", "flood", str(n_bytes))
        assert len(client.read_to_end(good)[0]) == n_bytes
        stdout, _, exit_ = idle.read_to_end(stuck, grants=False)
        assert (len(stdout), exit_) == (WINDOW_BYTES, None)
    bench.end()
    assert len(texts(bench.log())["stdout"]) == n_bytes


def test_output_of_an_exec_is_never_more_than_was_granted(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        stream = client.begin("exec", "flood", str(1 << 20))
        got = b""
        while len(got) < WINDOW_BYTES:
            got += client.next(stream).payload
        assert len(got) == WINDOW_BYTES
        client.call("status")  # whatever was sent before has arrived with its answer: nothing was
        client.socket.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            pytest.fail(f"more than was granted: {client.next(stream).kind}")
        client.socket.settimeout(60)
        client.grant(stream, 100)
        assert len(client.next(stream).payload) == 100
        client.grant(stream, 1 << 20)
        assert len(client.read_to_end(stream)[0]) == (1 << 20) - WINDOW_BYTES - 100


def test_a_client_that_exceeds_its_credit_loses_its_connection_only(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client, bench.connect() as greedy, bench.connect() as stranger, bench.connect() as mad:
        stream = greedy.begin("exec", "deaf")
        for _ in range(WINDOW_BYTES // PAYLOAD_BYTES_MAX + 1):
            greedy.send(Kind.STDIN, stream, bytes(PAYLOAD_BYTES_MAX))
        assert greedy.is_dropped()
        stranger.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.is_dropped()
        mad.socket.sendall(encode_json(Kind.RESPONSE, 3, {}))
        assert mad.is_dropped()
        assert client.call("sync") == {}


def test_frames_of_streams_that_have_ended_are_late_not_wrong(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        stream = client.begin("exec", "exit", "0")
        client.read_to_end(stream)
        client.send(Kind.STDIN, stream, b"x")
        client.send(Kind.CLOSE, stream)
        client.grant(stream, 5)
        assert client.call("sync") == {}


def test_who_leaves_ends_no_command_and_frees_its_streams(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        for _ in range(40):
            with bench.connect() as passing:
                for _ in range(10):
                    passing.open("exec", argv=["wait"])
                passing.call("status")
        stream = client.begin("exec", "echo", "still here")
        assert client.read_to_end(stream)[0] == b"still here"


def test_a_guest_that_takes_nothing_for_a_while_loses_nothing(bench: Bench) -> None:
    """It is paused while a client sends it a file; the same client lets it go on."""
    bench.use_fake().start()
    with bench.ready() as client:
        extract = client.open("extract", path="/x")
        client.call("sync")
        client.call("hold", paused=True)
        os.kill(bench.pid, signal.SIGSTOP)
        for _ in range(WINDOW_BYTES // PAYLOAD_BYTES_MAX):
            client.send(Kind.DATA, extract, bytes(PAYLOAD_BYTES_MAX))
        assert client.call("status")["paused"] is True
        os.kill(bench.pid, signal.SIGCONT)
        client.call("hold", paused=False)
        client.send(Kind.DATA_END, extract)
        while (frame := client.next(extract)).kind is Kind.CREDIT:
            continue
        assert frame.json() == {"ok": {"n_bytes": WINDOW_BYTES}}


def test_two_hundred_clients(bench: Bench) -> None:
    """All attached at once, all hear all; the 257th is turned away."""
    bench.use_fake().start()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(bench.ready())
        clients = [stack.enter_context(bench.connect()) for _ in range(200)]
        streams = [(client, client.open("attach", stdin=False)) for client in clients]
        for client, stream in streams:
            client.response(stream)
        more = [stack.enter_context(bench.connect()) for _ in range(55)]
        for one in more:
            one.call("status")
        assert stack.enter_context(bench.connect()).is_dropped()
        began = time.monotonic()
        first.begin("start", "flood", "100000")
        for client, stream in streams:
            assert len(client.read_to_end(stream)[0]) == 100000
        print(f"100 kB to each of 200 clients: {time.monotonic() - began:.3f} s")  # noqa: T201 - to be seen
    bench.end()


@pytest.mark.row("V3")
def test_the_console_is_heard_and_written(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        stream = client.open("console", tail=0, write=True)
        client.response(stream)
        client.send(Kind.STDIN, stream, b"root\n")
        frames = [client.next(stream) for _ in range(2)]
        assert {frame.kind for frame in frames} == {Kind.CREDIT, Kind.STDOUT}
        assert [frame.payload for frame in frames if frame.kind is Kind.STDOUT] == [b"you typed root\n"]
        reader = client.open("console", tail=6, write=False)
        client.response(reader)
        client.send(Kind.STDIN, reader, b"not heard\n")
        assert client.read_bytes(reader, b"\n") == b" root\n"
    assert (bench.folder / "console.log").read_bytes() == b"you typed root\n"


def test_a_console_that_nobody_reads_does_not_stop_the_guest(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client, bench.connect() as slow:
        stream = slow.open("console", tail=0, write=False)
        slow.response(stream)
        client.begin("start", "misbehave", "console")
        assert slow.read_to_end(stream, grants=False)[2] is None
    assert bench.end()["kind"] == "command"
    kept = b"".join((bench.folder / name).read_bytes() for name in ("console.log.1", "console.log"))
    assert len(kept) == 20000 * 64
    assert kept.endswith(b"%063d\n" % 19999)


def test_events_reach_who_watches_and_a_guest_cannot_make_up_ours(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.connect() as client:
        watch = client.open("watch")
        assert client.response(watch) == {"ok": {}}
        client.call("ready")
        client.begin("exec", "misbehave", "spoof")
        events = [client.next(watch).json()]
        if events[0] == {"event": "agent"}:
            events.append(client.next(watch).json())
        assert events[-1] == {"event": "oom", "pid": 3, "command": "hog"}


def test_a_flood_of_events_drops_who_does_not_read_them(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client, bench.connect() as slow:
        watch = slow.open("watch")
        slow.response(watch)
        stream = client.begin("exec", "misbehave", "events")
        client.read_to_end(stream)
        kinds = [slow.next(watch).kind]
        while kinds[-1] is not Kind.CLOSE:
            kinds.append(slow.next(watch).kind)
        assert len(kinds) < 2000
        assert client.call("sync") == {}


def test_a_machine_is_reached_by_vsock_once_its_guest_listens(bench: Bench) -> None:
    path = f"{bench.folder}/v.sock"
    bench.use_fake(agent="none")
    bench.config["argv"] += ["--vsock", path]
    bench.config["agent"] = {"vsock": path, "port": 1024}
    bench.start()
    with bench.ready() as client:
        client.begin("start", "exit", "6")
    assert bench.end()["code"] == 6


def test_a_vsock_that_was_lost_is_dialled_again_and_the_command_runs_on(bench: Bench) -> None:
    path = f"{bench.folder}/v.sock"
    bench.use_fake(agent="none")
    bench.config["argv"] += ["--vsock", path]
    bench.config["agent"] = {"vsock": path, "port": 1024}
    bench.start()
    with bench.ready() as client:
        client.begin("start", "wait")
        watch = client.open("watch")
        client.response(watch)
        other = client.begin("exec", "wait")
        client.open("exec", argv=["misbehave", "redial"])
        assert client.next(other).kind is Kind.CLOSE
        assert client.next(watch).json() == {"event": "agent"}
        assert client.call("status")["main"] == "running"
        client.call("signal", signal=2)
    assert bench.end()["code"] == 130


def test_before_the_agent_answers_there_is_little_to_ask(bench: Bench) -> None:
    bench.use_fake("mute").start()
    with bench.connect() as client:
        assert client.refusal("start", argv=["x"])[0] == "busy"
        assert client.refusal("sync")[0] == "busy"
        status = client.call("status")
        assert (status["vmm_pid"], status["agent"], status["main"], status["exit"]) == (bench.pid, None, "none", None)
        ready = client.open("ready")
        client.call("stop", timeout_s=5)
        assert client.response(ready)["error"] == {"code": "failed", "message": "the machine has ended: it was stopped"}


def test_too_many_streams_are_refused(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        for _ in range(255):
            client.open("watch")
        client.call("status")
        client.open("watch")
        assert client.refusal("watch") == ("busy", "more than 256 streams")


def test_requests_that_make_no_sense_end_the_connection(bench: Bench) -> None:
    bench.use_fake().start()
    for payload in (b"", b"[]", b"{", b'{"op": 5}', b'{"op": "hold", "paused": 3}', b"[" * 60000):
        with Client(bench.config["socket"]) as client:
            client.send(Kind.REQUEST, 1, payload)
            assert client.is_dropped(), payload[:20]
    with bench.ready() as client:
        assert client.call("hold", paused=True) == {}
