"""Every way in which a machine ends: end.json, the exit file, and what clients hear."""

import os
import signal

import pytest

from isopod.wire.agent import Kind
from tests.shim.bench import Bench, is_alive, kill

pytestmark = pytest.mark.host


def test_a_commands_code_is_the_machines(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        client.begin("start", "exit", "3")
        assert bench.end() == {"code": 3, "why": "the command ended with 3", "kind": "command", "out_of_memory": False, "exit_file": 3}
    assert not is_alive(bench.pid)
    assert not os.path.exists(bench.config["socket"])


@pytest.mark.row("V8")
def test_a_guest_that_does_not_go_is_killed_and_the_code_stays(bench: Bench) -> None:
    bench.config["stop_timeout_s"] = 0.3
    bench.use_fake().start()
    with bench.ready() as client:
        client.begin("start", "misbehave", "stubborn")
        end = bench.end()
    assert (end["code"], end["kind"]) == (5, "command")


@pytest.mark.parametrize("how", ["request", "signal"])
def test_stop_ends_a_machine_that_works(bench: Bench, how: str) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        attached = client.open("attach", stdin=False)
        client.response(attached)
        client.begin("start", "wait")
        if how == "request":
            assert client.call("stop", timeout_s=30) == {}
        else:
            os.kill(bench.shim_pid, signal.SIGTERM)
        assert client.read_to_end(attached)[2] == {"code": 137, "signal": None, "out_of_memory": False}
        end = bench.end()
    assert (end["code"], end["kind"], end["exit_file"]) == (137, "stopped", 137)


def test_stop_of_a_paused_machine_kills_it(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        client.call("hold", paused=True)
        assert client.call("status")["paused"] is True
        client.call("stop", timeout_s=60)
        end = bench.end()
    assert (end["code"], end["kind"]) == (137, "stopped")


def test_a_second_stop_may_be_more_hurried(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        client.begin("start", "misbehave", "stubborn")
        client.call("stop", timeout_s=0.1)
        assert bench.end()["code"] == 5


@pytest.mark.parametrize(
    ("how", "kind", "code", "why"),
    [
        ("poweroff", "poweroff", 255, "the machine powered off"),
        ("crash", "vmm_failed", 255, "the machine's process ended with 3: fake: an internal error"),
        ("garbage", "vmm_killed", 137, "the guest broke the protocol: a frame of impossible length"),
        ("stranger", "vmm_killed", 137, "the guest broke the protocol: a frame of a stream that nobody opened"),
        ("liar", "vmm_killed", 137, "the guest broke the protocol: an exit that makes no sense"),
        ("hangup", "vmm_killed", 137, "the guest broke the protocol: its channel was closed"),
    ],
)
def test_guests_that_misbehave(bench: Bench, how: str, kind: str, code: int, why: str) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        attached, other = client.open("attach", stdin=False), client.begin("exec", "wait")
        client.response(attached)
        client.open("start", argv=["misbehave", how])
        exit_ = client.read_to_end(attached)[2]
        assert exit_ is not None
        assert exit_["code"] == code
        assert client.next(other).kind is Kind.CLOSE
        end = bench.end()
    assert (end["kind"], end["exit_file"], end["why"]) == (kind, code, why)


def test_a_guest_may_not_be_greedy_on_other_streams_either(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        client.open("exec", argv=["misbehave", "greedy"])
        assert bench.end()["why"] == "the guest broke the protocol: more bytes than were granted"


@pytest.mark.row("V8")
def test_a_guest_that_falls_silent(bench: Bench) -> None:
    bench.config["silent_timeout_s"] = 3.0
    bench.use_fake().start()
    with bench.ready() as client:
        watch = client.open("watch")
        client.response(watch)
        client.begin("start", "misbehave", "silent")
        event = client.next(watch).json()
        assert (event["event"], event["silent_s"] >= 1.5) == ("silent", True)
        end = bench.end()
    assert (end["kind"], end["code"], end["why"]) == ("silent", 137, "the guest did not answer for 3.0 s")


def test_a_paused_guest_is_not_silent(bench: Bench) -> None:
    bench.config["silent_timeout_s"] = 3.0
    bench.use_fake().start()
    with bench.ready() as client:
        client.call("hold", paused=True)
        os.kill(bench.pid, signal.SIGSTOP)
        watch = client.open("watch")
        client.response(watch)
        client.socket.settimeout(3.5)
        with pytest.raises(TimeoutError):
            client.next(watch)
        client.socket.settimeout(60)
        assert client.call("status")["silent_s"] == 0
        os.kill(bench.pid, signal.SIGCONT)
        client.call("hold", paused=False)
        assert client.call("sync") == {}


@pytest.mark.row("V8")
def test_a_guest_that_never_says_hello(bench: Bench) -> None:
    bench.config["boot_timeout_s"] = 0.3
    bench.use_fake("mute").start()
    with bench.connect() as client:
        assert client.refusal("ready")[0] == "failed"
        end = bench.end()
    assert (end["kind"], end["code"], end["why"]) == ("boot_timeout", 137, "the guest's agent did not answer within 0.3 s")


@pytest.mark.row("V8")
def test_a_kernel_that_panics(bench: Bench) -> None:
    bench.use_fake("panic").start()
    end = bench.end()
    assert (end["kind"], end["code"], end["exit_file"]) == ("panic", None, 255)
    assert end["why"] == "the guest's kernel panicked: VFS: Unable to mount root fs"


@pytest.mark.row("V8")
def test_a_kernel_that_panics_and_hangs_is_not_waited_for(bench: Bench) -> None:
    """It is killed within seconds, though its guest has a minute to boot and another to be silent."""
    bench.use_fake().start()
    with bench.ready() as client:
        watch = client.open("watch")
        client.response(watch)
        client.begin("start", "misbehave", "panic")
        assert client.next(watch).json() == {"event": "panic", "message": "VFS: Unable to mount root fs"}
        end = bench.end()
    assert (end["kind"], end["code"]) == ("panic", 137)


def test_who_only_prints_a_panic_lives_on(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        watch = client.open("watch")
        client.response(watch)
        client.begin("start", "misbehave", "pretend")
        assert client.next(watch).json()["event"] == "panic"
        client.call("sync")
        client.call("stop", timeout_s=30)
        assert bench.end()["kind"] == "stopped"


def test_kill_of_the_machine(bench: Bench) -> None:
    bench.use_fake().start()
    with bench.ready() as client:
        client.begin("start", "wait")
        kill(bench.pid)
        end = bench.end()
    assert (end["kind"], end["code"], end["why"]) == ("vmm_killed", 137, "the machine's process was killed by signal 9")


def test_a_machine_that_fails_at_once_says_its_last_words(bench: Bench) -> None:
    bench.use_fake("die").start()
    end = bench.end()
    assert (end["kind"], end["exit_file"]) == ("vmm_failed", 255)
    assert end["why"] == "the machine's process ended with 1: fake: -device nonsense: no such device"
    assert (bench.folder / "vmm.log").read_text() == "fake: -device nonsense: no such device\n"


def test_without_an_agent_the_process_is_the_command(bench: Bench) -> None:
    bench.use_fake("print", console="stdio", agent="none").start()
    end = bench.end()
    assert (end["kind"], end["code"], end["exit_file"]) == ("vmm_failed", 7, 7)
    lines = [line.split(" ", 1)[1] for line in bench.log().splitlines()]
    assert sorted(lines) == ["stderr F bad", "stdout F one", "stdout F two", "stdout P half"]


def test_without_an_agent_one_types_into_the_console(bench: Bench) -> None:
    bench.use_fake("echo", console="stdio", agent="none").start()
    with bench.connect() as client:
        assert client.call("ready") == {}
        assert client.refusal("exec", argv=["x"]) == ("unsupported", "the machine has no agent")
        stream = client.open("attach", stdin=True)
        client.response(stream)
        client.send(Kind.STDIN, stream, b"hello\n")
        client.send(Kind.STDIN_END, stream)
        stdout, _, exit_ = client.read_to_end(stream)
        assert stdout.removeprefix(b"ready\n") == b"hello\n"
        assert exit_ == {"code": 0, "signal": None, "out_of_memory": False}
    assert bench.end()["kind"] == "poweroff"


def test_without_an_agent_its_own_program_stops_it(bench: Bench) -> None:
    bench.config["stop_argv"] = ["/bin/sh", "-c", f"echo $MAINPID >{bench.folder}/asked; kill -9 $MAINPID"]
    bench.use_fake("wait", agent="none").start()
    with bench.connect() as client:
        client.call("stop", timeout_s=60)
        end = bench.end()
    assert (end["kind"], end["code"]) == ("stopped", 137)
    assert int((bench.folder / "asked").read_text()) == bench.pid


@pytest.mark.parametrize("stop_argv", [None, ["/no/such/program"]])
def test_without_any_program_it_is_asked_by_a_signal(bench: Bench, stop_argv: list[str] | None) -> None:
    bench.config["stop_argv"] = stop_argv
    bench.use_fake("echo", console="stdio", agent="none").start()
    with bench.connect() as client:
        stream = client.open("console", tail=100, write=False)
        client.response(stream)
        client.read_bytes(stream, b"ready\n")
        client.call("stop", timeout_s=60)
        end = bench.end()
    assert (end["kind"], end["code"]) == ("stopped", 0)
