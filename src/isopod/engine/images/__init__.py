"""Images: the store, and the formats it reads."""

from isopod.engine.images.store import ImageStore

__all__ = ["ImageStore"]
