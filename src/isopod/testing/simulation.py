"""A run: a cluster on simulated machines, a plan carried out on it, and everything that must hold checked.

Three phases:

1. safety: the cluster forms; then clients ask and faults happen as the plan says. Nothing needs to make progress, nothing may go wrong.
2. healing: all faults end, all nodes run.
3. liveness: within `HEAL_S` a leader is known, every client is answered, a new write succeeds, and all members have applied the same
   entries and hold the same state.

At the end: the clients' history is linearizable; what they read otherwise, watched, and believed of leases agrees with what the store held
(`isopod.testing.truth`); and every state is what the entries make of nothing, also by way of a snapshot.

A run is a function of its plan (and of the code): equal plans give equal digests, in any process.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

from isopod.api.store.cache import CacheSettings
from isopod.api.store.client import ClientSettings, StoreClient
from isopod.cluster.raft.settings import RaftSettings
from isopod.testing.asides import GONE, Asides
from isopod.testing.clients import Client, revision_violations
from isopod.testing.faults import Faults
from isopod.testing.history import History
from isopod.testing.leasing import lease_violations
from isopod.testing.linearize import Verdict, check_linearizable
from isopod.testing.observe import Watch
from isopod.testing.outcome import Counts, Outcome
from isopod.testing.plan import Plan, Step
from isopod.testing.reads import read_violations, watch_violations
from isopod.testing.rig import PORT, Rig, Tampering
from isopod.testing.scenarios import scenario
from isopod.testing.specifications import Register
from isopod.testing.truth import truth_of
from isopod.testing.waiting import ConditionNotMet, wait_for_condition_with_backoff
from isopod.world.network import TcpAddress
from isopod.world.sim.loop import Deadlock, Runaway

FORM_S: Final = 30.0
"""How long founding a cluster may take, in virtual seconds."""
HEAL_S: Final = 30.0
"""How long a healed cluster may take to answer everybody and to agree."""
EVENTS_MAX: Final = 20_000_000


def run_plan(plan: Plan, *, trace: Callable[[str], None] | None = None, tampering: Tampering = Tampering()) -> Outcome:  # noqa: B008
    """Carry out a plan and check everything.

    Args:
        plan: What happens.
        trace: Takes one line per event that a person may want to read.
        tampering: What is broken on purpose; nothing by default.
    """
    run = _Run(plan, trace, tampering)
    try:
        return run.carry_out()
    finally:
        run.close()


class _Run:
    """One run."""

    def __init__(self, plan: Plan, trace: Callable[[str], None] | None, tampering: Tampering) -> None:
        source = scenario(plan.scenario)
        self._plan = plan
        self._watch = Watch(lambda: self._rig.loop.elapsed_ns, trace=trace)
        self._tampering = tampering
        raft = RaftSettings(snapshot_log_entries=source.snapshot_entries, keep_log_entries=max(10, source.snapshot_entries // 4))
        self._rig = Rig(plan.seed, plan.nodes, self._watch, raft=raft, tampering=tampering, n_events_max=EVENTS_MAX)
        self._faults = Faults(self._rig)
        self._history = History()
        self._pinned = _pinned_clients(plan)
        self._clients = [Client(number, self._history, self._asides(number)) for number in range(1, _n_clients(plan) + 1)]
        self._rules = self._watch.invariants
        self._probe_from: int | None = None

    def carry_out(self) -> Outcome:
        """Run all phases and all checks."""
        loop = self._rig.loop
        loop.set_exception_handler(self._unseen)
        loop.start_trace()
        try:
            self._rig.cluster.run(self._phases())
        except (Deadlock, Runaway) as error:
            self._rules.report("liveness", str(error).splitlines()[0])
        self._check_whole()
        return self._outcome()

    def _asides(self, number: int) -> Asides:
        """Return what a client does beside plain operations; one that is tied to a node knows which life of it answers."""
        rig, boots = self._rig, self._watch.boots
        node = rig.nodes[number % rig.n_first]

        def replica() -> str:
            return GONE if node.is_gone else f"{node.id}.{boots.get(node.id, 0)}"

        return Asides(number, lambda: rig.loop.elapsed_ns, replica if number in self._pinned else lambda: "")

    def close(self) -> None:
        """End everything."""
        self._rig.cluster.close()

    # -- phases --------------------------------------------------------------------------------------------------------------------------

    async def _phases(self) -> None:
        rig = self._rig
        for node in rig.nodes:
            node.boot()
        try:
            await wait_for_condition_with_backoff(rig.has_formed, what="the cluster formed", timeout_s=FORM_S, pause_s_max=0.1)
        except ConditionNotMet as error:
            self._rules.report("liveness", str(error))
            return
        self._watch.note("the cluster has formed")
        process = rig.client_host.spawn_node(self._serve_clients(), name="clients") if self._clients else None
        try:
            await self._act()
            self._heal()
            await self._settle()
            if not self._rules.violations:
                await self._damage_late()
        finally:
            if process is not None:
                process.kill()
            rig.stop_looking()

    async def _act(self) -> None:
        """Carry out the plan."""
        loop = self._rig.loop
        began_s = loop.time()
        clients = {client.number: client for client in self._clients}
        for step in self._plan.steps:
            await _sleep_until(began_s + step.at_ms / 1000)
            if step.kind != "client":
                self._faults.begin(step)
            elif step.client in clients:
                clients[step.client].ask(step)
                self._watch.coverage.count("operation", step.do)
        await _sleep_until(began_s + self._plan.until_ms / 1000)

    def _heal(self) -> None:
        self._watch.note("all faults end")
        self._faults.end_all()
        self._rig.boot_all()

    async def _settle(self) -> None:
        """See the healed cluster make progress and agree."""
        for condition, what in (
            (self._everybody_answered, "all clients were answered"),
            (self._everybody_was_told, "all watchers were told everything"),
            (self._leases_ended, "the leases that nobody keeps alive have ended"),
            (self._rig.agree, "all members applied the same entries"),
        ):
            try:
                await wait_for_condition_with_backoff(condition, what=what, timeout_s=HEAL_S, pause_s_max=0.25)
            except ConditionNotMet as error:
                self._rules.report("liveness", f"{error}; {self._rig.describe()}")
        self._rig.look_at_states()

    async def _damage_late(self) -> None:
        """Let what had no time yet happen to the healed cluster, and see it agree again."""
        try:
            is_any = await self._faults.catch_up(self._write)
        except ConditionNotMet:
            self._rules.report("liveness", f"who was damaged late did not come back; {self._rig.describe()}")
        else:
            if is_any:
                await self._settle()

    def _write(self) -> None:
        """Have the first client write, if it has nothing else to do."""
        if self._clients and self._clients[0].is_idle:
            self._clients[0].ask(Step(at_ms=self._plan.until_ms, do="put", client=1, key="last", value="late"))

    def _everybody_answered(self) -> bool:
        if self._rig.leader() is None or not all(client.is_idle for client in self._clients):
            return False
        return not self._clients or self._probe_done()

    def _everybody_was_told(self) -> bool:
        machine = self._machine()
        return machine is not None and all(client.asides.has_seen(machine.keys.revision) for client in self._clients)

    def _leases_ended(self) -> bool:
        machine = self._machine()
        return machine is not None and not len(machine.leases)

    def _machine(self) -> Any:  # a StoreMachine, or what a test put there
        leader = self._rig.leader()
        return None if leader is None or leader.machine is None else leader.machine.machine

    def _probe_done(self) -> bool:
        """Have the first client write once more, after everything else; say whether that was answered."""
        client = self._clients[0]
        if self._probe_from is None:
            self._probe_from = client.n_answered
        elif client.n_answered > self._probe_from:
            return True
        client.ask(Step(at_ms=self._plan.until_ms, do="put", client=client.number, key="last", value=f"probe{client.n_unknown}"))
        return False

    # -- clients -------------------------------------------------------------------------------------------------------------------------

    async def _serve_clients(self) -> None:
        """Be the clients' process."""
        await asyncio.gather(*(client.run(self._store(client.number)) for client in self._clients))

    def _store(self, number: int) -> StoreClient:
        """Return a client's way to the store: each begins at another node, one that only looks on stays there, even ones may cache."""
        rig = self._rig
        addresses = [TcpAddress(node.host.address, PORT) for node in rig.nodes[: rig.n_first]]
        first = number % len(addresses)
        order = [addresses[first]] if number in self._pinned else addresses[first:] + addresses[:first]
        settings = ClientSettings(cache=None if number % 2 else CacheSettings())
        return StoreClient(rig.client_host.world, order, plaintext=True, settings=settings)

    # -- checks --------------------------------------------------------------------------------------------------------------------------

    def _check_whole(self) -> None:
        """Check what only the whole run shows."""
        finding = check_linearizable(self._history.operations(), Register())
        if finding.verdict is Verdict.VIOLATED:
            self._rules.report("linearizability", finding.explain())
        elif finding.verdict is Verdict.UNDECIDED:
            self._rules.report("linearizability undecided", finding.explain())
        for text in revision_violations([glance for client in self._clients for glance in client.glances])[:1]:
            self._rules.report("revisions", text)
        self._check_asides()
        if not self._rules.violations:
            self._rules.check_replay(lambda: self._tampering.machine(self._rig.client_host.world))

    def _check_asides(self) -> None:
        """Check what was answered beside plain operations. A clock that ran too fast or too slow made ages and leases wrong by as much."""
        asides = [client.asides for client in self._clients]
        if not any(each.reads or each.watched or each.holds for each in asides):
            return
        truth = truth_of(self._rules.batches())
        drift = max((abs(step.amount) / 1e6 for step in self._plan.steps if step.do == "clock_drift"), default=0.0)
        reads = [read for each in asides for read in each.reads]
        acknowledged = [told for each in asides for told in each.acknowledged]
        watched, listed = [one for each in asides for one in each.watched], [one for each in asides for one in each.listed]
        holds = [hold for each in asides for hold in each.holds]
        for rule, found in (
            ("reads", read_violations(reads, truth, acknowledged, drift=drift)),
            ("watches", watch_violations(watched, listed, truth)),
            ("leases", lease_violations(holds, truth, drift=drift)),
        ):
            for text in found[:3]:
                self._rules.report(rule, text)
        count = self._watch.coverage.count
        for read in reads:
            count("aside", f"{read.consistency} read" + (" of known age" if read.age_s is not None else ""))
        for watch in watched:
            count("aside", "change told", sum(len(entries) for _, _, entries in watch.items))
            count("aside", "watch told of forgotten changes" if watch.forgotten_ns else "watch")
        count("aside", "watch resumed", sum(each.n_resumed for each in asides))
        for hold in holds:
            count("aside", "lock held" if hold.excludes else "lease abandoned")

    def _unseen(self, _loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """Note what failed where nobody looked; a process that ended itself inside of a callback did not fail."""
        if isinstance(context.get("exception"), asyncio.CancelledError):
            return
        self._rules.report("no failure unseen", f"{context.get('message')}: {context.get('exception')!r}")

    def _outcome(self) -> Outcome:
        coverage = self._watch.coverage
        for node in self._rig.nodes:
            for name, n_hits in node.host.failpoints.counts().items():
                if n_hits:
                    coverage.count("failpoint", name, n_hits)
        counts = Counts(
            sum(client.n_answered for client in self._clients),
            sum(client.n_unknown for client in self._clients),
            sum(client.n_refused for client in self._clients),
        )
        for client in self._clients:
            for code, n in sorted(client.errors.items()):
                coverage.count("client error", code, n)
        self._watch.hash(self._rig.loop.trace_digest().encode())
        self._watch.hash(repr(self._history.operations()).encode())
        for client in self._clients:
            self._watch.hash(repr((client.asides.reads, client.asides.watched, client.asides.holds)).encode())
        loop = self._rig.loop
        return Outcome(
            self._plan, tuple(self._rules.violations), self._watch.digest(), loop.elapsed_ns / 1e9, loop.n_events, counts, coverage
        )


def _n_clients(plan: Plan) -> int:
    return max((step.client for step in plan.steps), default=0)


def _pinned_clients(plan: Plan) -> dict[int, None]:
    """Return the clients that do nothing but read stale or cached, by odd numbers: each is tied to one node."""
    others = {step.client: None for step in plan.steps if step.do not in ("stale", "cached")}
    return {step.client: None for step in plan.steps if step.do in ("stale", "cached") and step.client % 2 and step.client not in others}


async def _sleep_until(time_s: float) -> None:
    left_s = time_s - asyncio.get_running_loop().time()
    if left_s > 0:
        await asyncio.sleep(left_s)
