"""Reflection: a server says what it serves, as data, to whoever asks `rpc.reflect`.

The schemas are JSON Schema 2020-12 as msgspec generates them from the very types that decode, so they cannot be out of date. The hash of
a table tells two peers in their hellos whether they mean the same methods; it covers names, streams and schemas.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from isopod.net.rpc.call import AnyMethod
from isopod.net.rpc.codes import CodeRow, code_table
from isopod.wire import frames as f
from isopod.wire.service import Method

REF: Final = "#/schemas/{name}"
HASH_CHARS: Final = 16


class ReflectRequest(msgspec.Struct, frozen=True):
    """Which methods: those whose names begin with `prefix`."""

    prefix: str = ""


class MethodRow(msgspec.Struct, frozen=True):
    """One method. `request`, `reply`, `sends` and `receives` are schemas that refer into `Reflection.schemas`; None: no such stream."""

    name: str
    request: dict[str, Any]
    reply: dict[str, Any]
    sends: dict[str, Any] | None
    receives: dict[str, Any] | None
    idempotent: bool


class Reflection(msgspec.Struct, frozen=True):
    """What a server serves."""

    server: str
    versions: tuple[int, int]
    features: tuple[str, ...]
    table: str
    methods: tuple[MethodRow, ...]
    schemas: dict[str, Any]
    codes: tuple[CodeRow, ...]


REFLECT: Final = Method("rpc.reflect", ReflectRequest, Reflection, idempotent=True)


def describe(methods: Iterable[AnyMethod]) -> tuple[tuple[MethodRow, ...], dict[str, Any]]:
    """Return the rows of methods, by name, and the schemas they refer to."""
    ordered = sorted(methods, key=lambda method: method.name)
    kinds: list[Any] = []
    for method in ordered:
        kinds += [method.request, method.reply, method.sends or type(None), method.receives or type(None)]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=REF)
    rows = []
    for number, method in enumerate(ordered):
        request, reply, sends, receives = schemas[4 * number : 4 * number + 4]
        rows.append(
            MethodRow(
                name=method.name,
                request=request,
                reply=reply,
                sends=None if method.sends is None else sends,
                receives=None if method.receives is None else receives,
                idempotent=method.idempotent,
            )
        )
    return tuple(rows), components


def table_hash(rows: Sequence[MethodRow], schemas: dict[str, Any]) -> str:
    """Return the hash of a table of methods: equal on two peers exactly if they mean the same messages."""
    packed = msgspec.json.encode((rows, schemas), order="deterministic")
    return hashlib.sha256(packed).hexdigest()[:HASH_CHARS]


class Reflector:
    """Answers `rpc.reflect` for a table of methods; described when somebody first asks.

    Args:
        server: What the server calls itself.
        methods: What it serves.
        features: What it offers.
    """

    def __init__(self, server: str, methods: Sequence[AnyMethod], features: tuple[str, ...]) -> None:
        self._server = server
        self._methods = methods
        self._features = features
        self._described: tuple[tuple[MethodRow, ...], dict[str, Any], str] | None = None

    @property
    def table(self) -> str:
        """The hash of the table."""
        return self._describe()[2]

    def reflect(self, _call: object, request: ReflectRequest) -> Reflection:
        """Serve `rpc.reflect`."""
        rows, schemas, table = self._describe()
        chosen = tuple(row for row in rows if row.name.startswith(request.prefix))
        if len(chosen) != len(rows):
            names = {row.name for row in chosen}
            _, schemas = describe(method for method in self._methods if method.name in names)
        versions = (f.VERSION_LOWEST, f.VERSION_HIGHEST)
        return Reflection(self._server, versions, self._features, table, chosen, schemas, code_table())

    def _describe(self) -> tuple[tuple[MethodRow, ...], dict[str, Any], str]:
        if self._described is None:
            rows, schemas = describe(self._methods)
            self._described = (rows, schemas, table_hash(rows, schemas))
        return self._described
