"""Layers of settings: what a file, the environment or the flags say, by key, each with where it was said.

Pure: texts, variables and flags come as arguments. What is not a setting is refused here, with the nearest one there is; whether a value
fits is the loader's to say, once it is known which layer won.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

from isopod.runtime.config.aliases import Alias
from isopod.runtime.config.schema import Leaf
from isopod.runtime.config.texts import DEPTH_MAX, parse
from isopod.world.errors import InvalidArgument

LayerKind = Literal["default", "file", "drop-in", "environment", "flag", "builder"]
SHOWN_CHARS_MAX: Final = 120
_TRUE: Final = ("true", "1", "yes", "on")
_FALSE: Final = ("false", "0", "no", "off")


class Origin(NamedTuple):
    """Where a value was said: the layer, and the file, variable or flag."""

    layer: LayerKind
    place: str = ""

    def called(self, key: str) -> str:
        """Return a setting as its user wrote it: "pool_size in /etc/x.toml", "ISOPOD_POOL_SIZE", "--pool-size"."""
        return f"{key} in {self.place}" if self.layer in ("file", "drop-in") else self.place or key

    def __str__(self) -> str:
        return f"{self.layer} {self.place}".rstrip()


DEFAULT: Final = Origin("default")


class Said(NamedTuple):
    """A value as it was said. `is_text`: from a place that knows only texts, where "3" is a number."""

    value: object
    origin: Origin
    is_text: bool


class FileText(NamedTuple):
    """A configuration file that was read."""

    path: str
    text: str
    layer: LayerKind = "file"


class Names(NamedTuple):
    """What the settings of a schema are called in each layer."""

    leaves: Mapping[str, Leaf]
    variables: Mapping[str, str]
    """Environment variable to key."""
    flags: Mapping[str, str]
    aliases: Sequence[Alias]


def make_names(leaves: Sequence[Leaf], *, prefix: str, aliases: Sequence[Alias], short_sections: Sequence[str] = ()) -> Names:
    """Return the names of a schema's settings.

    Args:
        leaves: Its settings.
        prefix: Of variables: "ISOPOD".
        aliases: Other variables; those of keys the schema lacks are left out.
        short_sections: Sections whose name is left out of variables and flags.

    Raises:
        ValueError: Two settings get the same name.
    """
    by_key = {leaf.key: leaf for leaf in leaves}
    variables: dict[str, str] = {}
    flags: dict[str, str] = {}
    for key, leaf in by_key.items():
        section, _, name = key.partition(".")
        words = (name if section in short_sections else key).replace(".", "_")
        variable, flag = f"{prefix}_{words.upper()}", leaf.flag or "--" + words.replace("_", "-")
        if variable in variables:
            raise ValueError(f"{key} and {variables[variable]} are both called {variable}")
        if flag in flags:
            raise ValueError(f"{key} and {flags[flag]} are both called {flag}")
        variables[variable] = flags[flag] = key
    return Names(by_key, variables, flags, tuple(alias for alias in aliases if alias.key in by_key))


def file_layer(names: Names, file: FileText) -> dict[str, Said]:
    """Return what a file says.

    Raises:
        InvalidArgument: It cannot be parsed, or has a key that is no setting.
    """
    found: dict[str, Said] = {}
    sections = {key.rpartition(".")[0] for key in names.leaves if "." in key}
    sections |= {".".join(name.split(".")[: i + 1]) for name in sections for i in range(name.count("."))}
    _walk(parse(file.text, file.path), "", (names, frozenset(sections), file), found)
    return found


def _walk(table: Mapping[str, object], prefix: str, about: tuple[Names, frozenset[str], FileText], found: dict[str, Said]) -> None:
    names, sections, file = about
    for name, value in table.items():
        key = f"{prefix}{name}"
        if key in names.leaves:
            found[key] = Said(value, Origin(file.layer, file.path), False)
        elif key in sections:
            if not isinstance(value, dict) or key.count(".") >= DEPTH_MAX or not all(isinstance(each, str) for each in value):
                raise InvalidArgument(f"{key} in {file.path}", cut(value), f"want a table: [{key}]")
            _walk(value, f"{key}.", about, found)
        else:
            here = [each for each in (*names.leaves, *sorted(sections)) if each.startswith(prefix)]
            raise InvalidArgument(f"key in {file.path}", cut(key), "unknown", nearest(key, (*names.leaves, *sorted(sections)), here))


def environment_layer(names: Names, environment: Mapping[str, str], prefix: str) -> tuple[dict[str, Said], list[str]]:
    """Return what the environment says, and notes about what it seems to say. Empty variables count as unset."""
    found: dict[str, Said] = {}
    notes: list[str] = []
    for alias in names.aliases:
        text = environment.get(alias.variable, "")
        if text:
            _take_alias(names, alias, text, environment, found=found, notes=notes)
    for variable, key in names.variables.items():
        text = environment.get(variable, "")
        if text:
            found[key] = Said(text, Origin("environment", variable), True)
    for variable in sorted(environment):
        if variable.startswith(f"{prefix}_") and variable not in names.variables:
            close = difflib.get_close_matches(variable, names.variables, 1, 0.85)
            if close:
                notes.append(f"{variable} is no setting and is not looked at: did you mean {close[0]}?")
    return found, notes


def _take_alias(names: Names, alias: Alias, text: str, environment: Mapping[str, str], *, found: dict[str, Said], notes: list[str]) -> None:
    own = next(variable for variable, key in names.variables.items() if key == alias.key)
    if environment.get(own):
        notes.append(f"{alias.variable} is passed over: {own} is set")
    elif alias.key in found:
        notes.append(f"{alias.variable} is passed over: {found[alias.key].origin.place} is set")
    else:
        found[alias.key] = Said(alias.words.get(text.lower(), text), Origin("environment", alias.variable), True)


def flag_layer(names: Names, flags: Mapping[str, str]) -> dict[str, Said]:
    """Return what the flags say.

    Raises:
        InvalidArgument: An unknown or an empty flag.
    """
    found: dict[str, Said] = {}
    for flag, text in flags.items():
        if flag not in names.flags:
            close = difflib.get_close_matches(flag, names.flags, 1)
            raise InvalidArgument("flag", flag, "unknown", f"did you mean {close[0]}?" if close else "see --help")
        if not text:
            raise InvalidArgument(flag, text, "must not be empty")
        found[names.flags[flag]] = Said(text, Origin("flag", flag), True)
    return found


def from_text(leaf: Leaf, text: str) -> object:
    """Return what a text of a variable or flag stands for: lists are separated by commas or JSON, tables are JSON.

    Raises:
        ValueError: It is not of the form.
    """
    if leaf.is_flag:
        lowered = text.strip().lower()
        if lowered in _TRUE:
            return True
        if lowered in _FALSE:
            return False
        raise ValueError(text)
    if leaf.is_table or (leaf.is_list and text.lstrip().startswith("[")):
        return json.loads(text)
    if leaf.is_list:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def cut(value: object) -> str:
    """Return a value as an error shows it: not more than a line of it."""
    text = " ".join(str(value).split("\n"))
    return text if len(text) <= SHOWN_CHARS_MAX else text[:SHOWN_CHARS_MAX] + "..."


def nearest(key: str, known: Iterable[str], here: Sequence[str]) -> str:
    """Return a hint naming what `key` was probably meant to be, else what there is."""
    known = list(known)
    close = difflib.get_close_matches(key, known, 1)
    if not close:  # the right name in the wrong section
        close = [each for each in known if each.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    return f"did you mean {close[0]}?" if close else f"known are: {', '.join(here or known)}"
