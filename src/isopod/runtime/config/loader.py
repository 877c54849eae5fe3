"""ConfigLoader: settings from layers; the last one that speaks wins.

The layers, from the lowest: the schema's defaults, the configuration file, its drop-ins in name order, the environment, flags. Each value
keeps where it came from, and an error names the setting as its user wrote it, the place, and what would fit.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Generic

import msgspec

from isopod.runtime.config.aliases import SEASTAR, Alias
from isopod.runtime.config.files import Search, search, search_disk
from isopod.runtime.config.layers import (
    DEFAULT,
    FileText,
    Names,
    Origin,
    Said,
    cut,
    environment_layer,
    file_layer,
    flag_layer,
    from_text,
    make_names,
)
from isopod.runtime.config.schema import REDACTED, T, flatten, leaves, nest
from isopod.world.disk import Disk
from isopod.world.errors import InvalidArgument

DEFAULT_PREFIX: Final = "ISOPOD"
SEARCH_FOLDERS: Final = ("/etc/isopod",)
SEARCH_NAMES: Final = ("config",)
Check = Callable[[object], object]
_AT: Final = re.compile(r" - at `\$\.?([^`]*)`$")
_MISSING: Final = re.compile(r"missing required field `([^`]+)`")


class ConfigConflict(ValueError):
    """Settings that do not go together; raised by a schema's `__post_init__`.

    Args:
        name: The setting to change, of the Struct that raises.
        why: What is wrong with it.
    """

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name = name
        self.why = why


class Loaded(msgspec.Struct, Generic[T], frozen=True):
    """A configuration, and where each of its values was said."""

    config: T
    origins: Mapping[str, Origin]
    """By key; what is not there is the default."""
    notes: tuple[str, ...] = ()
    """What the user should know, a line each: variables that were passed over or look misspelled."""
    files: tuple[str, ...] = ()
    """The files that were read, in order."""

    def origin(self, key: str) -> Origin:
        """Return where a setting's value came from."""
        return self.origins.get(key, DEFAULT)


class ConfigLoader(Generic[T]):
    """Loads settings of one schema.

    Args:
        schema: A Struct; Structs inside are sections.
        prefix: Of its environment variables: ISOPOD_SMP_NUM_SHARDS.
        aliases: Further variables; those of keys the schema lacks are left out.
        short_sections: Sections whose name is left out of variables and flags.
        checks: What types cannot say, by key: gets a value that fits its type, returns the one to take, raises ValueError.
    """

    def __init__(
        self,
        schema: type[T],
        *,
        prefix: str = DEFAULT_PREFIX,
        aliases: Sequence[Alias] = SEASTAR,
        short_sections: Sequence[str] = (),
        checks: Mapping[str, Check] | None = None,
    ) -> None:
        self.schema: Final = schema
        self.names: Final[Names] = make_names(leaves(schema), prefix=prefix, aliases=aliases, short_sections=short_sections)
        self._prefix = prefix
        self._checks = checks or {}
        self._folders: list[str] = list(SEARCH_FOLDERS)
        self._file_names: list[str] = list(SEARCH_NAMES)

    def add_search_path(self, folder: str) -> None:
        """Look for the file in this folder too, after those known."""
        self._folders.append(folder)

    def add_file_name(self, name: str) -> None:
        """Take a file of this name (without an ending) too, after those known."""
        self._file_names.append(name)

    def search(self, path: str = "", *, folders: Sequence[str] | None = None) -> Search:
        """Return the steps that find the file and its drop-ins (`isopod.runtime.config.files`).

        Args:
            path: The file, if it is known.
            folders: Where to look instead of the search path.
        """
        return search(path, folders=self._folders if folders is None else folders, names=self._file_names)

    async def read(
        self, disk: Disk, path: str = "", *, environment: Mapping[str, str] | None = None, flags: Mapping[str, str] | None = None
    ) -> Loaded[T]:
        """Find the files on a World's disk and load. Raises as `load`, and UsageError for a file that cannot be read."""
        return self.load(files=await search_disk(self.search(path), disk), environment=environment, flags=flags)

    def load(
        self,
        *,
        files: Sequence[FileText] = (),
        environment: Mapping[str, str] | None = None,
        flags: Mapping[str, str] | None = None,
        values: Mapping[str, object] | None = None,
    ) -> Loaded[T]:
        """Return the configuration that the layers make.

        Args:
            files: The configuration files, the later ones win.
            environment: The environment; only this schema's variables are looked at, empty ones count as unset.
            flags: Values by flag ("--smp-num-shards").
            values: Values by key that win over all others: a builder's.

        Raises:
            InvalidArgument: What is no setting, or a value that does not fit, by the name its user gave it.
        """
        said: dict[str, Said] = {}
        checked: dict[str, object] = {}
        from_environment, notes = environment_layer(self.names, environment or {}, self._prefix)
        layers = [
            *(file_layer(self.names, file) for file in files),
            from_environment,
            flag_layer(self.names, flags or {}),
            {key: Said(value, Origin("builder"), False) for key, value in (values or {}).items()},
        ]
        for layer in layers:
            for key, each in layer.items():
                checked[key] = self.check(key, each)  # also what a later layer hides: a wrong value is wrong
            said.update(layer)
        origins = {key: each.origin for key, each in said.items()}
        return Loaded(self._convert(checked, origins), origins, tuple(notes), tuple(file.path for file in files))

    def check(self, key: str, said: Said) -> object:
        """Return a value in its own type.

        Raises:
            InvalidArgument: It does not fit, or there is no such setting.
        """
        leaf = self.names.leaves.get(key)
        if leaf is None:
            raise InvalidArgument("setting", key, "unknown")
        try:
            value = said.value
            if said.is_text and isinstance(value, str):
                value = from_text(leaf, value)
            converted = msgspec.convert(value, leaf.kind, strict=not said.is_text)
            if key in self._checks:
                converted = self._checks[key](converted)
            return msgspec.to_builtins(converted)
        except (msgspec.ValidationError, ValueError, TypeError, RecursionError):
            shown = REDACTED if leaf.is_secret else cut(said.value)
            raise InvalidArgument(said.origin.called(key), shown, f"want {leaf.want}") from None

    async def check_files(self, loaded: Loaded[T], disk: Disk) -> None:
        """Look whether the files that settings name are there (settings with `extra={"file": True}`).

        Raises:
            InvalidArgument: One is not, by the name its user gave it.
        """
        values = flatten(loaded.config)
        for key, leaf in self.names.leaves.items():
            path = values.get(key)
            if leaf.is_file and isinstance(path, str) and await disk.stat(path) is None:
                raise InvalidArgument(loaded.origin(key).called(key), path, "no such file")

    def _convert(self, values: Mapping[str, object], origins: Mapping[str, Origin]) -> T:
        try:
            return msgspec.convert(nest(values), self.schema)
        except msgspec.ValidationError as error:
            text = str(error)
            at = _AT.search(text)
            section = at.group(1) if at else ""
            missing = _MISSING.search(text)
            if missing:
                key = f"{section}.{missing.group(1)}".lstrip(".")
                raise InvalidArgument("setting", key, "missing", f"say it in a file, or as {self._variable(key)}") from None
            if isinstance(error.__cause__, ConfigConflict):
                key = f"{section}.{error.__cause__.name}".lstrip(".")
                shown = values.get(key, self.names.leaves[key].default)
                raise InvalidArgument(origins.get(key, DEFAULT).called(key), shown, error.__cause__.why) from None
            raise InvalidArgument("setting", section, text) from None

    def _variable(self, key: str) -> str:
        return next((variable for variable, each in self.names.variables.items() if each == key), key)
