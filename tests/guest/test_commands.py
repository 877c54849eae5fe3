"""Commands in a guest: who they are, what they are given, how they end, and what holds them back."""

import hashlib
import time

import pytest

from isopod.wire.agent import WINDOW_BYTES, Kind, encode, encode_credit
from tests.guest.machine import Channel, Failed, Machine

pytestmark = [pytest.mark.host, pytest.mark.slow]

N_COMMANDS_MAX = 64


def test_a_command_runs_and_says_how_it_ended(channel: Channel) -> None:
    ended = channel.shell("echo out; echo err >&2; exit 7")
    assert (ended.stdout, ended.stderr, ended.code, ended.signal, ended.out_of_memory) == (b"out\n", b"err\n", 7, None, False)


def test_a_signal_is_delivered_and_told(channel: Channel) -> None:
    stream = channel.begin("/bin/sleep", "100")
    channel.kill(stream, 15)
    ended = channel.end(stream)
    assert (ended.code, ended.signal) == (143, 15)


def test_a_signal_can_be_caught(channel: Channel) -> None:
    stream = channel.begin("/bin/sh", "-c", "trap 'echo caught; exit 3' USR1; echo ready; while :; do sleep 0.1; done")
    channel.wait(lambda: channel.output(stream) == b"ready\n", "it is not ready")
    channel.kill(stream, 10)
    ended = channel.end(stream)
    assert (ended.stdout, ended.code) == (b"ready\ncaught\n", 3)


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("no-such-program", "not_found"),
        ("/no/such/program", "not_found"),
        ("script", "not_found"),
        ("/plain", "not_executable"),
        ("/etc", "not_executable"),
        ("", "invalid"),
    ],
)
def test_what_cannot_be_run_says_why(channel: Channel, program: str, code: str) -> None:
    with pytest.raises(Failed) as caught:
        channel.begin(program)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ("", "0 0 0 10"),
        ("ann", "1000 100 100 10 29"),
        ("1000", "1000 100 100 10 29"),
        ("ann:audio", "1000 29 29"),
        ("4711:4712", "4711 4712 4712"),
    ],
)
def test_a_user_is_looked_up_in_the_root(channel: Channel, user: str, said: str) -> None:
    assert channel.text("echo $(id -u) $(id -g) $(id -G)", user=user).strip() == said


def test_an_unknown_user_is_refused(channel: Channel) -> None:
    with pytest.raises(Failed, match="the root has no user") as caught:
        channel.begin("/bin/true", user="eve")
    assert caught.value.code == "invalid"


def test_privileges_are_those_of_a_container(channel: Channel) -> None:
    rows = "CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs"
    said = channel.text(f"grep -E '{rows}' /proc/self/status | cut -f 2")
    assert said.split() == ["0" * 16, "00000000a80425fb", "00000000a80425fb", "00000000a80425fb", "0" * 16, "1"]
    said = channel.text(f"grep -E '{rows}' /proc/self/status | cut -f 2", user="ann")
    assert said.split() == ["0" * 16, "0" * 16, "0" * 16, "00000000a80425fb", "0" * 16, "1"]
    assert channel.shell("mount -t tmpfs none /tmp").code != 0


def test_signals_and_files_are_clean(channel: Channel) -> None:
    said = channel.text("grep -E 'SigBlk|SigIgn' /proc/self/status | cut -f 2; ls /proc/self/fd | wc -l; umask; ulimit -n")
    assert said.split() == ["0" * 16, "0" * 16, "4", "0022", "1024"], "ls itself has the fourth open"


