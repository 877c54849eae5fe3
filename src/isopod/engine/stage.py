"""Stage: what a container needs beside its processes, set before it starts and cleared after it ended.

The overlay on its image, its network, its cgroup and its OCI bundle. `clear` is idempotent and also clears what a killed daemon
left half set, so that every way out of a container passes through it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from isopod.api.messages import Container, Endpoint, Image, Resources
from isopod.engine.bundle import BundlePaths, Confinement, Json, build_config, build_limits
from isopod.engine.images.store import ImageStore
from isopod.engine.layout import Layout
from isopod.engine.network.networks import NONE, Networks, wants_of
from isopod.engine.network.resolve import hosts_text, resolv_text
from isopod.engine.users import ResolvedUser, resolve_user
from isopod.world.errors import from_os_error
from isopod.world.kernel import CgroupFacts
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World

_HOST_RESOLV: Final = "/etc/resolv.conf"


class Stage:
    """Sets and clears the surroundings of containers.

    Args:
        world: The kernel and disk they live on.
        layout: The engine's folders.
        images: Where root file systems come from.
        networks: Where addresses come from.
        cgroup_root: Name of the instance's top control group.
        cgroups: How control groups work here.
        seccomp: The profile of every container, None if the machine has none.
    """

    def __init__(
        self,
        world: World,
        layout: Layout,
        images: ImageStore,
        networks: Networks,
        *,
        cgroup_root: str,
        cgroups: CgroupFacts,
        seccomp: Json | None,
    ) -> None:
        self._world = world
        self._layout = layout
        self._images = images
        self._networks = networks
        self._cgroup_root = cgroup_root
        self._cgroups = cgroups
        self._seccomp = seccomp
        self._encoder = msgspec.json.Encoder()

    def cgroup(self, identifier: str) -> str:
        """Return a container's control group, below each hierarchy's root."""
        return f"/{self._cgroup_root}/{identifier}"

    def check_network(self, network: str) -> None:
        """Check that a network of that name exists. Raises NotFound."""
        self._networks.check(network)

    async def set(self, record: Container, image: Image) -> Container:
        """Mount, connect and write the bundle; return the record with its addresses.

        Raises:
            IsopodError: Nothing is left behind.
        """
        try:
            attaching = self._networks.attach(record.id, record.network.network, wants=wants_of(record))
            # Both come to their end before anything is cleared: what is just being mounted cannot be unmounted.
            mounted, attachment = await asyncio.gather(self._mount(record, image), attaching, return_exceptions=True)
            if isinstance(attachment, BaseException):
                raise attachment
            if isinstance(mounted, BaseException):
                raise mounted
            ready = msgspec.structs.replace(record, network=attachment.endpoint)
            await self._write_bundle(ready, attachment.namespace)
            return ready
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self.clear(record.id)))
            raise

    async def connect(self, record: Container, network: str, process: ProcessIdentity) -> Endpoint:
        """Put a container that runs and is on no network on one: its link, its address, its line in its /etc/hosts.

        Args:
            record: The container.
            network: A bridge network.
            process: Its first process.

        Raises:
            NotFound: No such network.
            Exhausted: The network has no address left.
            UnavailableError: The kernel or a disk failed; nothing is left behind.
        """
        attachment = await self._networks.attach(record.id, network, process, wants=wants_of(record))
        try:
            await self._write_names(record, network, attachment.endpoint.ip_address)
        except BaseException:
            await self._networks.detach(record.id)
            raise
        return attachment.endpoint

    async def disconnect(self, record: Container) -> None:
        """Take a container that runs off its network: its link goes, its loopback stays.

        Raises:
            UnavailableError: The kernel refused, or a disk failed.
        """
        await self._networks.detach(record.id, waits=True)
        await self._write_names(record, NONE, None)

    async def _write_names(self, record: Container, network: str, address: str | None) -> None:
        """Write the files that are mounted over /etc/hosts and /etc/resolv.conf, in their place: who has them open or mounted sees it."""
        bundle = self._layout.bundle(record.id)
        try:
            await self._write(f"{bundle}/hosts", hosts_text(record.hostname, address))
            await self._write(f"{bundle}/resolv.conf", await self._resolv(network))
        except OSError as error:
            raise from_os_error(error, "write the name files of", record.name) from error

    async def _resolv(self, network: str) -> str:
        return resolv_text(await self._host_resolv(), self._networks.nameserver(network))

    def limits(self, resources: Resources) -> Json:
        """Return limits in the runtime's words, for a container that runs."""
        return build_limits(resources, self._cgroups)

    async def clear(self, identifier: str) -> None:
        """Unmount, disconnect, and remove control group and bundle; what is not there is fine."""
        kernel, disk = self._world.kernel, self._world.disk
        bundle = self._layout.bundle(identifier)
        try:
            await asyncio.gather(self._networks.detach(identifier), kernel.unmount(f"{bundle}/rootfs"))
            await kernel.delete_cgroup(self.cgroup(identifier))
            await disk.remove_tree(bundle)
        except OSError as error:
            raise from_os_error(error, "clear away", bundle) from error

    @asynccontextmanager
    async def lend_root(self, record: Container, image: Image) -> AsyncIterator[str]:
        """Mount the root of a container that does not run, and give its folder; what a killed daemon leaves of that, `clear` takes.

        Raises:
            UnavailableError: The kernel or a disk refused.
        """
        try:
            await self._mount(record, image)
            yield f"{self._layout.bundle(record.id)}/rootfs"
        finally:
            await asyncio.shield(asyncio.ensure_future(self.clear(record.id)))

    async def cgroups_present(self) -> list[str]:
        """Return the ids that have a control group of this instance."""
        inventory = await self._world.kernel.inventory(self._cgroup_root, [])
        prefix = f"/{self._cgroup_root}/"
        return [path.removeprefix(prefix) for path in inventory.cgroups if path.startswith(prefix) and "/" not in path.removeprefix(prefix)]

    async def dispose(self) -> None:
        """Remove the instance's top control group, which must be empty."""
        await self._world.kernel.delete_cgroup(f"/{self._cgroup_root}")

    async def user(self, record: Container, user: str) -> ResolvedUser:
        """Look a user up in the mounted root file system of a container."""
        rootfs = f"{self._layout.bundle(record.id)}/rootfs"
        passwd, group = [await self._text(rootfs, path) for path in ("/etc/passwd", "/etc/group")]
        return resolve_user(user, passwd, group)

    async def _mount(self, record: Container, image: Image) -> None:
        disk, bundle = self._world.disk, self._layout.bundle(record.id)
        upper, work = self._layout.upper(record.id), f"{self._layout.container(record.id)}/work"
        try:
            lowers = await self._images.layer_folders(image)
            root = await disk.stat(lowers[0]) if lowers else None
            # The writable layer's own mode is what the container sees as that of "/".
            await disk.make_directory(upper, mode=root.mode & 0o7777 if root is not None else 0o755)
            await disk.make_directory(f"{bundle}/rootfs")
            if record.auto_remove:  # a restart: the kernel mounts no work folder again that a volatile overlay has used
                await disk.remove_tree(work)
            await disk.make_directory(work)
            await self._world.kernel.mount_overlay(
                f"{bundle}/rootfs",
                lowers=lowers,
                upper=upper,
                work=work,
                volatile=record.auto_remove,
            )
        except OSError as error:
            raise from_os_error(error, "mount the root file system of", record.name) from error

    async def _write_bundle(self, record: Container, namespace: str | None) -> None:
        """Write config.json and the files mounted into the container; the stage is set.

        Args:
            record: The container, with its addresses.
            namespace: Path of its network namespace, "" for the host's, None for one of its own with loopback only.
        """
        disk, bundle = self._world.disk, self._layout.bundle(record.id)
        paths = BundlePaths(bundle, f"{bundle}/rootfs", f"{bundle}/hosts", f"{bundle}/hostname", f"{bundle}/resolv.conf")
        confinement = Confinement(
            network_namespace=namespace,
            cgroup=self.cgroup(record.id),
            seccomp=self._seccomp,
            cgroups=self._cgroups,
        )
        config = build_config(record, paths, await self.user(record, record.user), confinement)
        try:
            await self._write(paths.hosts, hosts_text(record.hostname, record.network.ip_address))
            await self._write(paths.hostname, record.hostname + "\n")
            await self._write(paths.resolv_conf, await self._resolv(record.network.network))
            await disk.write(f"{bundle}/config.json", self._encoder.encode(config))
        except OSError as error:
            raise from_os_error(error, "write the bundle of", record.name) from error

    async def _write(self, path: str, text: str) -> None:
        await self._world.disk.write(path, text.encode(), mode=0o644)

    async def _host_resolv(self) -> str:
        disk = self._world.disk
        if await disk.stat(_HOST_RESOLV) is None:
            return ""
        return (await disk.read(_HOST_RESOLV, n_bytes_max=1 << 16)).decode(errors="replace")

    async def _text(self, root: str, path: str) -> str:
        try:
            return (await self._world.disk.read_beneath(root, path)).decode(errors="replace")
        except OSError:  # an image need not have the file, and a strange one counts as none
            return ""
