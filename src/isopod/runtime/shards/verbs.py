"""Verbs: what a shard can be asked to do, as typed functions by name.

Two ways to make them. A table, as for RPC: `smp.serve({METHOD: handler})` with `isopod.wire.service.Method`. Or a class for `Sharded`,
whose methods that are marked `@verb` take one request (or none) and say the types of request and reply in their annotations.

A handler is a plain function (the fast path: it runs at once, without a task) or a coroutine function. Requests and replies are anything
that msgspec packs; they are copied between shards, never shared.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeVar, get_type_hints

import msgspec

from isopod.runtime.shards.messages import ENCODER
from isopod.wire.service import Method
from isopod.world.errors import InvalidArgument

F = TypeVar("F", bound=Callable[..., Any])
Handler = Callable[..., Any]
"""`handler(request) -> reply` or `async def handler(request) -> reply`, with the types of its method."""
AnyMethod = Method[Any, Any]

_MARK: Final = "__isopod_verb__"


def verb(function: F) -> F:
    """Mark a method of a class that `Sharded` runs, so that other shards can call it.

    It takes `self` and at most one more argument, and is annotated: `async def add(self, request: Add) -> Total`.
    """
    setattr(function, _MARK, True)
    return function


class Verb:
    """A handler with what packs and unpacks its messages."""

    __slots__ = ("decode_request", "function", "is_async", "name", "takes_request")

    def __init__(self, name: str, function: Handler, request: Any, *, takes_request: bool = True) -> None:
        self.name = name
        self.function = function
        self.takes_request = takes_request
        self.is_async = inspect.iscoroutinefunction(function)
        self.decode_request = msgspec.msgpack.Decoder(request).decode


class Signature(NamedTuple):
    """A marked method's name and types. `request` is None for one that takes nothing."""

    name: str
    request: Any  # a type, or a union of types
    reply: Any
    takes_request: bool


def signatures(cls: type) -> Mapping[str, Signature]:
    """Return the marked methods of a class by name, in the order of their definition, those of base classes first.

    Raises:
        InvalidArgument: One of them takes more than a request, or lacks annotations.
    """
    found: dict[str, Signature] = {}
    for base in reversed(cls.__mro__):
        for name, function in vars(base).items():
            if getattr(function, _MARK, False):
                found[name] = _signature(cls, name, function)
    return found


def check_packs(what: str, value: object) -> bytes:
    """Return a value packed.

    Raises:
        InvalidArgument: It cannot be sent to another shard.
    """
    try:
        return ENCODER.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidArgument(what, type(value).__name__, f"it cannot be packed: {error}") from error


def decode_arguments(cls: type, packed: msgspec.Raw | bytes) -> list[Any]:
    """Return a constructor's positional arguments, each of the type that the constructor's annotations say, where they say one.

    Raises:
        InvalidArgument: They do not fit.
    """
    hints = _hints(getattr(cls, "__init__"))  # noqa: B009 - a class's own, not an instance's
    names = list(inspect.signature(cls).parameters)
    try:
        raw = msgspec.msgpack.decode(packed, type=list[msgspec.Raw])
        types = [hints.get(name, Any) for name in names[: len(raw)]] + [Any] * max(0, len(raw) - len(names))
        return [msgspec.msgpack.decode(each, type=kind) for each, kind in zip(raw, types, strict=True)]
    except (msgspec.MsgspecError, ValueError, TypeError) as error:
        raise InvalidArgument("arguments of", cls.__name__, str(error)) from error


def _signature(cls: type, name: str, function: Handler) -> Signature:
    where = f"{cls.__name__}.{name}"
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if len(parameters) > 1:
        raise InvalidArgument("verb", where, "it takes more than one request", "put them into one struct")
    hints = _hints(function)
    wanted = [parameter.name for parameter in parameters] + ["return"]
    missing = [each for each in wanted if each not in hints]
    if missing:
        raise InvalidArgument("verb", where, f"no annotation for {missing[0]}", "annotate the request and the reply")
    request = hints[parameters[0].name] if parameters else None
    return Signature(name, request, hints["return"], bool(parameters))


def _hints(function: Any) -> dict[str, Any]:  # of any callable
    try:
        return get_type_hints(function)
    except NameError as error:
        raise InvalidArgument("annotations of", getattr(function, "__qualname__", function), str(error)) from error
