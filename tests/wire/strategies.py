"""Message types to hypothesis strategies, so that a type added to the contract is tested without another line."""

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-(1 << 63), (1 << 64) - 1),
    float: st.floats(allow_nan=False),
    str: TEXTS,
    bytes: st.binary(max_size=40),
    type(None): st.none(),
    object: st.none() | st.booleans() | TEXTS | st.lists(st.integers(0, 9), max_size=3),
}


def from_type(kind: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for instances of a type as messages use them.

    Raises:
        TypeError: The type is none of those; add it here.
    """
    if kind in SCALARS:
        return SCALARS[kind]
    if kind is msgspec.Raw:
        return SCALARS[object].map(lambda value: msgspec.Raw(msgspec.msgpack.encode(value)))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return from_struct(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _bounded(arguments[0], arguments[1])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (Union, types.UnionType):
        return st.one_of([from_type(argument) for argument in arguments])
    if origin is tuple:
        return _tuples(arguments)
    if origin is dict:
        return st.dictionaries(from_type(arguments[0]), from_type(arguments[1]), max_size=3)
    raise TypeError(f"no strategy for {kind!r}")


def from_struct(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Return a strategy that fills all fields of a struct."""
    hints = get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: from_type(hints[name]) for name in kind.__struct_fields__})


def _tuples(arguments: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    if len(arguments) == 2 and arguments[1] is ...:
        return st.lists(from_type(arguments[0]), max_size=3).map(tuple)
    return st.tuples(*(from_type(argument) for argument in arguments))


def _bounded(kind: Any, meta: msgspec.Meta) -> st.SearchStrategy[Any]:
    if kind is float and isinstance(meta.ge, int | float) and isinstance(meta.le, int | float):
        return st.floats(meta.ge, meta.le)
    if kind is not int:
        raise TypeError(f"no strategy for a bounded {kind!r}")
    low, high = meta.ge, meta.le
    return st.integers(None if low is None else int(low), None if high is None else int(high))
