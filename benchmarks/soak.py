"""`make soak-runtime`: ten minutes at full load with clients that die, stall and misbehave; exit code 1 if anything leaks.

One server program (`_soak_server`: HTTP, TLS, WebSockets, RPC, shards) is loaded by well-behaved clients that check every answer
(`_soak_clients`), by misbehaving ones (`_soak_bad`), and by well-behaved ones that are killed with SIGKILL every few seconds; once a
minute a shard is killed. The course:

    touch      3 s of everything, so that what is made once is there; then all clients end: that is the idle baseline
    warm-up    a fifth of the time; then all clients end again
    load       the rest, in rounds of a minute and a half: a look every few seconds, at the end of each round all clients end
    down       SIGTERM

What must hold, or the run has failed:

- After warm-up and after each round every process of the server returns, within seconds, to exactly the idle baseline: descriptors,
  tasks, connections of each kind, calls, and among all Python objects transports, protocols and timers on wheels.
- Memory, held: from the idle state after warm-up to that after the last round no process grows by more than 8 MiB of RSS, and a line
  through shard 0's idle states rises by less than 1 MiB a minute (judged from five minutes of load on: in shorter runs caches and the
  allocator's pools are still filling). Every look comes after malloc_trim(3), those at idle states after a collection of garbage too, so
  that they show what is held and not what the allocator keeps. No type of object has become more numerous by 500 and more.
- Memory, in use: under load it goes up and down by tens of MiB with the answers that slow readers leave in buffers (8 MiB each here), so
  no line is drawn: the median of the last third of the looks is at most 48 MiB above that of the first third.
- The well-behaved clients saw no failure, but for those on a shard that was killed meanwhile.
- The log has only the events that such peers and such deaths must cause.
- SIGTERM ends the program with 0, and none of its processes, sockets in the file system or zombies are left.
"""

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from benchmarks import _soak_watch as watch
from benchmarks._harness import PROJECT, describe_load, machine_load
from benchmarks._soak_clients import Report
from benchmarks._soak_shared import Look, Ports, write_certificates
from benchmarks._soak_watch import MIB, Process, Sample

TOUCH_S: Final = 3.0
WARM_PART: Final = 0.2
SAMPLE_S: Final = 5.0
KILL_CLIENT_S: Final = 4.0
KILL_SHARD_S: Final = 60.0
START_S: Final = 30.0
QUIET_S: Final = 30.0
"""How long the server may take to be idle again: its longest limit is 5 s, and the machine may be busy with other things."""
N_SAME: Final = 5
"""So many looks, half a second apart, must be like the one before until it counts as idle."""
STOP_S: Final = 20.0
CLIENT_GRACE_S: Final = 90.0
"""How long clients may take beyond their time: a session ends when it is through."""
RSS_GROWTH_MAX: Final = 8 * MIB
IDLE_SLOPE_MAX: Final = 1 * MIB
"""A minute."""
SLOPE_LOAD_S: Final = 300.0
LOAD_GROWTH_MAX: Final = 48 * MIB
ROUND_S: Final = 90.0
N_THIRD_MIN: Final = 4
"""So many looks make a third that can be compared."""
OBJECTS_MAX: Final = 500
SHARD_PAUSE_S: Final = 15.0
"""How long after its death a shard may still cost failures: it is started again after a pause, on a full machine."""
ALLOWED_EVENTS: Final = {
    "reactor.stalled": "a step of more than 250 ms: the machine is full, and deep looks take that long",
    "rpc.violation": "garbage, and peers that do not read",
    "smp.shard_up": "after each restart",
    "smp.shard_down": "after each kill",
    "smp.lane_lost": "after each kill, by the other shards",
    "smp.connection_lost": "a connection that ended while it was handed out",
}


