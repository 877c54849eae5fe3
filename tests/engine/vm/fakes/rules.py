"""What the fakes of VMMs share: shapes of bodies, refusals, the files they look at, and the record of what they were asked.

A fake enforces what the VMM's interface documents: path and method, the fields of a body and their kinds, the order of calls. It runs
nothing.
"""

import os
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from isopod.world.world import World

NO_CONTENT: Final = 204


class Asked(NamedTuple):
    """One request, and the status it was answered with."""

    method: str
    path: str
    body: Any
    status: int


class Refusal(Exception):
    """A request that is refused: status and words."""

    def __init__(self, status: int, *why: str) -> None:
        super().__init__(*why)
        self.status = status
        self.why = why


class Files(Protocol):
    """The machine's files, as the fake sees them."""

    async def read(self, path: str) -> bytes | None:
        """Return a file's bytes, None if there is none."""

    async def write(self, path: str, data: bytes) -> None:
        """Write a file."""


class HostFiles:
    """The real ones. Relative paths are seen from the working folder, as a VMM's are."""

    async def read(self, path: str) -> bytes | None:
        if not os.path.exists(path):
            return None
        with open(path, "rb") as file:
            return file.read(1 << 20)

    async def write(self, path: str, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data)


class WorldFiles:
    """Those of a World."""

    def __init__(self, world: World) -> None:
        self._disk = world.disk

    async def read(self, path: str) -> bytes | None:
        try:
            return await self._disk.read(path)
        except FileNotFoundError:
            return None

    async def write(self, path: str, data: bytes) -> None:
        await self._disk.write(path, data)


@dataclass
class Rules:
    """One VMM process, newly started. `handle` answers a request; a fake overrides `answer`."""

    files: Files
    asked: list[Asked] = field(default_factory=list)
    has_ended: bool = False
    """Whether the process would have ended by now."""

    async def handle(self, method: str, path: str, data: bytes) -> tuple[int, bytes]:
        """Return status and body."""
        body: Any = None
        try:
            try:
                body = msgspec.json.decode(data) if data else None
            except msgspec.DecodeError as error:
                raise Refusal(400, f"the body is no JSON: {error}") from error
            status, value = await self.answer(method, path, body)
        except Refusal as refusal:
            status, value = refusal.status, self.words(refusal)
        self.asked.append(Asked(method, path, body, status))
        return status, b"" if value is None else msgspec.json.encode(value)

    async def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """Answer a request. Raises Refusal."""
        raise NotImplementedError

    def words(self, refusal: Refusal) -> Any:
        """Return the body of a refusal."""
        return list(refusal.why)

    @property
    def refused(self) -> list[Asked]:
        """What was asked against the rules. Asking for a machine that is not there yet is no offence."""
        return [each for each in self.asked if each.status >= 400 and each.method != "GET"]


Shape = dict[str, Any]
"""Fields by name: a type, a tuple of allowed words, a list of one shape, or a shape. A name that ends in "?" may be missing."""


def check_shape(value: Any, shape: Shape, *, where: str = "body") -> None:
    """Refuse a value that has not exactly this shape. Raises Refusal."""
    if not isinstance(value, dict):
        raise Refusal(400, f"{where}: want an object")
    known = {name.rstrip("?"): (kind, name.endswith("?")) for name, kind in shape.items()}
    for name in value:
        if name not in known:
            raise Refusal(400, f"{where}: unknown field `{name}`, expected one of {', '.join(sorted(known))}")
    for name, (kind, is_optional) in known.items():
        if name not in value:
            if not is_optional:
                raise Refusal(400, f"{where}: missing field `{name}`")
            continue
        _check(value[name], kind, f"{where}.{name}")


def _check(value: Any, kind: Any, where: str) -> None:
    if isinstance(kind, dict):
        check_shape(value, kind, where=where)
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise Refusal(400, f"{where}: want a list")
        for number, each in enumerate(value):
            _check(each, kind[0], f"{where}[{number}]")
    elif isinstance(kind, tuple):
        if value not in kind:
            raise Refusal(400, f"{where}: unknown variant `{value}`, expected one of {', '.join(kind)}")
    elif not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 0)):
        raise Refusal(400, f"{where}: invalid type, want {kind.__name__}")
