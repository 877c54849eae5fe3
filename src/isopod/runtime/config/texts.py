"""From a file's text to tables: TOML, YAML and JSON, told apart by the file's ending.

Rules: a key that stands twice is refused in all three; so are more than 64 YAML aliases (a few nested ones can stand for gigabytes) and
whatever YAML would make objects of. PyYAML is imported when the first YAML file is read.
"""

import json
import tomllib
from collections.abc import Hashable
from typing import Any, Final

from isopod.world.errors import InvalidArgument

FORMATS: Final = ("toml", "yaml", "yml", "json")
TEXT_BYTES_MAX: Final = 1 << 20
DEPTH_MAX: Final = 32
_ALIASES_MAX: Final = 64


class _TwiceError(ValueError):
    """A key stands twice."""


def parse(text: str, file_name: str) -> dict[str, object]:
    """Return the tables of a configuration file; a name that ends in none of the known ways is TOML.

    Args:
        text: Its contents.
        file_name: For the format, and for errors.

    Raises:
        InvalidArgument: It is not of its format, a key stands twice, or it is no table.
    """
    ending = file_name.rpartition(".")[2].lower()
    if len(text) > TEXT_BYTES_MAX:
        raise InvalidArgument("config file", file_name, f"larger than {TEXT_BYTES_MAX >> 20} MiB")
    try:
        if ending in ("yaml", "yml"):
            return _table(_yaml(text), file_name)
        if ending == "json":
            return _table(json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant) if text.strip() else {}, file_name)
        return tomllib.loads(text)
    except _TwiceError as error:
        raise InvalidArgument("config file", file_name, str(error)) from None
    except RecursionError:
        raise InvalidArgument("config file", file_name, "nested too deeply") from None
    except ValueError as error:
        kind = {"yaml": "YAML", "yml": "YAML", "json": "JSON"}.get(ending, "TOML")
        raise InvalidArgument("config file", file_name, f"not {kind}: {_one_line(error)}") from None


def _table(value: object, file_name: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InvalidArgument("config file", file_name, "want a table of settings")
    return value


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return table


def _refuse_constant(word: str) -> object:
    raise ValueError(f"{word} is no number")


def _yaml(text: str) -> object:
    import yaml  # noqa: PLC0415  30 ms that only readers of YAML pay

    class Loader(yaml.SafeLoader):
        """The safe loader, which also refuses keys that stand twice and too many aliases."""

        n_aliases = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                self.n_aliases += 1
                if self.n_aliases > _ALIASES_MAX:
                    raise ValueError(f"more than {_ALIASES_MAX} aliases")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen: list[str] = []
            for key, _ in node.value:
                if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                    raise _TwiceError(f"the key {key.value!r} stands twice (line {key.start_mark.line + 1})")
                seen.append(key.value)
            return super().construct_mapping(node, deep)

    try:
        loader = Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _one_line(error: ValueError) -> str:
    return " ".join(str(error).split())
