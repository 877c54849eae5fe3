"""Render: a view as the pieces of an answer.

Fragments are ready to be sent: rendering puts a family's header before them and joins them to pieces of PIECE_BYTES, one after the other,
so that an answer of any size costs a few pieces of memory. Between pieces others get their turn. What is packed (see `codings`) is kept
with the sandbox: the first answer in a coding costs the packing, later ones only that of what came anew.

    text, OpenMetrics    the same fragments, but where a line is another in OpenMetrics (exemplars, timestamps)
    protobuf             made anew for each answer, by family; of a large family first the size of each sandbox's part, then the parts

In OpenMetrics a counter is called one only if its name ends in _total and no other family has the name without it: else it is `unknown`, so
that series are called the same in all formats.

Source: Prometheus' exposition formats; OpenMetrics 1.0.0; RFC 1952 (gzip); RFC 8878 (zstd: concatenated frames are one stream).
"""

import hashlib
import re
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Final

from isopod.pulse import core
from isopod.pulse.codings import Packer, packer
from isopod.pulse.formats import Coding, Format, FormatName
from isopod.pulse.merge import Group
from isopod.pulse.model import Kind
from isopod.pulse.view import View
from isopod.runtime.scheduling import maybe_yield

PIECE_BYTES: Final = 512 << 10
"""How large a piece of an answer is, about: half a millisecond's work. A piece is what goes out in one turn of the loop, so that smaller
ones would make an answer wait behind all else that is done in as many more turns; for larger ones the C library asks the kernel for memory
each time and gives it back, and its pages are cleared anew. One fragment that is larger goes as a whole."""
FIRST_BYTES: Final = 64 << 10
"""The same of the first one, which is waited for."""
EOF: Final = b"# EOF\n"
_WITH_CREATED: Final = frozenset(("histogram", "summary"))
_BARE_QUOTE: Final = re.compile(rb'(?<!\\)((?:\\\\)*)"')


async def render(view: View, format: Format, coding: Coding) -> AsyncIterator[bytes]:  # noqa: A002 - the word for it
    """Iterate over the pieces of an answer.

    Args:
        view: What is shown.
        format: How.
        coding: How it is packed.
    """
    view.demand.note(coding)
    for piece in joined(_batches(view, format.name, packer(coding))):
        if piece:
            yield piece
        await maybe_yield()


def etag(view: View, format: Format, coding: Coding) -> str:  # noqa: A002 - the word for it
    """Return a weak validator for an answer (RFC 9110 section 8.8.1). The agent's own families do not count: each scrape changes them."""
    word = hashlib.blake2b(repr(view.tag).encode(), digest_size=12).hexdigest()
    return f'W/"{word}-{format.name}-{coding}"'


def header(group: Group, format: FormatName, kinds: Mapping[str, Kind]) -> bytes:  # noqa: A002 - the word for it
    """Return the comment lines before a family's samples.

    Args:
        group: The family.
        format: Text or OpenMetrics.
        kinds: All families of the answer.
    """
    name, kind, text = group.name, str(group.kind), group.help
    if format == "openmetrics":
        text = _BARE_QUOTE.sub(rb'\1\\"', text)
        if kind == "untyped":
            kind = "unknown"
        elif kind == "counter":
            if is_open_counter(name, kinds):
                name = name.removesuffix("_total")
            else:
                kind = "unknown"
    begun = b"# HELP %b %b\n" % (name.encode(), text) if text else b""
    return b"%b# TYPE %b %b\n" % (begun, name.encode(), kind.encode())


def is_open_counter(name: str, kinds: Mapping[str, Kind]) -> bool:
    """Return whether OpenMetrics lets a counter be one: it would stand under its name without _total, which must not be another's."""
    base = name.removesuffix("_total")
    return base not in {name, ""} and base not in kinds and f"{base}_created" not in kinds


def joined(batches: Iterable[Sequence[bytes]]) -> Iterator[bytes]:
    """Join bytes to pieces of about PIECE_BYTES; an empty piece for each empty batch."""
    pending: list[bytes] = []
    n_pending = 0
    wanted = FIRST_BYTES
    for batch in batches:
        if not batch:
            yield b""
            continue
        ends = list(accumulate(map(len, batch)))
        begin = 0
        while ends[-1] + n_pending >= wanted:
            cut = bisect_left(ends, wanted - n_pending, begin) + 1
            wanted = PIECE_BYTES
            pending += batch[begin:cut]
            yield b"".join(pending)
            pending, n_pending = [], -ends[cut - 1]
            begin = cut
        pending += batch[begin:]
        n_pending += ends[-1]
    if pending:
        yield b"".join(pending)


def _batches(view: View, format: FormatName, pack: Packer) -> Iterator[Sequence[bytes]]:  # noqa: A002 - the word for it
    """Iterate over an answer's bytes as they are packed."""
    yield [pack.begin()]
    if format == "protobuf":
        for message in _messages(view):
            yield [pack.plain(message)] if message else ()
    else:
        for group in _shown(view, format):
            if group is None:
                yield ()
            else:
                yield [pack.plain(header(group, format, view.chosen.kinds))]
                yield from pack.family(group.parts, is_open=format == "openmetrics")
    if format == "openmetrics":
        yield [pack.plain(EOF)]
    yield [pack.end()]


def _shown(view: View, format: FormatName) -> Iterator[Group | None]:  # noqa: A002 - the word for it
    """Iterate over a view's families without those that OpenMetrics has another's part for."""
    kinds = view.chosen.kinds
    for group in view.groups():
        if group is None or format != "openmetrics" or not _is_created(group.name, kinds):
            yield group


def _is_created(name: str, kinds: Mapping[str, Kind]) -> bool:
    return name.endswith("_created") and kinds.get(name.removesuffix("_created")) in _WITH_CREATED


def _messages(view: View) -> Iterator[bytes]:
    """Iterate over families as delimited messages, large ones in parts; nothing for a turn."""
    for group in view.groups():
        if group is None:
            yield b""
            continue
        name, kind, text = group.name, group.kind, group.help
        runs = list(_runs([each.text for each in group.fragments]))
        if len(runs) == 1:
            yield core.protobuf(name, kind, text, runs[0])
            continue
        head = _undelimited(core.protobuf(name, kind, text, ()))
        n_bytes = len(head)
        for run in runs:
            n_bytes += len(_undelimited(core.protobuf(name, kind, text, run))) - len(head)
            yield b""
        yield _varint(n_bytes) + head
        for run in runs:
            yield _undelimited(core.protobuf(name, kind, text, run))[len(head) :]


def _runs(texts: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Cut texts into runs of about PIECE_BYTES."""
    begin = n_bytes = 0
    for number, text in enumerate(texts, 1):
        n_bytes += len(text)
        if n_bytes >= PIECE_BYTES:
            yield texts[begin:number]
            begin, n_bytes = number, 0
    if begin < len(texts):
        yield texts[begin:]


def _undelimited(message: bytes) -> bytes:
    """Return a message without the length before it."""
    begin = 0
    while message[begin] & 0x80:
        begin += 1
    return message[begin + 1 :]


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)