def test_the_environment_is_what_was_given_and_what_is_usual(channel: Channel) -> None:
    said = channel.text("env | sort", env={"A": "b c", "HOME": "/x"}, user="ann")
    lines = [line for line in said.splitlines() if not line.startswith(("PWD=", "SHLVL="))]
    assert lines == ["A=b c", "HOME=/x", "HOSTNAME=guest-a", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    assert "HOME=/home/ann\n" in channel.text("env", user="ann")


def test_a_missing_working_folder_is_made(channel: Channel) -> None:
    assert channel.text("pwd", cwd="/srv/deep/er") == "/srv/deep/er\n"
    with pytest.raises(Failed, match="the working folder /plain"):
        channel.begin("/bin/true", cwd="/plain")


def test_stdin_is_read_to_its_end(channel: Channel) -> None:
    data = bytes(range(256)) * 4096
    ended = channel.run("/bin/md5sum", stdin=data)
    assert ended.stdout.split()[0].decode() == hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_without_stdin_there_is_nothing_to_read(channel: Channel) -> None:
    assert channel.run("/bin/cat").code == 0


def test_a_command_that_does_not_read_stops_the_host(channel: Channel) -> None:
    stream = channel.begin("/bin/sleep", "100", stdin=True)
    for _ in range(WINDOW_BYTES // 65_536):
        channel.send(encode(Kind.STDIN, stream, bytes(65_536)))
    assert channel.shell("echo fine").stdout == b"fine\n"
    assert channel.window(stream) <= WINDOW_BYTES + 65_536, "only what the pipe holds was granted again"
    channel.kill(stream, 9)
    assert channel.end(stream).code == 137


def test_a_host_that_does_not_read_stops_the_command(channel: Channel) -> None:
    stream = channel.new_stream()
    channel.silent_streams.add(stream)
    channel.begin("/bin/sh", "-c", "yes | head -c 2000000; echo done >/tmp/done", stream=stream)
    channel.wait(lambda: len(channel.output(stream)) == WINDOW_BYTES, "the window is not used")
    assert channel.shell("test -e /tmp/done").code == 1, "it waits for the host"
    assert len(channel.output(stream)) == WINDOW_BYTES
    channel.silent_streams.clear()
    channel.send(encode_credit(stream, WINDOW_BYTES))
    ended = channel.end(stream)
    assert (len(ended.stdout), ended.code) == (2_000_000, 0)


def test_close_drops_the_output_and_lets_the_command_run(channel: Channel) -> None:
    stream = channel.new_stream()
    channel.silent_streams.add(stream)
    channel.begin("/bin/sh", "-c", "yes | head -c 2000000; echo done >/tmp/closed", stream=stream)
    channel.send(encode(Kind.CLOSE, stream))
    channel.wait(lambda: channel.shell("test -e /tmp/closed").code == 0, "it does not run on")


def test_output_of_what_stays_behind_does_not_keep_the_end(channel: Channel) -> None:
    ended = channel.shell("(while echo more; do sleep 0.05; done) & echo mine")
    assert ended.code == 0
    assert b"mine" in ended.stdout


def test_who_keeps_a_terminal_open_does_not_keep_the_end(channel: Channel) -> None:
    script = "(trap '' HUP; while sleep 0.1; do echo more; done) & setsid sleep 100 & echo mine"
    ended = channel.shell(script, terminal=True)
    assert ended.code == 0
    assert b"mine\r\n" in ended.stdout
    channel.text("pkill sleep || true")


def test_large_output_arrives_whole_before_the_end(channel: Channel) -> None:
    ended = channel.shell("seq 1 60000; seq 1 20000 >&2")
    assert ended.stdout == b"".join(b"%d\n" % number for number in range(1, 60_001))
    assert ended.stderr == b"".join(b"%d\n" % number for number in range(1, 20_001))


def test_a_terminal_has_its_size_and_controls_its_session(channel: Channel) -> None:
    stream = channel.begin(
        "/bin/sh", "-c", "stty size; read line; echo got $line; tty; stty size", terminal=True, rows=30, columns=90, stdin=True
    )
    channel.wait(lambda: b"30 90" in channel.output(stream), "no size")
    channel.resize(stream, 50, 120)
    channel.write(stream, b"hello\n")
    ended = channel.end(stream)
    assert ended.code == 0
    assert b"got hello\r\n/dev/pts/" in ended.stdout, "it is no terminal of the sandbox"
    assert b"50 120\r\n" in ended.stdout


def test_an_interrupt_typed_at_a_terminal_is_a_signal(channel: Channel) -> None:
    stream = channel.begin("/bin/sh", "-c", "echo ready; sleep 100", terminal=True, stdin=True)
    channel.wait(lambda: b"ready" in channel.output(stream), "it is not ready")
    channel.write(stream, b"\x03")
    assert channel.end(stream).code == 130


def test_the_end_of_a_terminals_input_is_an_end_of_file(channel: Channel) -> None:
    stream = channel.begin("/bin/cat", terminal=True, stdin=True)
    channel.write(stream, b"line\n")
    channel.send(encode(Kind.STDIN_END, stream))
    ended = channel.end(stream)
    assert (ended.stdout, ended.code) == (b"line\r\nline\r\n", 0)


def test_a_terminal_has_a_type_and_the_user_owns_it(channel: Channel) -> None:
    ended = channel.shell("echo $TERM; stat -c %u $(tty); echo mine >/dev/tty", terminal=True, user="ann")
    assert ended.stdout == b"xterm\r\n1000\r\nmine\r\n"


def test_there_are_64_commands_at_once_and_no_more(channel: Channel) -> None:
    streams = [channel.begin("/bin/cat", stdin=True) for _ in range(N_COMMANDS_MAX)]
    with pytest.raises(Failed) as caught:
        channel.begin("/bin/true")
    assert caught.value.code == "busy"
    for stream in streams:
        channel.write(stream, b"%d" % stream)
        channel.send(encode(Kind.STDIN_END, stream))
    ended = {stream: channel.end(stream) for stream in streams}
    assert {stream: (end.stdout, end.code) for stream, end in ended.items()} == {stream: (b"%d" % stream, 0) for stream in streams}
    assert channel.run("/bin/true").code == 0


def test_orphans_are_reaped(channel: Channel) -> None:
    channel.text("for i in 1 2 3 4 5; do (sleep 0.1 &) & done; wait")
    channel.wait(lambda: "\nState:\tZ" not in channel.text("cat /proc/[0-9]*/status 2>/dev/null || true"), "the dead stay")


def test_a_command_cannot_climb_out_of_its_root(channel: Channel) -> None:
    script = "mkdir -p /tmp/deep; cd /; chroot /tmp/deep /bin/true 2>/dev/null; ls ../../../..; ls /proc/1/root/ 2>&1; cat /escape 2>&1"
    said = channel.shell(script).stdout.decode()
    assert "newroot" not in said
    assert "modules" not in said, "these are init's own"


def test_memory_that_is_not_there_kills_the_command_and_nothing_else(channel: Channel) -> None:
    channel.events.clear()
    # A file in memory belongs to who wrote it, but killing frees none of it; what a process holds itself goes with it.
    ended = channel.run("/bin/awk", 'BEGIN { x = "0123456789abcdef"; while (1) x = x x }')
    assert (ended.code, ended.signal, ended.out_of_memory) == (137, 9, True), ended
    channel.wait(lambda: channel.events, "no event")
    assert (channel.events[0]["event"], channel.events[0]["command"]) == ("oom", "awk")
    assert channel.run("/bin/true").code == 0


def test_metrics_agree_with_the_guests_own_files(guest: Machine, channel: Channel) -> None:
    figures = channel.request("metrics")
    memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in channel.text("cat /proc/meminfo").splitlines()}
    assert figures["memory"]["total"] == memory["MemTotal"] == channel.hello["memory_bytes"]
    assert abs(figures["memory"]["free"] - memory["MemFree"]) < 8 << 20
    uptime_s = float(channel.text("cat /proc/uptime").split()[0])
    assert 0 <= uptime_s - figures["uptime_s"] < 10
    assert figures["n_cpus"] == 1
    assert figures["processes"] > 10
    assert [link["name"] for link in figures["interfaces"]] == ["lo", "eth0"]
    disks = {disk["name"]: disk for disk in figures["disks"]}
    assert disks["vda"]["read_bytes"] > 0
    assert disks["vdb"]["reads"] > 0
    assert figures["agent"]["n_threads"] == 1
    assert 500_000 < figures["agent"]["resident_bytes"] < 8 << 20
    assert 0 <= figures["agent"]["cpu_s"] < figures["cpu"]["system"] + figures["cpu"]["user"]
    before = figures["cpu"]["user"] + figures["cpu"]["system"]
    channel.text("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
    after = channel.request("metrics")["cpu"]
    assert after["user"] + after["system"] > before


def test_the_agent_answers_while_commands_are_busy(channel: Channel) -> None:
    streams = [channel.begin("/bin/sh", "-c", "while :; do :; done") for _ in range(4)]
    channel.pongs.clear()
    begun = time.monotonic()
    channel.send(encode(Kind.PING, 0, b"12345678"))
    channel.wait(lambda: channel.pongs == [b"12345678"], "no answer")
    assert time.monotonic() - begun < 30
    for stream in streams:
        channel.kill(stream, 9)
        channel.end(stream)
