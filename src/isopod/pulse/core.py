"""Core: the text of one sandbox's metrics made into families; the only module of pulse that talks to the Rust core.

A shim's body is not trusted: it may be cut, torn, mixed up or hostile. Each valid line is kept, each other one is counted by why it was
left out (`REASONS`), and what comes out is valid in text format 0.0.4 and OpenMetrics whatever came in. Work grows with the body's length.
Pure: no state, no I/O, the same result for the same arguments. In Rust because this is where the agent's time goes: a body of 31 KB takes a
quarter of a millisecond, three times that in Python for the barest splitting and joining without these checks, and thirty times for
Prometheus' own parser in Python.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from isopod import _core
from isopod.pulse.labels import block
from isopod.pulse.model import Fragment, Kind, Labels, Reading

REASONS: Final[Mapping[str, str]] = {
    "name": "does not begin with the name of a metric; an announcement of what is no name",
    "labels": "labels that are damaged, named twice, or have names that are not allowed",
    "value": "no value, or none that every parser reads (hexadecimal, with underscores, beyond 64 bits); a count that is none",
    "timestamp": "what follows the value is no point in time",
    "exemplar": "the line is kept, but not the exemplar behind it",
    "duplicate": "the series is there already",
    "wrapped": "an unsigned number that went below zero",
    "counter": "a counter below zero, or not a number",
    "bucket": "a bucket without a valid limit",
    "quantile": "a quantile that is no number from 0 to 1",
    "suffix": "a line that a family of its type cannot have",
    "type_conflict": "a family that has the name of a histogram's or summary's lines",
    "too_long": "more bytes in a line than allowed",
    "too_many": "more lines or announcements than allowed",
    "utf8": "no UTF-8",
    "no_newline": "the body ends within the line",
    "chunk": "around the header of an HTTP chunk that was left in the body: figures may be cut there",
    "type": "an announcement of a type that there is not",
    "metadata": "a second announcement of a type or help",
    "incoherent": "left out of OpenMetrics alone: of a histogram or summary whose lines contradict each other",
}
"""Why lines are left out: the words in `Reading.dropped`."""


class Rules(NamedTuple):
    """What a body may be.

    Args:
        line_bytes_max: Longer lines are left out.
        series_max: Lines kept, and families announced, at most.
        renames: Beginnings of families' names, and what stands in their place; the first that fits counts.
        wrapped_min: Values from here on are unsigned numbers that went below zero, and left out.
    """

    line_bytes_max: int = 65536
    series_max: int = 20000
    renames: tuple[tuple[bytes, bytes], ...] = ((b"go_", b"kata_shim_go_"), (b"process_", b"kata_shim_process_"))
    wrapped_min: float = 1.8e19


def read(body: bytes, labels: Labels, rules: Rules, wanted: Mapping[str, tuple[str, ...]]) -> Reading:
    """Read one body.

    Lines of one family are put together, those of a histogram or summary in the order of their limits; each begins with the labels given,
    as `labels.block` writes them. A label of the body's own that has such a name becomes `exported_NAME`.

    Args:
        body: What the shim answered; text format 0.0.4 or OpenMetrics, the latter if it ends with `# EOF`.
        labels: Come first in each line. Their names must be valid and differ.
        rules: Limits and renames.
        wanted: Names of families, as they are after renaming, and for each the labels whose values are returned with its figures.

    Returns:
        The families, the figures asked for, and what was left out.
    """
    found, values, n_series, dropped = _core.exposition_read(body, block(labels), [name for name, _ in labels], rules, wanted)
    families = {name: Fragment(kind, text_of_help, text, n, open_text) for name, kind, text_of_help, text, n, open_text in found}
    return Reading(families, values, n_series, dropped)


def pack(coding: str, texts: Sequence[bytes | int], before: bytes = b"") -> bytes:
    """Return texts packed, each as a piece of a stream: pieces of any packs, one behind another in any order, are one.

    Args:
        coding: "gzip": pieces are what stands between a header and a last block; "zstd": frames.
        texts: What is packed; of a number the piece of that number of the pack before is taken as it is.
        before: A pack of the same coding.
    """
    return _core.pack(coding, texts, before)


def gather(packs: list[bytes], number: int, first: int, n_bytes_wanted: int) -> tuple[bytes, int, int, int]:
    """Join the pieces of one number.

    Args:
        packs: Where they are.
        number: Which piece of each.
        first: The first pack that is looked at.
        n_bytes_wanted: It is enough when there are so many bytes.

    Returns:
        The pieces joined, the CRC-32 of what they hold (0 in zstd), how many bytes that is, and the pack with which it goes on.
    """
    return _core.gather(packs, number, first, n_bytes_wanted)


def combine_crc(pieces: Iterable[tuple[int, int]]) -> int:
    """Return the CRC-32 of pieces one behind another, of which each is given by its own CRC-32 and its number of bytes."""
    return _core.combine_crc32(pieces)


def protobuf(name: str, kind: Kind, help: bytes, texts: Sequence[bytes]) -> bytes:  # noqa: A002 - the format's word
    """Return one family as an `io.prometheus.client.MetricFamily` with its length before it, as a delimited answer has them.

    Args:
        name: The family's.
        kind: Its type.
        help: With the escapes of text 0.0.4.
        texts: Its fragments' lines, as `read` writes them.
    """
    return _core.exposition_protobuf(name, kind, help, texts)
