"""From a file's text to tables: TOML, YAML and JSON, told apart by the file's ending.

Rules: a key that stands twice is refused in all three; so are more than 64 YAML aliases, more than 16384 YAML values after those aliases
stand for what they name (a few nested ones can stand for gigabytes), and whatever YAML would make objects of. PyYAML is imported when the
first YAML file is read.
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
_VALUES_MAX: Final = 1 << 14
"""A second's work for PyYAML."""


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
    table: dict[str, object] = {}
    for name, value in pairs:
        if name in table:
            raise _TwiceError(f"the key {name!r} stands twice")
        table[name] = value
    return table


def _refuse_constant(word: str) -> object:
    raise ValueError(f"{word} is no number")


def _yaml(text: str) -> object:
    import yaml  # noqa: PLC0415  30 ms that only readers of YAML pay

    class Loader(yaml.SafeLoader):
        """The safe loader, which also refuses keys that stand twice, and too many aliases and values."""

        n_aliases = 0

        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.n_values: dict[yaml.Node, int] = {}
            """How many values each node stands for, itself included."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                self.n_aliases += 1
                if self.n_aliases > _ALIASES_MAX:
                    raise ValueError(f"more than {_ALIASES_MAX} aliases")
            node = super().compose_node(parent, index)
            if node is not None and node not in self.n_values:
                within = () if isinstance(node, yaml.ScalarNode) else node.value
                children = [child for each in within for child in (each if isinstance(each, tuple) else (each,))]
                # A node that contains itself is not counted yet: whatever it is in is refused by the schema.
                self.n_values[node] = 1 + sum(self.n_values.get(child, 1) for child in children)
                if self.n_values[node] > _VALUES_MAX or len(self.n_values) > _VALUES_MAX:
                    raise ValueError(f"more than {_VALUES_MAX} values")
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                    continue
                if key.value in seen:
                    raise _TwiceError(f"the key {key.value!r} stands twice (line {key.start_mark.line + 1})")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        loader = Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # Not only its own: PyYAML's constructors trip over values that belie their tag (!!bool 'perhaps').
        raise ValueError(str(error)) from None


def _one_line(error: ValueError) -> str:
    return " ".join(str(error).split())
