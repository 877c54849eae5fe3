"""A run: a cluster on simulated machines, a plan carried out on it, and everything that must hold checked.

Three phases:

1. safety: the cluster forms; then clients ask and faults happen as the plan says. Nothing needs to make progress, nothing may go wrong.
2. healing: all faults end, all nodes run.
3. liveness: within `HEAL_S` a leader is known, every client is answered, a new write succeeds, and all members have applied the same
   entries and hold the same state.

At the end: the clients' history is linearizable, and every state is what the entries make of nothing, also by way of a snapshot.

A run is a function of its plan (and of the code): equal plans give equal digests, in any process.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from isopod.api.store.client import StoreClient
from isopod.cluster.raft.settings import RaftSettings
from isopod.testing.clients import Client, revision_violations
from isopod.testing.faults import Faults
from isopod.testing.history import History
from isopod.testing.linearize import Verdict, check_linearizable
from isopod.testing.observe import Watch
from isopod.testing.outcome import Counts, Outcome
from isopod.testing.plan import Plan, Step
from isopod.testing.rig import PORT, Rig, Tampering
from isopod.testing.scenarios import scenario
from isopod.testing.specifications import Register
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
        self._clients = [Client(number + 1, self._history) for number in range(_n_clients(plan))]
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
            (self._rig.agree, "all members applied the same entries"),
        ):
            try:
                await wait_for_condition_with_backoff(condition, what=what, timeout_s=HEAL_S, pause_s_max=0.25)
            except ConditionNotMet as error:
                self._rules.report("liveness", f"{error}; {self._rig.describe()}")
        self._rig.look_at_states()

    def _everybody_answered(self) -> bool:
        if self._rig.leader() is None or not all(client.is_idle for client in self._clients):
            return False
        return not self._clients or self._probe_done()

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
        addresses = [TcpAddress(node.host.address, PORT) for node in self._rig.nodes]
        world = self._rig.client_host.world
        orders = [addresses[client.number % len(addresses) :] + addresses[: client.number % len(addresses)] for client in self._clients]
        stores = [StoreClient(world, order, plaintext=True) for order in orders]
        await asyncio.gather(*(client.run(store) for client, store in zip(self._clients, stores, strict=True)))

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
        if not self._rules.violations:
            self._rules.check_replay(lambda: self._tampering.machine(self._rig.client_host.world))

    def _unseen(self, _loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """Note what failed where nobody looked."""
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
        loop = self._rig.loop
        return Outcome(
            self._plan, tuple(self._rules.violations), self._watch.digest(), loop.elapsed_ns / 1e9, loop.n_events, counts, coverage
        )


def _n_clients(plan: Plan) -> int:
    return max((step.client for step in plan.steps), default=0)


async def _sleep_until(time_s: float) -> None:
    left_s = time_s - asyncio.get_running_loop().time()
    if left_s > 0:
        await asyncio.sleep(left_s)