class Soak:
    """One run.

    Args:
        folder: For certificates, sockets and logs.
        seconds: Of warm-up and load together.
        n_shards: How many shards the server has.
    """

    def __init__(self, folder: Path, seconds: float, n_shards: int) -> None:
        self.folder = folder
        self.seconds = seconds
        self.n_shards = n_shards
        self.reasons: list[str] = []
        self.loaded: list[Sample] = []
        """Looks under load, after warm-up."""
        self.reports: list[Report] = []
        self.bad: Counter[str] = Counter()
        self.kills: list[float] = []
        self.members: dict[watch.Member, None] = {}
        """All processes of the server that were ever seen."""
        self.n_clients_killed = 0
        self.random = random.Random(3)
        self.ports = Ports(0, 0, 0, 0)
        self._began_s = time.monotonic()
        self._seed = 0

    def run(self) -> None:
        """Do all of it; `reasons` says what failed."""
        write_certificates(self.folder)
        with (self.folder / "server.log").open("wb") as log, self._server(log) as server:
            idle = self._phase(server, TOUCH_S, "idle baseline", None)
            warm = self._phase(server, self.seconds * WARM_PART, "after warm-up", idle)
            load_s = self.seconds * (1 - WARM_PART)
            n_rounds = max(1, round(load_s / ROUND_S))
            rounds = [self._phase(server, load_s / n_rounds, f"after round {number + 1}", idle, is_load=True) for number in range(n_rounds)]
            self._judge_held([warm, *rounds])
            self._judge_in_use(rounds[-1].looks[0].pid)
            self._end(server)
        self._judge_clients()
        self._judge_log()

    # --- the course ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _server(self, log: object) -> "Iterator[subprocess.Popen[bytes]]":
        argv = [sys.executable, "-m", "benchmarks._soak_server", str(self.folder), str(self.n_shards)]
        with subprocess.Popen(
            argv, cwd=PROJECT, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        ) as server:  # type: ignore[call-overload]
            try:
                assert server.stdout is not None
                line = server.stdout.readline()
                if not line:
                    raise SystemExit(f"the server did not start: {(self.folder / 'server.log').read_text(encoding='utf-8')[-2000:]}")
                self.ports = msgspec.json.decode(line, type=Ports)
                yield server
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)

    def _phase(self, server: "subprocess.Popen[bytes]", seconds: float, name: str, idle: Sample | None, *, is_load: bool = False) -> Sample:
        """Load for so long, end all clients, wait for silence; return the look at it."""
        began_s = time.monotonic()
        until_s = began_s + seconds
        steady = [self._client("_soak_clients", seconds), self._client("_soak_bad", seconds)]
        victim = self._client("_soak_clients", seconds)
        next_sample_s, next_victim_s = began_s + SAMPLE_S, began_s + KILL_CLIENT_S
        next_shard_s = began_s + 0.4 * min(KILL_SHARD_S, seconds)
        try:
            while (now_s := time.monotonic()) < until_s:
                if server.poll() is not None:
                    raise SystemExit(f"the server ended with {server.returncode}: {self._log_end()}")
                if now_s >= next_victim_s:
                    _kill(victim)
                    self.n_clients_killed += 1
                    victim = self._client("_soak_clients", max(1.0, until_s - now_s))
                    next_victim_s = now_s + KILL_CLIENT_S
                if now_s >= next_sample_s:
                    self._take(server, name, keep=is_load)
                    next_sample_s = now_s + SAMPLE_S
                if is_load and now_s >= next_shard_s:
                    self._kill_shard()
                    next_shard_s = now_s + KILL_SHARD_S
                time.sleep(0.1)
            self._collect(*steady)
        finally:
            for client in (*steady, victim):
                _kill(client)
        return self._quieten(server, name, idle)

    def _quieten(self, server: "subprocess.Popen[bytes]", name: str, idle: Sample | None) -> Sample:
        """Wait until the server is as idle as it was; report what is not."""
        until_s = time.monotonic() + QUIET_S
        last, look = ["it answered no look"], None
        n_same, before = 0, None
        while time.monotonic() < until_s and (last or n_same < N_SAME):
            time.sleep(0.5)
            try:
                look = self._sample(server, deep=True)
            except OSError as error:  # of a shard that is being started again; or the server hangs
                last = [f"no look: {error}"]
                continue
            state = [watch.counts(each, look.process(each.pid)) | _deep(each) for each in look.looks]
            n_same = n_same + 1 if state == before else 0
            before = state
            last = _differences(idle, look) if idle is not None else _not_idle(look)
        if look is None:
            raise SystemExit(f"{name}: {last[0]}; the log ends: {self._log_end()}")
        self.reasons += [f"{name}: {difference}" for difference in last]
        self._print(name, look)
        return look

    def _kill_shard(self) -> None:
        """Kill one of the other shards with SIGKILL."""
        with contextlib.suppress(OSError, TimeoutError, ProcessLookupError):
            others = [look for look in watch.looks(self.folder, deep=False) if look.shard]
            if others:
                victim = self.random.choice(others)
                self.kills.append(time.monotonic())
                os.kill(victim.pid, signal.SIGKILL)
                print(f"{self._now():7.1f} s  killed shard {victim.shard}, pid {victim.pid}", flush=True)

    def _end(self, server: "subprocess.Popen[bytes]") -> None:
        server.send_signal(signal.SIGTERM)
        try:
            status = server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.reasons.append(f"SIGTERM did not end it within {STOP_S:g} s")
            return
        if status != 0:
            self.reasons.append(f"it ended with {status}")
        left = [member.pid for member in self.members if watch.lives(member)]
        if left:
            self.reasons.append(f"processes left: {left}")
        files = sorted(path.name for path in self.folder.glob("*.sock"))
        if files:
            self.reasons.append(f"sockets left: {files}")

    # --- clients ------------------------------------------------------------------------------------------------------

    def _client(self, module: str, seconds: float) -> "subprocess.Popen[bytes]":
        self._seed += 1
        argv = [sys.executable, "-m", f"benchmarks.{module}", str(self.folder), msgspec.json.encode(self.ports).decode()]
        with (self.folder / f"{module}.log").open("ab") as log:
            return subprocess.Popen([*argv, f"{seconds:.1f}", str(self._seed)], cwd=PROJECT, stdout=subprocess.PIPE, stderr=log)

    def _collect(self, good: "subprocess.Popen[bytes]", bad: "subprocess.Popen[bytes]") -> None:
        """Wait for clients, and take what they report."""
        for client, take in ((good, self._take_report), (bad, self._take_bad)):
            try:
                output, _ = client.communicate(timeout=CLIENT_GRACE_S)
                take(output)
            except (subprocess.TimeoutExpired, msgspec.MsgspecError) as error:
                self.reasons.append(f"a client process told nothing: {error}")

    def _take_report(self, output: bytes) -> None:
        self.reports.append(msgspec.json.decode(output, type=Report))

    def _take_bad(self, output: bytes) -> None:
        self.bad.update(msgspec.json.decode(output, type=dict[str, int]))

    # --- looks --------------------------------------------------------------------------------------------------------

    def _take(self, server: "subprocess.Popen[bytes]", name: str, *, keep: bool) -> None:
        with contextlib.suppress(OSError):  # a shard may die between two looks
            look = self._sample(server, deep=False)
            if keep:
                self.loaded.append(look)
            self._print(name.replace("after", "in"), look)

    def _sample(self, server: "subprocess.Popen[bytes]", *, deep: bool) -> Sample:
        look = watch.sample(self.folder, server.pid, self._now(), deep=deep)
        self.members.update(dict.fromkeys(look.members))
        return look

    def _now(self) -> float:
        return time.monotonic() - self._began_s

    def _print(self, name: str, look: Sample) -> None:
        for each in look.looks:
            found = look.process(each.pid)
            if found is not None:
                n_calls = each.calls_open + each.shard_calls
                print(
                    f"{look.at_s:7.1f} s  {name:<22} shard {each.shard}  RSS {found.rss / MIB:6.1f} PSS {found.pss / MIB:6.1f} MiB"
                    f"  fds {found.n_descriptors:4}  threads {found.n_threads:2}  tasks {len(each.tasks):4}"
                    f"  http {each.connections:4}  ws {each.websockets:3}  rpc {each.rpc_connections:3}  calls {n_calls:4}"
                    f"  transports {each.transports:3}  timers {each.timers:3}",
                    flush=True,
                )

    # --- the verdict --------------------------------------------------------------------------------------------------

    def _judge_held(self, idles: Sequence[Sample]) -> None:
        """Judge the idle states, from that after warm-up to the last."""
        warm, end = idles[0], idles[-1]
        for look in end.looks:
            before = next((each for each in warm.looks if each.shard == look.shard), None)
            old, new = None if before is None else warm.process(before.pid), end.process(look.pid)
            if before is None or old is None or new is None:
                self.reasons.append(f"shard {look.shard} was not there after warm-up, or is not now")
                continue
            growth = new.rss - old.rss
            print(f"shard {look.shard}: idle RSS grew by {growth / MIB:.1f} MiB from warm-up to the end (at most {RSS_GROWTH_MAX / MIB:g})")
            if growth > RSS_GROWTH_MAX:
                self.reasons.append(f"shard {look.shard}: idle RSS grew by {growth / MIB:.1f} MiB after warm-up")
            more = watch.grown(before.objects, look.objects, least=OBJECTS_MAX)
            if more and before.pid == look.pid:
                self.reasons.append(f"shard {look.shard}: objects grew: {more}")
        points = [(each.at_s, float(found.rss)) for each in idles if (found := each.process(end.looks[0].pid))]
        slope = watch.slope_per_min(points)
        is_judged = self.seconds * (1 - WARM_PART) >= SLOPE_LOAD_S
        judged = "" if is_judged else "; too short to judge"
        print(f"shard 0, idle: {slope / MIB:+.2f} MiB a minute (at most {IDLE_SLOPE_MAX / MIB:g}{judged})")
        if is_judged and slope > IDLE_SLOPE_MAX:
            self.reasons.append(f"shard 0: idle RSS grew by {slope / MIB:.2f} MiB a minute")

    def _judge_in_use(self, pid: int) -> None:
        """Judge shard 0 under load."""
        sizes = [found.rss for sample in self.loaded if (found := sample.process(pid))]
        third = len(sizes) // 3
        if third < N_THIRD_MIN:
            return
        growth = statistics.median(sizes[-third:]) - statistics.median(sizes[:third])
        print(f"shard 0, under load: {growth / MIB:+.1f} MiB from the first to the last third (at most {LOAD_GROWTH_MAX / MIB:g})")
        if growth > LOAD_GROWTH_MAX:
            self.reasons.append(f"shard 0: RSS under load grew by {growth / MIB:.1f} MiB")

    def _judge_clients(self) -> None:
        done: Counter[str] = Counter()
        n_forgiven = 0
        for report in self.reports:
            done.update(report.done)
            for failure in report.failures:
                if failure.kind == "shards" and any(failure.began_s - SHARD_PAUSE_S <= at_s <= failure.ended_s for at_s in self.kills):
                    n_forgiven += 1
                else:
                    self.reasons.append(f"client: {failure.kind}: {failure.error[:300]}")
        print(f"good operations: {dict(sorted(done.items()))}; failed on killed shards: {n_forgiven}")
        print(f"bad scenarios: {dict(sorted(self.bad.items()))}; clients killed: {self.n_clients_killed}; shards killed: {len(self.kills)}")
        for kind in ("http", "https", "http unix", "websocket", "hub", "rpc", "shards"):
            if not done[kind]:
                self.reasons.append(f"no {kind} operation was made")

    def _judge_log(self) -> None:
        events: Counter[str] = Counter()
        for line in (self.folder / "server.log").read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = str(msgspec.json.decode(line, type=dict[str, object]).get("event"))
            except msgspec.MsgspecError:
                event = f"not JSON: {line}"
            events[event] += 1
            if event not in ALLOWED_EVENTS and events[event] <= 3:
                self.reasons.append(f"log: {line[:1500]}")
        print(f"log: {dict(sorted(events.items()))}")

    def _log_end(self) -> str:
        return (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")[-4000:]


def main(argv: Sequence[str]) -> int:
    """Run the soak; return 1 if it failed."""
    parser = argparse.ArgumentParser(prog="soak", description="Load with clients that misbehave; fail if anything leaks.")
    parser.add_argument("--seconds", type=float, default=600.0, help="of warm-up and load together (default 600; 20 to see that it works)")
    parser.add_argument("--shards", type=int, default=2, help="of the server (default 2)")
    arguments = parser.parse_args(argv)
    before = machine_load()
    with tempfile.TemporaryDirectory(prefix="isopod-soak-") as folder:
        soak = Soak(Path(folder), arguments.seconds, arguments.shards)
        soak.run()
    print(describe_load(before, machine_load()))
    for reason, count in Counter(soak.reasons).items():
        print(f"FAILED: {reason}{f' ({count} times)' if count > 1 else ''}")
    print("soak: failed" if soak.reasons else "soak: nothing leaked")
    return 1 if soak.reasons else 0


def _deep(look: Look) -> dict[str, int]:
    return {"transports": look.transports, "protocols": look.protocols, "timers": look.timers}


def _differences(idle: Sample, look: Sample) -> list[str]:
    """Return in what a look differs from the idle one."""
    found = []
    if len(look.members) != len(idle.members):
        found.append(f"{len(look.members)} processes, at first {len(idle.members)}")
    if [each.shard for each in look.looks] != [each.shard for each in idle.looks]:
        found.append(f"shards {[each.shard for each in look.looks]} answer, at first {[each.shard for each in idle.looks]}")
        return found
    for before, after in zip(idle.looks, look.looks, strict=True):
        old, new = idle.process(before.pid), look.process(after.pid)
        was, now = watch.counts(before, old) | _deep(before), watch.counts(after, new) | _deep(after)
        for name, count in now.items():
            if count != was[name]:
                found.append(f"shard {after.shard}: {count} {name}, at first {was[name]}{_detail(name, (before, old), (after, new))}")
    return found


def _detail(name: str, before: tuple[Look, Process | None], after: tuple[Look, Process | None]) -> str:
    """Return which ones are more or fewer than before."""
    if name == "tasks":
        more = watch.changed(Counter(before[0].tasks), Counter(after[0].tasks))
    elif name == "descriptors" and before[1] is not None and after[1] is not None:
        more = watch.changed(before[1].descriptors, after[1].descriptors)
    else:
        more = {kind: n for kind, n in list(watch.changed(before[0].objects, after[0].objects).items())[:20] if "builtins." not in kind}
    return f": {more}" if more else ""


def _not_idle(look: Sample) -> list[str]:
    """Return what an idle server must not have."""
    names: Callable[[Look], dict[str, int]] = lambda each: {  # noqa: E731 - one expression
        name: count for name, count in watch.counts(each, None).items() if name not in ("tasks", "descriptors") and count
    }
    return [f"shard {each.shard}: {names(each)}" for each in look.looks if names(each)]


def _kill(client: "subprocess.Popen[bytes]") -> None:
    if client.poll() is None:
        client.kill()
    client.communicate()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
