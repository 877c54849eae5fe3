"""A laboratory: network and mount namespaces for a few processes, joined by a bridge in a namespace of its own, and faults in them.

Nothing of it has a name on the machine: each namespace is held by a process that ends with the test, however the test ends, and links,
tables and mounts go with their namespace. The machine's own network and mounts are never touched. Addresses may be the same in every
laboratory for the same reason. Needs root, `unshare`, `nsenter` and `setpriv` of util-linux, `ip` and `nft`.
"""

import os
import signal
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

RUN_S: Final = 30.0
HUB: Final = 0
"""The number of the namespace with the bridge."""
TABLE: Final = "inet cut"


class LabError(AssertionError):
    """A command of the laboratory failed."""


def address(number: int) -> str:
    """Return the address in a namespace."""
    return f"10.77.0.{number}"


def proxy_address(number: int) -> str:
    """Return the address beside the bridge under which a proxy for a namespace may listen."""
    return f"10.77.0.{100 + number}"


class Lab:
    """Namespaces 1 to `n`, each with `eth0` at `address(number)`, and the hub. `close` when done."""

    def __init__(self, n: int) -> None:
        self._keepers: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for number in (HUB, *range(1, n + 1)):
                self._keepers[number] = _keeper()
            self._wire(n)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes that hold the namespaces; what else runs in them must have been ended by who started it."""
        for keeper in self._keepers.values():
            keeper.kill()
        for keeper in self._keepers.values():
            keeper.communicate()

    def path(self, number: int, path: str | Path) -> str:
        """Return how a file of a namespace is reached from outside, whatever is mounted there."""
        return f"/proc/{self._keepers[number].pid}/root{path}"

    def argv(self, number: int, argv: Sequence[str]) -> list[str]:
        """Return a command line that runs in a namespace, as the process that is started, and ends with who starts it."""
        pid = self._keepers[number].pid
        enter = ["nsenter", f"--net=/proc/{pid}/ns/net", f"--mount=/proc/{pid}/ns/mnt", "--"]
        return [*enter, "setpriv", "--pdeathsig", "KILL", *argv]

    def run(self, number: int, argv: Sequence[str], text: str = "") -> str:
        """Run a command in a namespace to its end; return what it printed.

        Raises:
            LabError: It failed.
        """
        done = subprocess.run(
            self.argv(number, argv), input=text.encode(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=RUN_S, check=False
        )
        if done.returncode != 0:
            raise LabError(f"{' '.join(argv)}: {done.stdout.decode(errors='replace')}")
        return done.stdout.decode(errors="replace")

    # --- faults -------------------------------------------------------------------------------------------------------

    def cut(self, number: int, *, hears: bool = False, speaks: bool = False, others: Iterable[int] = ()) -> None:
        """Have packets of a namespace dropped, by rules of nftables.

        Args:
            number: Whose.
            hears: What comes still arrives.
            speaks: What it sends still leaves.
            others: Only between it and these; all if there are none.
        """
        rules = ["flush chain inet cut from", "flush chain inet cut to"]
        peers = "{ " + ", ".join(address(each) for each in others) + " }" if others else "0.0.0.0/0"
        if not hears:
            rules.append(f'add rule {TABLE} from iif "eth0" ip saddr {peers} drop')
        if not speaks:
            rules.append(f'add rule {TABLE} to oif "eth0" ip daddr {peers} drop')
        hooks = "policy accept"
        chains = [
            f"add table {TABLE}",
            f"add chain {TABLE} from {{ type filter hook input priority 0; {hooks}; }}",
            f"add chain {TABLE} to {{ type filter hook output priority 0; {hooks}; }}",
        ]
        self.run(number, ["nft", "-f", "-"], "\n".join((*chains, *rules)) + "\n")

    def heal(self, number: int) -> None:
        """Let everything of a namespace through again; also if nothing was dropped."""
        self.run(number, ["nft", "-f", "-"], f"add table {TABLE}\ndelete table {TABLE}\n")

    def mount_small_disk(self, number: int, folder: Path, size_mb: int) -> None:
        """Put a file system of so many MiB over a folder, in this namespace alone."""
        self.run(number, ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "none", str(folder)])

    def fill(self, number: int, folder: Path) -> int:
        """Take what is free on a folder's file system, by one file; return how many bytes that were."""
        n_bytes = 0
        with open(self.path(number, folder / "ballast"), "ab") as ballast:
            while True:
                try:
                    os.posix_fallocate(ballast.fileno(), n_bytes, 1 << 12)
                except OSError:
                    return n_bytes
                n_bytes += 1 << 12

    def make_room(self, number: int, folder: Path) -> None:
        """Give back what `fill` took; also if it took nothing."""
        Path(self.path(number, folder / "ballast")).unlink(missing_ok=True)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _wire(self, n: int) -> None:
        """Make the bridge and a pair of links for each namespace."""
        lines = ["link set lo up", "link add br0 type bridge", "link set br0 up", f"address add {address(254)}/24 dev br0"]
        lines += [f"address add {proxy_address(number)}/24 dev br0" for number in range(1, n + 1)]
        for number in range(1, n + 1):
            pid = self._keepers[number].pid
            lines += [f"link add v{number} type veth peer name eth0 netns {pid}", f"link set v{number} master br0 up"]
        self.run(HUB, ["ip", "-batch", "-"], "\n".join(lines) + "\n")
        for number in range(1, n + 1):
            inside = ["link set lo up", f"address add {address(number)}/24 dev eth0", "link set eth0 up"]
            self.run(number, ["ip", "-batch", "-"], "\n".join(inside) + "\n")


def _keeper() -> "subprocess.Popen[bytes]":
    """Start a process that has a network and mounts of its own, and ends with this one."""
    argv = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", "echo here; exec cat"]
    keeper = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert keeper.stdout is not None
    if keeper.stdout.readline() != b"here\n":
        keeper.kill()
        keeper.communicate()
        raise LabError("no namespaces can be made: this needs root, and a kernel that has them")
    return keeper


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process, stopped or not, and have it gone."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()
