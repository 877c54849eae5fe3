"""A schema of settings: a tree of msgspec Structs seen as a flat list of keys ("smp.num_shards"), each with its names and its meaning.

Any tree of frozen, keyword-only Structs is a schema: a Struct inside is a section, everything else a setting. What a type cannot say
stands in its annotation::

    port: Annotated[int, Meta(ge=1, le=65535, description="where it listens", extra={"live": True})] = 8080

`description` is help; `extra` may say `live` (a reload applies it), `want` (what fits, in words), `file` (it must exist), `secret`
(its value is not shown), `hides_query` (of a URL what stands behind "?" is not shown), `flag` (the flag, if it is not the one that
follows from the key).
"""

import types
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec

T = TypeVar("T", bound=msgspec.Struct)

REDACTED: Final = "[redacted]"
_WORDS: Final[Mapping[object, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    bytes: "base64",
    list: "a list",
    tuple: "a list",
    dict: "a table",
}


class Leaf(NamedTuple):
    """One setting of a schema."""

    key: str
    """Sections and name, dotted."""
    kind: Any  # the annotation, for msgspec.convert
    default: object
    help: str
    want: str
    is_live: bool
    is_file: bool
    is_secret: bool
    flag: str = ""
    """Its flag, "" for the one that follows from its key."""
    hides_query: bool = False
    """Whether it is a URL of which what stands behind the question mark is not shown."""

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return any(get_origin(kind) in (list, tuple) or kind in (list, tuple) for kind in _alternatives(self.kind))

    @property
    def is_table(self) -> bool:
        """Whether it takes names with values."""
        return any(get_origin(kind) is dict or kind is dict for kind in _alternatives(self.kind))

    @property
    def is_flag(self) -> bool:
        """Whether it is true or false."""
        return bool in _alternatives(self.kind)


def leaves(schema: type[msgspec.Struct], prefix: str = "") -> tuple[Leaf, ...]:
    """Return the settings of a schema, in its order."""
    found: list[Leaf] = []
    for field in msgspec.structs.fields(schema):
        section = section_of(field.type)
        key = f"{prefix}{field.encode_name}"
        if section is not None:
            found.extend(leaves(section, f"{key}."))
            continue
        found.append(_leaf(key, field))
    return tuple(found)


def sections(schema: type[msgspec.Struct], prefix: str = "") -> tuple[str, ...]:
    """Return the dotted names of a schema's sections."""
    found: list[str] = []
    for field in msgspec.structs.fields(schema):
        section = section_of(field.type)
        if section is not None:
            found += [f"{prefix}{field.encode_name}", *sections(section, f"{prefix}{field.encode_name}.")]
    return tuple(found)


def section_of(kind: Any) -> type[msgspec.Struct] | None:  # an annotation
    """Return the Struct behind an annotation, None if it is a plain setting."""
    for each in _alternatives(kind):
        if isinstance(each, type) and issubclass(each, msgspec.Struct):
            return each
    return None


def flatten(config: msgspec.Struct, prefix: str = "") -> dict[str, object]:
    """Return a configuration's values by key. A section that is not there gives no keys."""
    found: dict[str, object] = {}
    for field in msgspec.structs.fields(config):
        value = getattr(config, field.name)
        key = f"{prefix}{field.encode_name}"
        if isinstance(value, msgspec.Struct):
            found.update(flatten(value, f"{key}."))
        elif section_of(field.type) is None:
            found[key] = value
    return found


def nest(values: Mapping[str, object]) -> dict[str, object]:
    """Return values by dotted key as nested tables."""
    tree: dict[str, object] = {}
    for key, value in values.items():
        *path, name = key.split(".")
        table: dict[str, Any] = tree  # of tables and values
        for part in path:
            table = table.setdefault(part, {})
        table[name] = value
    return tree


def rebuild(schema: type[T], values: Mapping[str, object]) -> T:
    """Return the configuration of these values, which fit already."""
    return msgspec.convert(nest({key: msgspec.to_builtins(value) for key, value in values.items()}), schema)


def _leaf(key: str, field: msgspec.structs.FieldInfo) -> Leaf:
    extra, help_text = _notes(field.type)
    default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
    if default is msgspec.NODEFAULT:
        default = None
    want = str(extra.get("want") or describe(field.type))
    return Leaf(
        key,
        field.type,
        default,
        help_text,
        want,
        bool(extra.get("live")),
        bool(extra.get("file")),
        bool(extra.get("secret")),
        str(extra.get("flag") or ""),
        bool(extra.get("hides_query")),
    )


def _notes(kind: Any) -> tuple[dict[str, object], str]:  # an annotation
    """Return what the Metas of an annotation say beside limits: extra, and description."""
    extra: dict[str, object] = {}
    help_text = ""
    if get_origin(kind) is Annotated:
        inner, *metas = get_args(kind)
        extra, help_text = _notes(inner)
        for meta in metas:
            if isinstance(meta, msgspec.Meta):
                extra |= meta.extra or {}
                help_text = meta.description or help_text
    elif _is_union(kind):
        for each in get_args(kind):
            inner_extra, inner_help = _notes(each)
            extra |= inner_extra
            help_text = inner_help or help_text
    return extra, help_text


def describe(kind: Any) -> str:  # an annotation
    """Return in words what fits a type: "a whole number from 1 to 1024"."""
    if get_origin(kind) is Annotated:
        inner, *metas = get_args(kind)
        return describe(inner) + "".join(_limits(meta) for meta in metas if isinstance(meta, msgspec.Meta))
    if get_origin(kind) is Literal:
        return _choice([str(value) for value in get_args(kind)])
    if _is_union(kind):
        return " or ".join(describe(each) for each in get_args(kind) if each is not type(None))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _choice([str(member.value) for member in kind])
    return _WORDS.get(get_origin(kind) or kind, "another value")


def _limits(meta: msgspec.Meta) -> str:
    low = meta.ge if meta.ge is not None else meta.gt
    high = meta.le if meta.le is not None else meta.lt
    words = ""
    if low is not None and high is not None:
        words = f" {'from' if meta.gt is None else 'above'} {low:g} {'to' if meta.lt is None else 'and below'} {high:g}"
    elif low is not None:
        words = f" of at least {low:g}" if meta.gt is None else f" above {low:g}"
    elif high is not None:
        words = f" of at most {high:g}" if meta.lt is None else f" below {high:g}"
    if meta.min_length:
        words += ", not empty"
    if meta.max_length is not None:
        words += f", at most {meta.max_length} long"
    if meta.pattern:
        words += f" like {meta.pattern}"
    return words


def _choice(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _alternatives(kind: Any) -> tuple[Any, ...]:  # annotations
    """Return the types of an annotation without its Metas and without None."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if _is_union(kind):
        return tuple(found for each in get_args(kind) for found in _alternatives(each) if found is not type(None))
    return (kind,)


def _is_union(kind: Any) -> bool:  # an annotation
    return get_origin(kind) in (Union, types.UnionType)
