"""The simulated shell and its commands do what busybox 1.35 does, as far as they go."""

import pytest

from isopod.world.sim import SimWorld
from isopod.world.sim.programs.shell_grammar import SyntaxFault, parse
from tests.world.sim.bundles import create, crun, furnish


async def sh(sim: SimWorld, script: str, *arguments: str) -> tuple[int, str, str]:
    """Run a script beside a sleeping first process."""
    furnish(sim)
    await create(sim, "sleep", "100000")
    await crun(sim, "start", "c1")
    done = await crun(sim, "exec", "c1", "sh", "-c", script, *arguments)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(
    "script, output",
    [
        ("echo a  b 'c  d' \"e  f\"", "a b c  d e  f\n"),
        ("X=1; Y=$X$X; echo ${Y}z '$X' \"$X\" \\$X", "11z $X 1 $X\n"),
        ("X='a  b'; echo $X; echo \"$X\"", "a b\na  b\n"),
        ("false && echo no; false || echo yes; true && echo also", "yes\nalso\n"),
        ("if false; then echo a; elif true; then echo b; else echo c; fi", "b\n"),
        ("for i in 1 2 3; do if [ $i = 2 ]; then continue; fi; echo $i; done", "1\n3\n"),
        ("i=0; while [ $i -lt 3 ]; do i=$((i+1)); echo $i; done", "1\n2\n3\n"),
        ("i=0; until [ $i -ge 5 ]; do i=$((i + 2)); if [ $i = 4 ]; then break; fi; done; echo $i", "4\n"),
        ("echo one two | wc -w; echo $?", "2\n0\n"),
        ("echo $(echo inner; echo more) end", "inner more end\n"),
        ("(X=2; echo $X); echo [$X]", "2\n[]\n"),
        ("{ echo a; echo b; } | head -n 1", "a\n"),
        ("echo kept > /tmp/f; echo more >> /tmp/f; cat < /tmp/f; cat /tmp/f | wc -l", "kept\nmore\n2\n"),
        ("cd /tmp && pwd; cd ..; pwd", "/tmp\n/\n"),
        ("export A=b; env | grep A=", "A=b\n"),
        ("! true; echo $?; ! false; echo $?", "1\n0\n"),
        ("echo $0 $1 $# $@", "name one 2 one two\n"),
        ("hostname; id -u", "box\n0\n"),
        ("printf '%s-%s\\n' a b", "a-b\n"),
        ("echo x # a comment\necho y", "x\ny\n"),
        ("sleep 5 & echo started; wait; echo done", "started\ndone\n"),
        ("trap 'echo bye' EXIT; echo hi", "hi\nbye\n"),
        ("test -d /tmp && test ! -e /absent && [ -f /etc/notes ] && echo fine", "fine\n"),
        ("kill -9 1; echo alive", "alive\n"),
        ("sleep 100 & kill -TERM $!; wait $!; echo $?", "143\n"),
        ("mkdir /tmp/d 2>/dev/null || busybox mkdir /tmp/d; touch /tmp/d/x; ls /tmp/d", "x\n"),
    ],
)
async def test_scripts(sim_world: SimWorld, script: str, output: str) -> None:
    assert (await sh(sim_world, script, "name", "one", "two"))[1] == output


@pytest.mark.parametrize(
    "script, status, error",
    [
        ("nope", 127, "sh: nope: not found\n"),
        ("/etc/notes", 126, "sh: /etc/notes: Permission denied\n"),
        ("exit 300", 44, ""),
        ("false", 1, ""),
        ("cat /absent", 1, "cat: can't open '/absent': No such file or directory\n"),
        ("echo x > /absent/f; exit $?", 1, "sh: can't create /absent/f: nonexistent directory\n"),
        ("echo out >&2", 0, "out\n"),
        ("(exit 5)", 5, ""),
        ("sh -c 'kill -9 $$'; exit $?", 137, "Killed\n"),
        ("kill 4000", 1, "kill: can't kill pid 4000: No such process\n"),
        ("trap 'exit 9' TERM; kill -TERM $$; sleep 1; exit 1", 9, ""),
        ("trap '' TERM; kill -TERM $$; exit 4", 4, ""),
        ("if true; then", 2, 'sh: syntax error: unexpected end of file (expecting "fi")\n'),
        ("echo 'open", 2, "sh: syntax error: unterminated quoted string\n"),
    ],
)
async def test_failures(sim_world: SimWorld, script: str, status: int, error: str) -> None:
    assert (await sh(sim_world, script)) == (status, "", error)


async def test_a_fork_over_the_limit_fails(sim_world: SimWorld) -> None:
    furnish(sim_world)
    await create(sim_world, "sleep", "100000", resources={"pids": {"limit": 5}})
    await crun(sim_world, "start", "c1")
    done = await crun(sim_world, "exec", "c1", "sh", "-c", "for i in 1 2 3 4 5 6; do sleep 3 & echo $i; done")
    assert (done.returncode, done.stdout) == (2, b"1\n2\n3\n")
    assert done.stderr == b"sh: can't fork: Resource temporarily unavailable\n"


async def test_a_full_disk_reaches_the_command(sim_world: SimWorld) -> None:
    status, _, error = await sh(sim_world, "dd if=/dev/zero of=/tmp/f bs=1M count=2 2>/dev/null; echo $? >&2")
    assert (status, error) == (0, "0\n")
    sim_world.disk.capacity_bytes = sim_world.disk.used_bytes + 1000
    done = await crun(sim_world, "exec", "c1", "dd", "if=/dev/zero", "of=/tmp/g", "bs=1M", "count=2")
    assert done.returncode == 1
    assert b"No space left on device" in done.stderr


@pytest.mark.parametrize("text", ["(", "echo $(", "a | | b", "; ;", "do", "for i in 1; done", "${X"])
def test_what_is_no_program(text: str) -> None:
    with pytest.raises(SyntaxFault):
        parse(text)
