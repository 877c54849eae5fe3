"""What is done ahead in a template: the child that waits for its command, and the link that is up."""

from collections.abc import Iterator

import pytest

from isopod.wire.agent import MAIN_STREAM, Kind, encode
from tests.guest import machine
from tests.guest.conftest import open_machine
from tests.guest.machine import Channel, Failed

pytestmark = [pytest.mark.host, pytest.mark.slow]


@pytest.fixture
def channel() -> Iterator[Channel]:
    """A machine whose sandbox is made."""
    if (absent := machine.missing()) is not None:
        pytest.skip(absent)
    with open_machine() as booted:
        yield booted.channel


@pytest.mark.row("V6")
def test_the_child_that_waits_becomes_whatever_command_comes(channel: Channel) -> None:
    for argv in (["/bin/sh"], ["no such program"], ["/etc"]):
        assert channel.request("warm", argv=argv) == {}
    # The first child is used up by a command that cannot be run; what comes then is started as ever.
    with pytest.raises(Failed) as refused:
        channel.begin("/no/such/program", op="start", stream=MAIN_STREAM)
    assert refused.value.code == "not_found"
    assert channel.request("warm", argv=["/bin/sh"]) == {}
    told = "echo $COLOUR $(id -u) $(pwd) $(cat); echo err >&2; test $$ -gt 1; exit 5"
    channel.begin("/bin/sh", "-c", told, op="start", stream=MAIN_STREAM, stdin=True, env={"COLOUR": "red"}, cwd="/tmp", user="7:8")
    channel.write(MAIN_STREAM, b"typed")
    channel.send(encode(Kind.STDIN_END, MAIN_STREAM))
    ended = channel.end(MAIN_STREAM)
    assert (ended.code, ended.stdout, ended.stderr) == (5, b"red 7 /tmp typed\n", b"err\n")
    with pytest.raises(Failed, match="started already"):
        channel.begin("/bin/true", op="start", stream=MAIN_STREAM)


@pytest.mark.row("V6")
def test_what_a_command_may_is_the_same_whether_it_waited_or_not(channel: Channel) -> None:
    looks = (
        "grep -E 'Cap|NoNewPrivs|Sig[BI]' /proc/self/status",
        "ulimit -n",
        "umask",
        "cat /proc/self/cgroup /proc/self/mounts",
        "ls /proc/self/fd",
    )
    script = "; ".join(looks)
    fresh = channel.shell(script)
    assert channel.request("warm", argv=["/bin/sh"]) == {}
    channel.begin("/bin/sh", "-c", script, op="start", stream=MAIN_STREAM)
    waited = channel.end(MAIN_STREAM)
    assert waited.code == fresh.code == 0
    assert waited.stdout.replace(b"0::/main", b"0::/exec") == fresh.stdout


def test_a_terminal_is_given_to_a_child_of_its_own(channel: Channel) -> None:
    assert channel.request("warm", argv=["/bin/sh"]) == {}
    channel.begin("/bin/sh", "-c", "tty; stty size", op="start", stream=MAIN_STREAM, terminal=True, rows=11, columns=22)
    ended = channel.end(MAIN_STREAM)
    assert (ended.code, ended.stdout) == (0, b"/dev/pts/0\r\n11 22\r\n")
    assert channel.text("grep -l isopod-guest /proc/[2-9]*/comm 2>/dev/null | wc -l") == "0\n", "who waited in vain has ended"
