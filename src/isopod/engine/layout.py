"""Layout: where the engine keeps the parts of each container, derived from the table of paths."""

from collections.abc import Mapping
from typing import Final, NamedTuple

from isopod.engine.supervisor import SupervisorPaths
from isopod.world.errors import InvalidArgument

_IN_METADATA: Final = (("wal", "current.wal"), ("archive", "archive"), ("snapshots", "snapshots"))


class Layout(NamedTuple):
    """The engine's folders. Those below `run_root` need not survive a reboot."""

    root: str
    run_root: str
    images: str
    containers: str
    networks: str
    metadata: str
    """The records: journal, archive, snapshots."""

    @classmethod
    def of(cls, paths: Mapping[str, str]) -> "Layout":
        """Derive the layout from resolved paths (`isopod.world.paths.resolve`).

        Raises:
            InvalidArgument: A part of the records' journal is to lie elsewhere than in its folder.
        """
        for name, place in _IN_METADATA:
            if paths[name] != f"{paths['metadata']}/{place}":
                hint = f"leave --{name} out, or move all of it with --metadata"
                raise InvalidArgument(f"path {name}", paths[name], f"the journal's parts lie together in {paths['metadata']}", hint)
        return cls(
            root=paths["root"],
            run_root=paths["run_root"],
            images=paths["images"],
            containers=paths["containers"],
            networks=paths["networks"],
            metadata=paths["metadata"],
        )

    @property
    def namespaces(self) -> str:
        """Pinned network namespaces."""
        return f"{self.run_root}/netns"

    @property
    def layers(self) -> str:
        """Where layers that are kept as files are mounted."""
        return f"{self.run_root}/layers"

    @property
    def bundles(self) -> str:
        """OCI bundles, one folder per container that runs."""
        return f"{self.run_root}/bundles"

    @property
    def supervisor(self) -> SupervisorPaths:
        """The supervisors' folders."""
        return SupervisorPaths(bundles=self.bundles, exits=f"{self.run_root}/exits", runtime_state=f"{self.run_root}/runtime")

    def bundle(self, identifier: str) -> str:
        """The OCI bundle of one container."""
        return f"{self.bundles}/{identifier}"

    def container(self, identifier: str) -> str:
        """The durable folder of one container."""
        return f"{self.containers}/{identifier}"

    def upper(self, identifier: str) -> str:
        """A container's writable layer."""
        return f"{self.container(identifier)}/upper"

    def log(self, identifier: str) -> str:
        """What a container wrote, in the k8s log format."""
        return f"{self.container(identifier)}/container.log"
