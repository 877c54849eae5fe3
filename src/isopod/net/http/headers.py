"""Headers: the fields of one message, in their order, looked up without regard to case.

Not a parser: what comes from the wire was checked before (`syntax`), what goes out is checked when it is written. Values are text of
latin-1, as RFC 9110 section 5.5 has them; nothing is folded, joined or split except by `combined`.
"""

from collections.abc import Iterable, Iterator
from typing import Final, Self

_WHITESPACE: Final = b" \t"


class Headers:
    """An immutable list of (name, value) with look-up by name.

    Args:
        pairs: Names and values; names keep their case.
    """

    __slots__ = ("_index", "_lowered", "_pairs", "_section")

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self._pairs: tuple[tuple[str, str], ...] | None = tuple(pairs)
        self._index: dict[str, list[str]] | None = None
        self._lowered: tuple[tuple[bytes, bytes], ...] | None = None
        self._section = b""

    @classmethod
    def from_section(cls, section: bytes) -> Self:
        """Return the headers of a checked section as it came: lines ended by CRLF, each NAME:VALUE. It is split on first use.

        Args:
            section: The lines; empty ones at either end are skipped.
        """
        made = cls.__new__(cls)
        made._pairs = None
        made._index = None
        made._lowered = None
        made._section = section
        return made

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """All fields in order; names as they were written."""
        if self._pairs is None:
            self._pairs = tuple(_split(self._section))
        return self._pairs

    @property
    def lowered(self) -> tuple[tuple[bytes, bytes], ...]:
        """All fields in order, as bytes; names in lower case."""
        if self._lowered is None:
            self._lowered = tuple((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self.pairs)
        return self._lowered

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the first value of a field, or `default`."""
        found = self._table().get(name.lower())
        return found[0] if found else default

    def get_all(self, name: str) -> list[str]:
        """Return all values of a field, in order."""
        return list(self._table().get(name.lower(), ()))

    def combined(self, name: str) -> str:
        """Return the values of a list-valued field joined by commas (RFC 9110 section 5.3), "" if it is absent."""
        return ", ".join(self._table().get(name.lower(), ()))

    def __getitem__(self, name: str) -> str:
        """Return the first value of a field; KeyError if it is absent."""
        return self._table()[name.lower()][0]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._table()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Headers) and self.pairs == other.pairs

    def __hash__(self) -> int:
        return hash(self.pairs)

    def __repr__(self) -> str:
        return f"Headers({list(self.pairs)!r})"

    def _table(self) -> dict[str, list[str]]:
        index = self._index
        if index is None:
            index = {}
            for name, value in self.pairs:
                index.setdefault(name.lower(), []).append(value)
            self._index = index
        return index


def _split(section: bytes) -> Iterator[tuple[str, str]]:
    for line in section.split(b"\r\n"):
        if line:
            name, _, value = line.partition(b":")
            yield name.decode("latin-1"), value.strip(_WHITESPACE).decode("latin-1")
