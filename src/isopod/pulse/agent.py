"""PulseAgent: one agent on a World: the parts of pulse, joined, and kept running.

::

    roots --Discovery--> Collector --ShimClient--> Intake --> Store --> PulseServer
    runtime --CriSource----> pods -----------------^
    isopod node --LocalSource--> pods, containers -^            Store --> Pusher

The same class runs on the host and in the simulation. Each part that goes on by itself is begun again when it fails, later each time it
does so soon, and counted: none of them ends the agent.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final

from isopod.pulse.cadvisor import cadvisor_labels
from isopod.pulse.collector import DURATION_BOUNDS_S, Collector
from isopod.pulse.cri import CriSource
from isopod.pulse.discovery import Discovery
from isopod.pulse.intake import Intake, is_converted
from isopod.pulse.local import LocalSource
from isopod.pulse.model import Families, Pod, Root, Target
from isopod.pulse.own import Durations, Facts
from isopod.pulse.policy import PolicyFile
from isopod.pulse.resource import resource
from isopod.pulse.server import PulseServer
from isopod.pulse.settings import PulseSettings
from isopod.pulse.shims import ShimClient
from isopod.pulse.store import Store
from isopod.runtime.logger import Logger
from isopod.runtime.scheduling import SchedulingGroup
from isopod.world.world import World

if TYPE_CHECKING:
    from isopod.pulse.push import Pusher

PAUSE_FIRST_S: Final = 0.5
PAUSE_MAX_S: Final = 30.0
COLLECT: Final = SchedulingGroup("collect", 200)
"""What goes on by itself: scrapes come first, however many answers of shims are to be read."""
STEADY_S: Final = 60.0
"""A part that went on for so long did not fail because of how it was begun."""


class PulseAgent:
    """Start it once, and stop it.

    Args:
        world: Where it runs.
        settings: What it is told.
        logger: Where it reports.
        pods: Whose sandboxes are, as far as that is known before anybody is asked.
        origins: Who gave the settings that are no defaults, by name.
    """

    def __init__(
        self,
        world: World,
        settings: PulseSettings,
        logger: Logger,
        *,
        pods: Mapping[str, Pod] | None = None,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        self._world = world
        self._settings = settings
        self._logger = logger
        self._loop = asyncio.get_running_loop()
        self.store = Store(
            self._loop.time,
            keep_rounds=settings.keep_rounds,
            container_labels=cadvisor_labels,
            resource=resource,
            epoch=world.random.token_hex(4),
        )
        self._intake = Intake(self.store, settings, clock=world.clock, now=self._loop.time, logger=logger)
        self._client = ShimClient(world, settings)
        self._collector = Collector(world, settings, self._client, accept=self._intake.accept, reject=self._intake.reject, logger=logger)
        roots = (Root(settings.go_root, "go"), Root(settings.rust_root, "rust"))
        self._discovery = Discovery(
            world, roots, on_found=self._found, on_gone=self._gone, logger=logger, sandboxes_max=settings.sandboxes_max
        )
        self._pods: dict[str, Mapping[str, Pod]] = {"given": pods or {}}
        has_stats = bool(settings.runtime_endpoint) and is_converted(settings) and "containers" not in settings.cadvisor_without
        if has_stats:
            self._intake.converter.await_stats()
        self._cri = (
            CriSource(
                world,
                settings.runtime_endpoint,
                pod_labels=settings.pod_labels,
                pod_annotations=settings.pod_annotations,
                on_pods=lambda pods: self.describe("cri", pods),
                on_stats=self._intake.take_stats if has_stats else None,
                stats_interval_s=settings.interval_s,
                is_shown=lambda identifier: self.store.get(identifier) is not None,
                logger=logger,
            )
            if settings.runtime_endpoint
            else None
        )
        self._local = (
            LocalSource(
                world,
                settings.node_socket,
                on_pods=lambda pods: self.describe("isopod", pods),
                on_containers=self._intake.local,
                logger=logger,
                pod_labels=settings.pod_labels,
            )
            if settings.node_socket
            else None
        )
        self._policy = (
            PolicyFile(world.disk, settings.policy_file, on_change=self._intake.adopt, clock=world.clock, logger=logger)
            if settings.policy_file
            else None
        )
        self.n_failures: dict[str, int] = {}
        """How often each part failed."""
        self._keeping: list[asyncio.Task[None]] = []
        self._server = PulseServer(
            world,
            settings,
            self.store,
            self._client,
            facts=self._facts,
            attend=self._collector.attend,
            policy=self._policy,
            origins=origins,
            logger=logger,
        )
        self._pusher = self._make_pusher() if settings.push_url else None

    async def start(self) -> str:
        """Serve, and begin to watch and to ask.

        Returns:
            Where it serves.

        Raises:
            IsopodError: It cannot be served there, or its files for TLS or its policy cannot be used.
        """
        if self._policy is not None:
            await self._policy.open()
        if self._pusher is not None:
            await self._pusher.open()
        address = await self._server.start()
        parts: dict[str, Callable[[], Awaitable[None]]] = {"discovery": self._discovery.run, "collector": self._collector.run}
        if self._cri is not None:
            parts["cri"] = self._cri.run
        if self._local is not None:
            parts["node"] = self._local.run
        if self._policy is not None:
            parts["policy"] = self._policy.follow
        if self._pusher is not None:
            parts["push"] = self._pusher.run
        self.n_failures = dict.fromkeys(parts, 0)
        self._keeping = [
            self._loop.create_task(self.keep(name, part), name=f"pulse {name}", context=COLLECT.context()) for name, part in parts.items()
        ]
        self._logger.info(
            "pulse.ready",
            address=address,
            roots=[self._settings.go_root, self._settings.rust_root],
            runtime_endpoint=self._settings.runtime_endpoint or "none",
            interval_s=self._settings.interval_s,
            log_level=self._settings.log_level,
        )
        return address

    async def stop(self) -> None:
        """Let answers end, then close everything."""
        await self._server.stop()
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await self._client.close()
        if self._pusher is not None:
            await self._pusher.close()

    def reload(self) -> None:
        """Read the policy again."""
        if self._policy is not None:
            self._policy.ask()

    def describe(self, source: str, pods: Mapping[str, Pod]) -> None:
        """Take in whose sandboxes are. What is known of others stays.

        Args:
            source: Who says so.
            pods: All that it knows, by the ids of sandboxes.
        """
        self._pods[source] = pods
        for entry in self.store.entries():
            pod = pods.get(entry.id)
            if pod is not None and self._intake.describe(entry.id, pod) and entry.socket:
                self._collector.refresh(entry.id)

    async def keep(self, name: str, part: Callable[[], Awaitable[None]]) -> None:
        """Have a part go on until cancelled: begun again whenever it ends, later each time it does so soon.

        Args:
            name: The part.
            part: Goes on by itself.
        """
        pause_s = PAUSE_FIRST_S
        while True:
            begun_s = self._loop.time()
            why = "it ended by itself"
            try:
                await part()
            except Exception as error:  # noqa: BLE001  the root of a task: whatever it is, the agent goes on
                why = f"{type(error).__name__}: {error}"
            self.n_failures[name] += 1
            pause_s = PAUSE_FIRST_S if self._loop.time() - begun_s >= STEADY_S else min(PAUSE_MAX_S, pause_s * 2)
            self._logger.error("pulse.part_failed", part=name, why=why, again_in_s=pause_s)
            await asyncio.sleep(pause_s)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _facts(self) -> Facts:
        """Return what the parts say of themselves now."""
        found, asked = self._discovery.statistics(), self._collector.statistics()
        runtime = None if self._cri is None else self._cri.statistics()
        roots = self._discovery.available()
        if self._local is not None:
            roots[self._settings.node_socket] = self._local.statistics().state == "known"
        return Facts(
            roots=roots,
            rows=lambda: self._intake.converter.rates.rows(self.store.entries(), self._loop.time()),
            requests=asked.requests,
            durations=Durations(DURATION_BOUNDS_S, asked.durations, asked.durations_sum_s),
            n_in_flight=asked.n_in_flight,
            n_overflows=found.n_overflows,
            n_refused=found.n_refused,
            cri_calls={} if runtime is None else {"ok": runtime.n_rounds, "error": runtime.n_failed},
            cri_stats={} if runtime is None else {"ok": runtime.stats.n_rounds, "error": runtime.stats.n_failed},
            cri_up=None if runtime is None else runtime.state == "known",
            stages_s={"read": self._intake.read_s},
            failures=self.n_failures,
            push=None if self._pusher is None else self._pusher.statistics(),
            merged=None if self.store.merged is None else self.store.merged.statistics(),
        )

    def _make_pusher(self) -> "Pusher":
        from isopod.pulse.push import Pusher  # noqa: PLC0415  only an agent that pushes pays for what packs

        def own() -> Families:
            return self._server.own.families(self._facts(), strict=self._settings.strict_compat)

        return Pusher(self._world, self._settings, self.store, own=own, logger=self._logger)

    def _found(self, target: Target) -> None:
        self._intake.hand_over(target.id)
        self.store.add(target)
        pod = next((pods[target.id] for pods in self._pods.values() if target.id in pods), None)
        if pod is not None:
            self._intake.describe(target.id, pod)
        elif self._cri is not None:
            self._cri.wake()
        self._collector.add(target)

    def _gone(self, identifier: str) -> None:
        self._collector.remove(identifier)
        self._intake.forget(identifier)
        self.store.remove(identifier)
