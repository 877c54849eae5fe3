"""Usage: lists of containers by what they are and what they use, and what all of them add up to.

Use is measured when it is asked for, from each control group; only what runs can be measured.
"""

from collections.abc import Sequence

from isopod.api.messages import Container, ListContainers, StorageSums, SystemUsage
from isopod.api.usage import ContainerUsage, StatsRequest
from isopod.engine import queries
from isopod.engine.containers import Containers
from isopod.engine.images.store import ImageStore
from isopod.engine.layout import Layout
from isopod.engine.metadata import MetadataStore
from isopod.engine.states import LIVE
from isopod.world.errors import from_os_error
from isopod.world.kernel import CgroupFigures, CgroupUsage
from isopod.world.world import World


class Usage:
    """Answers questions about a node's containers.

    Args:
        world: Its kernel and disk are asked.
        store: The records.
        containers: Finds them by name.
        layout: The engine's folders.
        images: What images take.
    """

    def __init__(self, world: World, store: MetadataStore, containers: Containers, *, layout: Layout, images: ImageStore) -> None:
        self._world = world
        self._store = store
        self._containers = containers
        self._layout = layout
        self._images = images

    def list(self, request: ListContainers) -> "list[Container]":
        """Return the containers that pass the filters, sorted and limited as asked. Raises InvalidArgument."""
        return queries.select(self._containers.list(all_states=True), request, self.measure)

    def stats(self, request: StatsRequest) -> Sequence[ContainerUsage]:
        """Return what the named containers use now, all that run if none is named. Raises NotFound."""
        if request.names:
            records = [self._containers.get(name) for name in request.names]
        else:
            records = sorted(self._containers.list(all_states=False), key=lambda record: record.name)
        wanted = self.figures if request.figures else _nothing
        return [queries.usage_of(record, self.measure(record), wanted(record)) for record in records]

    async def total(self) -> SystemUsage:
        """Add it all up.

        Raises:
            UnavailableError: The disk failed.
        """
        records = self._containers.list(all_states=True)
        running = [record for record in records if record.status in LIVE]
        return SystemUsage(
            containers=len(records),
            by_status=queries.by_status(records),
            limits_running=queries.sum_limits(running),
            limits_all=queries.sum_limits(records),
            measured=queries.sum_usage([self.measure(record) for record in running]),
            storage=await self._storage(),
        )

    def measure(self, record: Container) -> CgroupUsage:
        """Return what a container uses now."""
        if record.status not in LIVE:
            return queries.NOT_MEASURED
        try:
            return self._containers.isolation(record).usage(record)
        except (OSError, ValueError):  # it is just ending
            return queries.NOT_MEASURED

    def figures(self, record: Container) -> CgroupFigures | None:
        """Return more of what a container uses now, None if it does not run."""
        if record.status not in LIVE:
            return None
        try:
            return self._containers.isolation(record).figures(record)
        except (OSError, ValueError):  # it is just ending
            return None

    async def _storage(self) -> StorageSums:
        disk, layout = self._world.disk, self._layout
        try:
            return StorageSums(
                images_bytes=sum(image.size_bytes for image in self._images.list()),
                containers_bytes=await disk.tree_bytes(layout.containers),
                metadata_bytes=await disk.tree_bytes(layout.metadata),
                free_bytes=await disk.free_bytes(layout.root),
            )
        except OSError as error:
            raise from_os_error(error, "measure", layout.root) from error


def _nothing(_: Container) -> None:
    """Measure nothing more."""
