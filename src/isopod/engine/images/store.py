"""ImageStore: the images of one machine.

Layers are content-addressed and shared (`layers`), image records count by one index (`records`), archives are read by `archive`. Every
operation works in a folder of its own below `tmp`, removed when it ends, well or not; what a kill left there, `open` clears.

Rules: all or nothing: a load, import or commit that fails leaves no image, layer or file behind. An image takes effect, durably, before
its method returns. Mutations of the set of images are serialised by one lock; unpacking is not, and equal layers are unpacked once.
`resolve`, `list` and `hold` never wait: they see the last committed state.
One image, two isolations: `layer_folders` is for containers, `layer_disks` for guests; which form a layer has is `layers`' business.
Not here: registries, save and push (the configurations are kept byte for byte for them).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Literal, NamedTuple

from isopod.api.messages import Image, ImageConfig, Layer, Probed, RemovedImage
from isopod.engine.images.archive import LayerSource, read_archive
from isopod.engine.images.catalog import HINT_LIST, Catalog, Damaged
from isopod.engine.images.config import N_LAYERS_MAX, History, digest_bytes, extend_config, oci_architecture, parse_config, write_config
from isopod.engine.images.failures import disk_failures
from isopod.engine.images.finish import finish
from isopod.engine.images.layers import INDEX, TAR, LayerDisk, LayerRecord, LayerStore, Made, files_of
from isopod.engine.images.mounts import LayerMounts
from isopod.engine.images.names import parse_name
from isopod.engine.images.progress import ImageProgress, Meter
from isopod.engine.images.records import HINT_DAMAGED, ImageRecords
from isopod.engine.images.spool import ByteSource, receive
from isopod.runtime.logger import Logger
from isopod.world.disk import UnpackLimits
from isopod.world.errors import BadRecord, DigestMismatch, InUse, NotFound, UnavailableError, Unsupported
from isopod.world.ids import ImageName, short
from isopod.world.world import World

LayerForm = Literal["auto", "directory", "erofs"]
"""How new layers are kept: as directories, or as files that are mounted; "auto" takes the latter where the machine can."""


class StoreOptions(NamedTuple):
    """What a store is told beside where it lies."""

    limits: UnpackLimits = UnpackLimits()
    """Bounds on what an archive may become."""
    mounts: str = ""
    """The folder of the layers' mount points, the store's own; it need not survive a reboot. "": nothing is mounted."""
    form: LayerForm = "auto"


class _Operation(NamedTuple):
    """One load, import or commit under way."""

    folder: str
    """Its own, for temporary files."""
    pins: list[str]
    """The layers it has pinned."""


class _NewImage(NamedTuple):
    image: Image
    config_json: bytes


class ImageStore:
    """The images in one folder; one store per folder. Use `open`.

    Args:
        world: Where they lie.
        folder: The store's own.
        logger: Told one line per finished operation.
        options: Limits, and how layers are kept.
    """

    def __init__(self, world: World, folder: str, *, logger: Logger, options: StoreOptions) -> None:
        self._world = world
        self._disk = world.disk
        self._folder = folder
        self._tmp = f"{folder}/tmp"  # noqa: S108 - the store's own
        self._logger = logger
        self._limits = options.limits
        self._form = options.form
        self._mounts = LayerMounts(world, options.mounts) if options.mounts else None
        self._layer_form = Probed(value="directory", why="no folder for mounts was given")
        self._architecture = oci_architecture(world.kernel.host_facts().architecture)
        self._records = ImageRecords(world.disk, folder)
        self._layers = LayerStore(
            world.disk,
            f"{folder}/layers",
            tmp=self._tmp,
            is_needed=self._is_needed,
            limits=options.limits,
            mounts=self._mounts,
            logger=logger,
        )
        self._catalog = Catalog({})
        self._n_holds: dict[str, int] = {}
        self._commit_lock = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        world: World,
        folder: str,
        *,
        logger: Logger,
        options: StoreOptions = StoreOptions(),  # noqa: B008 - immutable
    ) -> "ImageStore":
        """Open the store, made if missing; clear what a kill left half done, set damaged records aside, find out how to keep layers.

        Raises:
            DiskFull, KernelError: The disk refused.
            Unsupported: Layers are to be mounted, and this machine cannot.
        """
        store = cls(world, folder, logger=logger, options=options)
        with disk_failures("open", folder):
            await store._load()
        return store

    # --- asking -------------------------------------------------------------------------------------------------------

    def resolve(self, name: str) -> Image:
        """Return the image a user means.

        Args:
            name: A full id, NAME[:TAG], or the unambiguous beginning of an id; in this order.

        Raises:
            NotFound: There is none.
            InvalidArgument: No name and no id, or the beginning of several ids.
            BadRecord: The image is known, but its record was damaged.
        """
        return self._catalog.find(name)

    def list(self) -> Sequence[Image]:
        """Return all images, newest first."""
        return self._catalog.newest_first()

    @property
    def layer_form(self) -> Probed:
        """How new layers are kept ("erofs" or "directory"), and why so."""
        return self._layer_form

    async def layer_folders(self, image: Image) -> Sequence[str]:
        """Return the folders to lay over each other, the topmost first; layers kept as files are mounted for it.

        A layer that stands twice in an image comes once, where it is topmost: overlayfs refuses it twice, and what it says below is hidden.

        Raises:
            BadRecord: A layer was damaged; loading the image again mends it.
            DiskFull, KernelError: The kernel or a disk refused.
        """
        with disk_failures("mount the layers of", short(image.id)):
            return [await self._layers.folder(diff_id) for diff_id in _from_the_top(image)]

    async def layer_disks(self, image: Image) -> tuple[LayerDisk, ...]:
        """Return the files that a guest gets as read-only disks, the topmost layer first; made first for layers that are directories.

        Raises:
            BadRecord: A layer was damaged; loading the image again mends it.
            Unsupported: A layer cannot be kept as files.
            DiskFull, KernelError: A disk refused.
        """
        with disk_failures("make disks of the layers of", short(image.id)):
            return tuple([await self._layers.files(diff_id) for diff_id in _from_the_top(image)])

    async def unmount(self) -> None:
        """Unmount all layers: nothing runs, and nothing is begun any more.

        Raises:
            KernelError: The kernel refused.
        """
        with disk_failures("unmount the layers in", self._folder):
            await self._layers.unmount()

    @contextmanager
    def hold(self, image_id: str) -> Iterator[None]:
        """Keep an image from being removed, while a container is made of it.

        Raises:
            NotFound: It is gone already.
        """
        if image_id not in self._catalog.images:
            raise NotFound("image", short(image_id), HINT_LIST)
        self._n_holds[image_id] = self._n_holds.get(image_id, 0) + 1
        try:
            yield
        finally:
            self._n_holds[image_id] -= 1
            if not self._n_holds[image_id]:
                del self._n_holds[image_id]

    # --- making -------------------------------------------------------------------------------------------------------

    async def import_rootfs(
        self, name: str, source: ByteSource, *, command: tuple[str, ...] = (), progress: ImageProgress | None = None
    ) -> Image:
        """Make a one-layer image of a root file system.

        Args:
            name: NAME[:TAG]; one that is taken moves to the new image.
            source: A tar, plain or compressed by gzip or zstd.
            command: What its containers run.
            progress: Told how far it is.

        Raises:
            InvalidArgument: Not a name.
            BadArchive: The tar is unsafe, damaged or over a limit; the entry is named.
            DiskFull, KernelError: The disk refused.
        """
        full_name = parse_name(name)
        async with self._operation() as operation:
            spool = f"{operation.folder}/rootfs"
            meter = Meter(self._world.clock, progress, "receive")
            n_bytes = await receive(source, self._disk, spool, limits=self._limits, meter=meter, expand=False)
            meter = Meter(self._world.clock, progress, "unpack", total_bytes=n_bytes)
            made = await self._unpack(operation, spool, meter)
            layer = await self._take(operation, made)
            meter.advance(n_bytes)
            meter.end()
            now_ns = self._world.clock.now_ns()
            history = History(now_ns, "isopod import")
            config_json = write_config(self._architecture, ImageConfig(command=command), layer.diff_id, history)
            return (await self._add([self._new_image(config_json, [full_name], now_ns)], "image.imported"))[0]

    async def load(self, source: ByteSource, *, progress: ImageProgress | None = None) -> Sequence[Image]:
        """Take all images of an archive.

        Args:
            source: A docker-archive or OCI layout tar, plain or compressed by gzip or zstd. Names that are taken move.
            progress: Told how far it is.

        Returns:
            The images, in the archive's order.

        Raises:
            BadArchive: The archive or a layer in it is unsafe, damaged or over a limit; file or entry is named.
            DigestMismatch: A file in it is not what its digest says.
            Unsupported: Made for another platform, or of a media type not known here.
            DiskFull, KernelError: The disk refused.
        """
        async with self._operation() as operation:
            spool = f"{operation.folder}/archive"
            meter = Meter(self._world.clock, progress, "receive")
            await receive(source, self._disk, spool, limits=self._limits, meter=meter, expand=True)
            images = await read_archive(self._disk, spool, self._architecture)
            total_bytes = sum(layer.n_bytes for image in images for layer in image.layers)
            meter = Meter(self._world.clock, progress, "unpack", total_bytes=total_bytes)
            for image in images:
                for layer in image.layers:
                    await self._take_from(operation, spool, layer, meter=meter)
            meter.end()
            now_ns = self._world.clock.now_ns()
            return await self._add([self._new_image(image.config_json, image.names, now_ns) for image in images], "image.loaded")

    async def commit(self, name: str, base: Image, upper: str, config: ImageConfig) -> Image:
        """Make an image of a container's changes.

        Args:
            name: NAME[:TAG]; one that is taken moves to the new image.
            base: What the container was made of.
            upper: Its writable layer, in overlayfs form; it must not change meanwhile.
            config: What the new image says about its containers.

        Raises:
            InvalidArgument: Not a name.
            NotFound: `base` is gone.
            Unsupported: One layer too many.
            DiskFull, KernelError: The disk refused.
        """
        full_name = parse_name(name)
        if len(base.layers) >= N_LAYERS_MAX:
            raise Unsupported(f"an image of more than {N_LAYERS_MAX} layers", f"{short(base.id)} has that many")
        with self.hold(base.id):
            async with self._operation() as operation:
                spool = f"{operation.folder}/layer"
                with disk_failures("pack", upper):
                    base_json = await self._records.config_json(base.id)
                    packed = await self._disk.pack_layer(upper, spool)
                made = await self._unpack(operation, spool, Meter(self._world.clock, None, "unpack"))
                _verify("the packed layer", packed.diff_id, made.unpacked.diff_id)
                await self._take(operation, made)
                now_ns = self._world.clock.now_ns()
                config_json = extend_config(base_json, config, packed.diff_id, History(now_ns, "isopod commit"))
                return (await self._add([self._new_image(config_json, [full_name], now_ns)], "image.committed"))[0]

    async def remove(self, name: str, *, used_by: Callable[[str], str | None]) -> RemovedImage:
        """Drop a name; with its last one, or by its id, the image goes, and the layers that only it needed. A damaged image goes at once.

        Args:
            name: As for `resolve`. By id only an image of at most one name.
            used_by: Names a container that needs the image of an id, or None.

        Raises:
            NotFound, InvalidArgument: As for `resolve`.
            InUse: A container needs the image, one is being made of it, or it has several names and was given by its id.
            DiskFull, KernelError: The disk refused; the image is still there.
        """
        async with self._commit_lock:
            damaged = self._catalog.find_damaged(name)
            if damaged is not None:
                self._check_unused(damaged, used_by)
                await finish(self._delete(damaged, ()))
                return RemovedImage(untagged=damaged.names[0] if damaged.names else "", deleted=damaged.id)
            image, named = self._catalog.find(name), self._catalog.meant_name(name)
            if len(image.names) > 1:
                if not named:
                    raise InUse(
                        "image", short(image.id), f"the names {', '.join(image.names)}", "remove it by its names, one after the other"
                    )
                await finish(self._replace(self._catalog.without_name(image.id, named)))
                return RemovedImage(untagged=named)
            self._check_unused(image, used_by)
            await finish(self._delete(image, [layer.diff_id for layer in image.layers]))
            return RemovedImage(untagged=image.names[0] if image.names else "", deleted=image.id)

    # --- opening ------------------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        await self._disk.make_directory(self._tmp)
        for name in await self._disk.list(self._tmp):
            await self._disk.remove_tree(f"{self._tmp}/{name}")
            self._logger.info("image.leftover_cleared", path=f"{self._tmp}/{name}")
        catalog, index_error = await self._records.load()
        layer_errors = await self._layers.load()
        self._catalog = self._without_broken(catalog)
        for error in (index_error, *layer_errors, *[each.error for each in self._catalog.damaged.values()]):
            if error is not None:
                self._logger.error("image.record_damaged", why=str(error))
        if index_error is not None:
            await self._records.put_index(self._catalog.index())
        if not self._catalog.damaged:
            await self._layers.clear_unneeded()
        self._layer_form = await self._choose_form()
        self._logger.info(
            "image.store_opened",
            folder=self._folder,
            n_images=len(self._catalog.images),
            n_damaged=len(self._catalog.damaged),
            layers=self._layer_form.value,
            why=self._layer_form.why,
        )

    async def _choose_form(self) -> Probed:
        found = self._layer_form
        if self._mounts is not None and (self._form != "directory" or self._layers.has_kind("erofs")):
            found = await self._mounts.probe(f"{self._tmp}/probe")
            self._layers.can_mount = found.value == "erofs"
        if self._form == "erofs" and found.value != self._form:
            raise Unsupported("keeping layers as files that are mounted", found.why, "leave the choice of the layers' form to the probe")
        return Probed(value="directory", why="it was chosen") if self._form == "directory" else found

    def _without_broken(self, catalog: Catalog) -> Catalog:
        """Return the catalog in which images count as damaged whose layers are not all here."""
        damaged = dict(catalog.damaged)
        for image in catalog.images.values():
            missing = next((layer.diff_id for layer in image.layers if self._layers.find(layer.diff_id) is None), None)
            if missing:
                error = BadRecord(image.id, f"its layer {short(missing)} is missing", HINT_DAMAGED)
                damaged[image.id] = Damaged(image.id, image.names, error)
        return Catalog({key: image for key, image in catalog.images.items() if key not in damaged}, damaged)

    # --- the set of images --------------------------------------------------------------------------------------------

    def _is_needed(self, diff_id: str) -> bool:
        return self._catalog.needs(diff_id)

    def _check_unused(self, image: Image | Damaged, used_by: Callable[[str], str | None]) -> None:
        name, user = image.names[0] if image.names else short(image.id), used_by(image.id)
        if user is not None:
            raise InUse("image", name, f"container {user}", f"remove it first: isopod rm {user}")
        if image.id in self._n_holds:
            raise InUse("image", name, "an operation under way", "try again when it has ended")

    async def _add(self, new: Sequence[_NewImage], event: str) -> Sequence[Image]:
        """Let images take effect, all or none, their names taken from whoever has them."""
        async with self._commit_lock:
            with disk_failures("record an image in", self._folder):
                await finish(self._commit_new(new))
            added = [self._catalog.images[identifier] for identifier in dict.fromkeys(each.image.id for each in new)]
        for image in added:
            self._logger.info(event, image=image.id, names=image.names, n_layers=len(image.layers), size_bytes=image.size_bytes)
        return added

    async def _commit_new(self, new: Sequence[_NewImage]) -> None:
        catalog = self._catalog.with_images(each.image for each in new)
        fresh = [each for each in new if each.image.id not in self._catalog.images]
        try:
            for each in fresh:
                await self._records.put(each.image, each.config_json)
            await self._records.put_index(catalog.index())
        except OSError:
            for each in fresh:
                await self._records.remove(each.image.id)
            raise
        self._catalog = catalog

    async def _replace(self, catalog: Catalog) -> None:
        """Commit fewer images or names. Seen at once, so that no container is made of what goes; taken back if the disk refuses."""
        before, self._catalog = self._catalog, catalog
        try:
            with disk_failures("write the index in", self._folder):
                await self._records.put_index(catalog.index())
        except UnavailableError:
            self._catalog = before
            raise

    async def _delete(self, image: Image | Damaged, diff_ids: Sequence[str]) -> None:
        await self._replace(self._catalog.without(image.id))
        self._logger.info("image.removed", image=image.id, names=image.names)
        try:
            with disk_failures("clear", self._folder):
                await self._records.remove(image.id)
            await self._layers.collect(diff_ids)
        except UnavailableError as error:  # the image is gone; its files wait for the next start
            self._logger.warning("image.files_left", image=image.id, why=str(error))

    def _new_image(self, config_json: bytes, names: Sequence[ImageName], now_ns: int) -> _NewImage:
        """Describe an image whose layers are all here."""
        parsed = parse_config(config_json, "configuration")
        layers = []
        for diff_id, created_by in zip(parsed.diff_ids, parsed.created_by, strict=True):
            layer = self._layers.find(diff_id)
            if layer is None:
                raise NotFound("layer", diff_id)
            layers.append(
                Layer(diff_id=diff_id, unpacked_bytes=layer.unpacked_bytes, n_entries=layer.n_entries, created_by=created_by[:4096])
            )
        image = Image(
            id=digest_bytes(config_json),
            names=tuple(names),
            created_at_ns=now_ns if parsed.created_at_ns is None else parsed.created_at_ns,
            architecture=parsed.architecture or self._architecture,
            size_bytes=sum({layer.diff_id: layer.unpacked_bytes for layer in layers}.values()),
            layers=tuple(layers),
            config=parsed.config,
        )
        return _NewImage(image, config_json)

    # --- one operation ------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _operation(self) -> AsyncIterator[_Operation]:
        """Give an operation its folder; at its end remove it, and the layers that came to nothing."""
        operation = _Operation(f"{self._tmp}/{self._world.random.token_hex(8)}", [])
        try:
            with disk_failures("make", operation.folder):
                await self._disk.make_directory(operation.folder)
            yield operation
        finally:
            await finish(self._clear(operation))

    async def _clear(self, operation: _Operation) -> None:
        try:
            with disk_failures("clear", operation.folder):
                await self._disk.remove_tree(operation.folder)
            await self._layers.release(operation.pins)
        except UnavailableError as error:  # must not hide why the operation failed; the next start clears it
            self._logger.warning("image.files_left", path=operation.folder, why=str(error))

    async def _take_from(self, operation: _Operation, spool: str, source: LayerSource, *, meter: Meter) -> None:
        """Bring a layer of an archive into the store, unless it is there."""

        async def make() -> Made:
            made = await self._unpack(operation, spool, meter, source)
            if source.blob_digest:
                _verify(f"layer {source.file}", source.blob_digest, made.unpacked.blob_digest)
            _verify(f"layer {source.file}", source.diff_id, made.unpacked.diff_id)
            return made

        await self._layers.acquire(source.diff_id, make)
        operation.pins.append(source.diff_id)
        meter.advance(source.n_bytes)

    async def _take(self, operation: _Operation, made: Made) -> LayerRecord:
        """Bring an unpacked layer into the store, unless an equal one is there."""

        async def make() -> Made:
            return made

        layer = await self._layers.acquire(made.unpacked.diff_id, make)
        operation.pins.append(layer.diff_id)
        return layer

    async def _unpack(self, operation: _Operation, spool: str, meter: Meter, source: LayerSource | None = None) -> Made:
        """Bring a layer into the form in which new ones are kept here, or into a directory if that form cannot say it."""
        path = f"{operation.folder}/{self._world.random.token_hex(4)}"
        offset, n_bytes = (source.offset, source.n_bytes) if source else (0, None)
        with disk_failures("unpack a layer into", self._folder):
            if self._layer_form.value == "erofs":
                try:
                    indexed = await self._disk.index_layer(
                        spool,
                        path + TAR,
                        path + INDEX,
                        offset=offset,
                        n_bytes=n_bytes,
                        limits=self._limits,
                        progress=meter.within_threadsafe,
                    )
                    return Made(path, indexed.layer, files_of(indexed))
                except Unsupported as error:
                    self._logger.info("layer.kept_as_directory", why=str(error))
            unpacked = await self._disk.unpack_layer(
                spool, path, offset=offset, n_bytes=n_bytes, limits=self._limits, progress=meter.within_threadsafe
            )
        return Made(path, unpacked)


def _from_the_top(image: Image) -> list[str]:
    return list(dict.fromkeys(layer.diff_id for layer in reversed(image.layers)))


def _verify(what: str, wanted: str, found: str) -> None:
    if wanted != found:
        raise DigestMismatch(what, wanted, found)
