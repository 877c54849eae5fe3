"""Catalog: which images there are and what they are called, as one immutable value.

Pure: every change is a new catalog, so the store can write one durably before (or take it back after) it becomes the present one.
A name points to one image at most; an image may have any number of names, also none. Damaged images are known by id and names too, so
that who asks for one learns what happened to it, until it is removed or loaded again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from isopod.api.messages import Image
from isopod.engine.images.names import parse_full_id, parse_id_prefix, parse_name
from isopod.world.errors import BadRecord, InvalidArgument, NotFound

HINT_LIST: Final = "`isopod images` lists what is there"


class Damaged(NamedTuple):
    """An image that should be here, and why it cannot be used."""

    id: str
    names: tuple[str, ...]
    error: BadRecord


class Catalog:
    """A set of images.

    Args:
        images: By id.
        damaged: By id; those that are among `images` are mended and no longer count, names that are taken again neither.
    """

    __slots__ = ("_by_name", "damaged", "images")

    def __init__(self, images: Mapping[str, Image], damaged: Mapping[str, Damaged] | None = None) -> None:
        self.images: Final = dict(images)
        self._by_name: Final = {name: image.id for image in images.values() for name in image.names}
        self.damaged: Final = {
            key: each._replace(names=tuple(name for name in each.names if name not in self._by_name))
            for key, each in (damaged or {}).items()
            if key not in self.images
        }

    def find(self, text: str) -> Image:
        """Return the image a user means: by full id, NAME[:TAG], or the unambiguous beginning of an id, in this order.

        Raises:
            NotFound: There is none.
            InvalidArgument: Neither name nor id, or the beginning of several ids.
            BadRecord: The image is known, but was damaged.
        """
        name = _name_or_empty(text)
        identifier = parse_full_id(text) or self._by_name.get(name) or self._find_by_prefix(text)
        image = self.images.get(identifier)
        if image is not None:
            return image
        damaged = self.find_damaged(text)
        raise damaged.error if damaged else NotFound("image", text, HINT_LIST)

    def find_damaged(self, text: str) -> Damaged | None:
        """Return the damaged image a user means, by full id or NAME[:TAG]."""
        name, identifier = _name_or_empty(text), parse_full_id(text)
        return next((each for each in self.damaged.values() if each.id == identifier or name in each.names), None)

    def meant_name(self, text: str) -> str:
        """Return the NAME:TAG by which `text` finds its image, "" if it is an id."""
        name = _name_or_empty(text)
        return name if name in self._by_name and parse_full_id(text) is None else ""

    def needs(self, diff_id: str) -> bool:
        """Return whether an image needs a layer. While one is damaged all are needed: nobody knows which were its own."""
        return bool(self.damaged) or any(layer.diff_id == diff_id for image in self.images.values() for layer in image.layers)

    def newest_first(self) -> list[Image]:
        """Return all images; of the same age by id."""
        return sorted(self.images.values(), key=lambda image: (-image.created_at_ns, image.id))

    def with_images(self, new: Iterable[Image]) -> "Catalog":
        """Return a catalog with more images. Their names are taken from whoever has them; one that is here keeps its record and names."""
        images = dict(self.images)
        for image in new:
            for other in list(images.values()):
                if other.id != image.id:
                    images[other.id] = _named(other, [name for name in other.names if name not in image.names])
            known = images.get(image.id, image)
            images[image.id] = _named(known, [*known.names, *image.names])
        return Catalog(images, self.damaged)

    def without_name(self, identifier: str, name: str) -> "Catalog":
        """Return a catalog in which an image has lost a name."""
        image = self.images[identifier]
        return Catalog({**self.images, identifier: _named(image, [other for other in image.names if other != name])}, self.damaged)

    def without(self, identifier: str) -> "Catalog":
        """Return a catalog without an image, whole or damaged."""
        images = {key: image for key, image in self.images.items() if key != identifier}
        return Catalog(images, {key: each for key, each in self.damaged.items() if key != identifier})

    def index(self) -> dict[str, tuple[str, ...]]:
        """Return the names of each image by its id, damaged ones included."""
        known = {key: image.names for key, image in self.images.items()}
        return {**known, **{key: each.names for key, each in self.damaged.items()}}

    def _find_by_prefix(self, text: str) -> str:
        prefix = parse_id_prefix(text)
        found = [identifier for identifier in self.images if prefix and identifier.startswith(prefix)]
        if len(found) > 1:
            raise InvalidArgument("image id", text, f"{len(found)} images begin so", "give more of its digits")
        return found[0] if found else ""


def _name_or_empty(text: str) -> str:
    return "" if parse_full_id(text) or text.startswith("sha256:") else parse_name(text)


def _named(image: Image, names: Sequence[str]) -> Image:
    unique = tuple(dict.fromkeys(names))
    return image if unique == image.names else msgspec.structs.replace(image, names=unique)
