"""What must hold of the private mount namespace. Each scenario runs enclosed (see enclosed.py) and starts nodes (see mount_node.py)."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from isopod import _core
from isopod.world.host.mountinfo import read_own


class Node:
    """A node process, told what to do."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.world.host.mount_node"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, name: str, argument: str = "") -> list[str]:
        """Return the node's answer; OSError if it failed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, argument]) + "\n")
        self.process.stdin.flush()
        reply = json.loads(self.process.stdout.readline())
        if "error" in reply:
            raise OSError(int(reply["error"][0]), reply["error"][1])
        answer: list[str] = reply["answer"]
        return answer

    def kill(self) -> None:
        self.process.kill()
        self._reap()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)
        self._reap()

    def _reap(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait(10)


@contextmanager
def node() -> Iterator[Node]:
    started = Node()
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.kill()


def host_mounts(folder: str) -> list[str]:
    return [mount.target for mount in read_own() if mount.target.startswith(folder)]


def a_second_node_enters_the_same_namespace(folder: str) -> None:
    pin, data = _places(folder)
    with node() as first:
        first.ask("prepare", pin)
        first.ask("tmpfs", data)
        space = first.ask("namespace")
        assert space != [os.readlink("/proc/self/ns/mnt")]
        assert first.ask("mounts", data) == [data]
        first.kill()
    assert data not in host_mounts(folder), "the node's mounts stay out of the host's table"
    with node() as second:
        second.ask("prepare", pin)
        assert second.ask("namespace") == space
        assert second.ask("mounts", data) == [data]
        second.ask("release", pin)
        second.end()
    assert host_mounts(folder) == []


def later_mounts_of_the_host_are_seen(folder: str) -> None:
    pin, data = _places(folder)
    os.makedirs(f"{folder}/source")
    open(f"{folder}/source/file", "w", encoding="ascii").close()
    with node() as inside:
        inside.ask("prepare", pin)
        _core.bind_mount(f"{folder}/source", data)
        assert inside.ask("names", data) == ["file"]
        inside.ask("tmpfs", f"{folder}/source")
        assert os.listdir(f"{folder}/source") == ["file"], "but nothing comes back"
        _core.unmount(data, False)
        assert inside.ask("names", data) == []
        inside.ask("release", pin)
    assert host_mounts(folder) == []


def the_unified_hierarchy_is_hidden_only_beside_v1(folder: str) -> None:
    pin, _ = _places(folder)
    unified = [mount.target for mount in read_own() if mount.kind == "cgroup2"]
    groups = [mount.target for mount in read_own() if mount.kind == "cgroup"]
    with node() as inside:
        before = inside.ask("mode")
        inside.ask("prepare", pin)
        assert inside.ask("mode") == before
        assert inside.ask("kinds", "cgroup") == groups
        assert inside.ask("kinds", "cgroup2") == ([] if before == ["hybrid"] else unified)
        inside.ask("release", pin)
    assert [mount.target for mount in read_own() if mount.kind == "cgroup2"] == unified


def a_process_with_threads_is_refused(folder: str) -> None:
    pin, _ = _places(folder)
    with node() as inside:
        inside.ask("sync", folder)
        try:
            inside.ask("prepare", pin)
        except OSError as error:
            assert "threads" in str(error)
        else:
            raise AssertionError("entered in spite of a thread")
    assert host_mounts(folder) == []


def releasing_works_with_threads_and_twice(folder: str) -> None:
    pin, _ = _places(folder)
    with node() as inside:
        inside.ask("prepare", pin)
        inside.ask("sync", folder)
        assert len(host_mounts(folder)) == 2
        inside.ask("release", pin)
        assert host_mounts(folder) == []
        assert not os.path.exists(pin)
        inside.ask("release", pin)
        assert inside.ask("namespace") != [os.readlink("/proc/self/ns/mnt")], "who is inside stays inside"


def releasing_without_having_entered(folder: str) -> None:
    pin, _ = _places(folder)
    with node() as first:
        first.ask("prepare", pin)
        first.kill()
    with node() as stranger:
        stranger.ask("release", pin)
    assert host_mounts(folder) == []


def what_a_crash_leaves_is_repaired(folder: str) -> None:
    """Every state in which a kill can leave the host: folder bound and still shared, bound and private, the file made, all pinned."""
    pin, _ = _places(folder)
    space = os.path.dirname(pin)
    for n_steps in range(4):
        if n_steps >= 1:
            _core.bind_mount(space, space)
        if n_steps >= 2:
            _core.make_private(space)
        if n_steps >= 3:
            open(pin, "w", encoding="ascii").close()
        with node() as inside:
            inside.ask("prepare", pin)
            assert host_mounts(folder) == [space, pin], n_steps
            inside.ask("release", pin)
        assert host_mounts(folder) == [], n_steps


def a_node_killed_at_any_moment_of_preparing_leaves_it_repairable(folder: str, *, n_calls: int) -> None:
    pin, _ = _places(folder)
    _prepare_and_die_at(pin, n_calls)
    with node() as inside:
        inside.ask("prepare", pin)
        assert host_mounts(folder) == [os.path.dirname(pin), pin]
        inside.ask("release", pin)
    assert host_mounts(folder) == []


def a_file_system_mounted_by_the_user_at_the_folder_is_kept(folder: str) -> None:
    pin, _ = _places(folder)
    space = os.path.dirname(pin)
    _core.mount_tmpfs(space, 1 << 20)
    with node() as inside:
        inside.ask("prepare", pin)
        inside.ask("release", pin)
    assert host_mounts(folder) == [space]
    _core.unmount(space, False)


def _places(folder: str) -> tuple[str, str]:
    os.makedirs(f"{folder}/space")
    os.makedirs(f"{folder}/data")
    return f"{folder}/space/mounts", f"{folder}/data"


def _prepare_and_die_at(pin: str, n_calls: int) -> None:
    """Run `prepare` in a process that kills itself before its n-th system call of a kind that changes something."""
    program = (
        "import os, signal, sys\n"
        "from isopod import _core\n"
        "from isopod.world.host import mountspace\n"
        "left = int(sys.argv[2])\n"
        "def dying(call):\n"
        "    def wrapped(*args, **kwargs):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return call(*args, **kwargs)\n"
        "    return wrapped\n"
        "for name in ('bind_mount', 'make_private', 'enter_mount_namespace', 'unshare_mounts', 'make_slave_recursive', 'unmount'):\n"
        "    setattr(_core, name, dying(getattr(_core, name)))\n"
        "for name in ('fork', 'open', 'read', 'write', 'waitpid', 'pipe2'):\n"
        "    setattr(os, name, dying(getattr(os, name)))\n"
        "mountspace.enter(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, pin, str(n_calls)], capture_output=True, text=True, timeout=40, check=False)
    told = done.stderr.strip().splitlines()[-1:]  # where the child was the one to die, the parent says so
    assert done.returncode in (0, -signal.SIGKILL) or told[0].startswith(("ChildProcessError", "FileNotFoundError")), done.stderr


SCENARIOS: Final[Mapping[str, Callable[[str], None]]] = {
    scenario.__name__: scenario
    for scenario in (
        a_second_node_enters_the_same_namespace,
        later_mounts_of_the_host_are_seen,
        the_unified_hierarchy_is_hidden_only_beside_v1,
        a_process_with_threads_is_refused,
        releasing_works_with_threads_and_twice,
        releasing_without_having_entered,
        what_a_crash_leaves_is_repaired,
        a_file_system_mounted_by_the_user_at_the_folder_is_kept,
    )
} | {
    f"a_node_killed_before_call_{n_calls}_of_preparing_leaves_it_repairable": functools.partial(
        a_node_killed_at_any_moment_of_preparing_leaves_it_repairable, n_calls=n_calls
    )
    for n_calls in range(1, 14)
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](sys.argv[2])
