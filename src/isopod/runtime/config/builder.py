"""ConfigBuilder: a configuration made in code, checked like one from files.

::

    config = ConfigBuilder(RuntimeConfig).smp(num_shards=2).logging(level="debug").build()

Each section of the schema is a method; `set` takes any key. What was set wins over files and environment given to `build`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Self

from isopod.runtime.config.layers import FileText, nearest
from isopod.runtime.config.loader import ConfigLoader
from isopod.runtime.config.schema import T, sections
from isopod.world.errors import InvalidArgument


class ConfigBuilder(Generic[T]):
    """Collects settings of one schema.

    Args:
        schema: A Struct, or the loader of one.
    """

    def __init__(self, schema: type[T] | ConfigLoader[T]) -> None:
        self._loader = schema if isinstance(schema, ConfigLoader) else ConfigLoader(schema)
        self._sections = sections(self._loader.schema)
        self._values: dict[str, object] = {}

    def set(self, key: str, value: object) -> Self:
        """Set one setting by its dotted key.

        Raises:
            InvalidArgument: There is no such setting.
        """
        if key not in self._loader.names.leaves:
            raise InvalidArgument("setting", key, "unknown", nearest(key, self._loader.names.leaves, []))
        self._values[key] = value
        return self

    def section(self, name: str, /, **values: object) -> Self:
        """Set several settings of one section ("metrics.http_server"). Raises as `set`."""
        for key, value in values.items():
            self.set(f"{name}.{key}", value)
        return self

    def __getattr__(self, name: str) -> Callable[..., Self]:
        """Return the method of a section: `builder.smp(num_shards=2)`."""
        if name not in self._sections:
            raise AttributeError(f"{type(self).__name__} has no section {name!r}")
        return lambda **values: self.section(name, **values)

    def build(self, *, files: Sequence[FileText] = (), environment: Mapping[str, str] | None = None) -> T:
        """Return the configuration.

        Args:
            files: Layers below what was set.
            environment: Likewise, above the files.

        Raises:
            InvalidArgument: A value does not fit, or a required one is missing.
        """
        return self._loader.load(files=files, environment=environment, values=self._values).config
