"""A configuration as text: every setting, its value, and on request where it was said. Secrets are not shown."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import msgspec

from isopod.runtime.config.layers import DEFAULT, Origin
from isopod.runtime.config.schema import REDACTED, Leaf, flatten, leaves

ShowFormat = Literal["table", "json", "toml"]
_GAP: Final = "  "


class ShownSetting(msgspec.Struct, frozen=True):
    """One line of `isopod config show --origin --format json`."""

    key: str
    value: object
    layer: str
    place: str


class _Placed(NamedTuple):
    section: str
    name: str
    value: object
    origin: Origin

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}".lstrip(".")

    def shown(self) -> ShownSetting:
        return ShownSetting(self.key, self.value, self.origin.layer, self.origin.place)


def show(config: msgspec.Struct, origins: Mapping[str, Origin], *, form: ShowFormat = "table", with_origin: bool = False) -> str:
    """Return a configuration as text.

    Args:
        config: All of it is shown; sections that are not there are left out.
        origins: By key; what is not there is the default.
        form: How.
        with_origin: Say where each value came from.
    """
    settings = _settings(config, origins)
    if form == "toml":
        return _toml(settings, with_origin=with_origin)
    if form == "json":
        body: object = [each.shown() for each in settings] if with_origin else _tree(settings)
        return msgspec.json.format(msgspec.json.encode(body), indent=2).decode() + "\n"
    rows = [("SETTING", "VALUE", "ORIGIN")]
    rows += [(each.key, "-" if each.value is None else _json(each.value), str(each.origin)) for each in settings]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{key.ljust(widths[0])}{_GAP}{value.ljust(widths[1])}{_GAP}{origin if with_origin else ''}" for key, value, origin in rows]
    return "".join(line.rstrip() + "\n" for line in lines)


def _settings(config: msgspec.Struct, origins: Mapping[str, Origin]) -> list[_Placed]:
    """Return all settings; a table of free names gives one for each name in it."""
    values = flatten(config)
    found: list[_Placed] = []
    for leaf in leaves(type(config)):
        if leaf.key not in values:  # its section is not there
            continue
        value = values[leaf.key]
        if isinstance(value, dict):
            for name, each in value.items():
                origin = origins.get(f"{leaf.key}.{name}") or origins.get(leaf.key, DEFAULT)
                found.append(_Placed(leaf.key, str(name), _shown(leaf, each), origin))
        else:
            head, _, name = leaf.key.rpartition(".")
            found.append(_Placed(head, name, _shown(leaf, value), origins.get(leaf.key, DEFAULT)))
    return found


def _shown(leaf: Leaf, value: object) -> object:
    if leaf.is_secret and value is not None:
        return REDACTED
    if leaf.hides_query and isinstance(value, str) and "?" in value:
        return f"{value.partition('?')[0]}?..."
    return msgspec.to_builtins(value)


def _tree(settings: Sequence[_Placed]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for each in settings:
        table: Any = tree  # of tables and values
        for part in each.section.split(".") if each.section else ():
            table = table.setdefault(part, {})
        table[each.name] = each.value
    return tree


def _toml(settings: Sequence[_Placed], *, with_origin: bool) -> str:
    """Return TOML that loads to the same settings; None has no form in it and is left out."""
    lines: list[str] = []
    section = ""
    # Settings at the top stand before the first section, or they would belong to it.
    for each in sorted(settings, key=lambda setting: setting.section != ""):
        if each.value is None:
            continue
        if each.section != section:
            section = each.section
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        note = f"  # {each.origin}" if with_origin else ""
        lines.append(f"{_toml_key(each.name)} = {_toml_value(each.value)}{note}")
    return "".join(line + "\n" for line in lines)


def _toml_key(name: str) -> str:
    return name if name and name.isascii() and name.replace("_", "").replace("-", "").isalnum() else _json(name)


def _toml_value(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(str(name))} = {_toml_value(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return _json(value)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
