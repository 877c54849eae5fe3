"""BaseUnits: kata_* families in Prometheus' base units, typed as what they are, in place of those that Kata writes.

Kata types nearly everything as a gauge and mixes milliseconds, clock ticks, sectors, KiB and per cent. For each family whose meaning is
known (`base_families`), its lines are written anew under names that say seconds, bytes or ratio and end in _total where they only grow:

    kata_guest_cpu_time{cpu="0",item="user"} 1227951        kata_guest_cpu_seconds_total{cpu="0",item="user"} 1227.951
    kata_guest_diskstat{disk="vda",item="sectors_read"} 8   kata_guest_disk_read_bytes_total{disk="vda"} 4096
    kata_guest_meminfo{item="mem_free"} 4096                kata_guest_memory_bytes{item="mem_free"} 4096

Rules:
- What is not known stays as it is: a whole family, or the items of one that nobody here has heard of, under the name they came with.
- A family of which the shim itself uses a new name already stays as it is, too: nothing is ever put on top of something else.
- Labels keep their order, with the sandbox's own block first; `item` goes where the name says what it said.
- Figures are moved by decimal places or multiplied exactly: 1 ms is 0.001, never 0.0010000000000000002.
- A counter below zero or not a number is left out and counted, as the reader does it for counters that are announced as such.

The guest's CPU time is in the unit that `cpu_units` found out; until that is known milliseconds are taken, as for container_*.
Source: Prometheus' practices for naming; what Kata's families mean stands in `base_families`.

Not here: which lines of a body are good (`core`): what is read here is what the reader wrote, line by line.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal
from typing import Final, NamedTuple

from isopod.pulse.base_families import KNOWN, Known, Made, Unit
from isopod.pulse.model import Families, Fragment


class Scale(NamedTuple):
    """A figure times `factor`, then moved by so many decimal places to the right of the point."""

    factor: int = 1
    places: int = 0


class Converted(NamedTuple):
    """The families of a sandbox, in the order of names, and lines left out, by reason."""

    families: Families
    dropped: Mapping[str, int]


KNOWN_MAX: Final = 20_000
"""Label sets of which it is remembered what becomes of them, for all sandboxes together."""
TAIL_BYTES_MAX: Final = 512
"""Of these labels."""
DIGITS_MAX: Final = 32
"""Of a figure. Longer ones are first rounded to what a reader can take of them: a float."""
_EXACT: Final = Context(prec=DIGITS_MAX * 4)
_WHOLE_MAX: Final = 1e12
"""Up to here a whole figure is scaled without `Decimal`, and exactly: with any factor it stays below 2**53."""
_SAME: Final = Scale()
_SCALES: Final[Mapping[Unit, Scale]] = {
    "as it is": _SAME,
    "milliseconds": Scale(places=3),
    "ticks": Scale(places=2),
    "percent": Scale(places=2),
    "sectors": Scale(factor=512),
    "kibibytes": Scale(factor=1024),
}
_CPU_PLACES: Final = {0.001: 3, 0.01: 2, 1.0: 0}
_LABEL: Final = re.compile(rb',([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"', re.DOTALL)


class _Fate(NamedTuple):
    """What becomes of all lines with the same labels."""

    name: str
    """Their family; the one they came in for what is not known."""
    tail: bytes
    """The labels behind the sandbox's block."""
    scale: Scale = _SAME
    is_same: bool = True
    """Whether labels and figure stay."""
    is_counter: bool = False
    key: bytes = b""
    """Of a bucket: the new labels in the order of their names."""


class BaseUnits:
    """Converts. Remembers nothing of any sandbox, only what becomes of label sets, of which there are few."""

    def __init__(self) -> None:
        self._fates: dict[tuple[str, Scale, Scale], dict[bytes, _Fate]] = {}
        self._n_fates = 0

    def convert(self, families: Families, begun: bytes, *, is_rust: bool, cpu_unit_s: float) -> Converted:
        """Return families in base units.

        Args:
            families: As the reader made them.
            begun: What all their lines begin with behind the brace: the block of the sandbox's labels.
            is_rust: Whether the figures on the host were read by Kata's shim in Rust.
            cpu_unit_s: In what the guest counts CPU time, in seconds.
        """
        cpu = Scale(places=_CPU_PLACES.get(cpu_unit_s, 3))
        host = _SCALES["kibibytes"] if is_rust else _SAME
        scales: Mapping[Unit, Scale] = {**_SCALES, "cpu": cpu, "host": host}
        made: Families = {}
        dropped: dict[str, int] = {}
        for name, fragment in families.items():
            known = KNOWN.get(name)
            if known is None or fragment.kind not in known.kinds or not families.keys().isdisjoint(known.names):
                made[name] = fragment
                continue
            work = _Work(name, known, fragment, begun, dropped)
            fates = self._known_fates(name, cpu, host)
            if fragment.kind == "histogram":
                made |= work.histogram(fates)
            else:
                made |= work.plain(fates, scales)
            self._n_fates += work.n_learned
        return Converted(dict(sorted(made.items())), dropped)

    def _known_fates(self, name: str, cpu: Scale, host: Scale) -> dict[bytes, _Fate]:
        if self._n_fates > KNOWN_MAX:
            self._fates.clear()
            self._n_fates = 0
        return self._fates.setdefault((name, cpu, host), {})


class _Work:
    """One family of one sandbox on its way."""

    def __init__(self, name: str, known: Known, fragment: Fragment, begun: bytes, dropped: dict[str, int]) -> None:  # noqa: PLR0917 - made in one place
        self._name = name
        self._known = known
        self._fragment = fragment
        self._begun = begun
        self._dropped = dropped
        self.n_learned = 0

    def plain(self, fates: dict[bytes, _Fate], scales: Mapping[Unit, Scale]) -> Families:
        """Return what becomes of a family of single figures."""
        fragment = self._fragment
        texts = self._sorted(fragment.text, fates, scales)
        opened = None if fragment.open_text is None else self._sorted(fragment.open_text, fates, scales, counts=False)
        families: Families = {}
        for name, pieces in texts.items():
            open_text = None if opened is None else self._joined(name, opened.get(name, ()))
            made = self._known.made.get(name)
            kind, text = (fragment.kind, fragment.help) if made is None else (made.kind, made.help)
            families[name] = Fragment(kind, text, self._joined(name, pieces), len(pieces), open_text)
        return families

    def _sorted(
        self, text: bytes, fates: dict[bytes, _Fate], scales: Mapping[Unit, Scale], *, counts: bool = True
    ) -> dict[str, list[bytes]]:
        """Return what stands behind the sandbox's block in each new line, by family."""
        begin = b"%b{%b" % (self._name.encode(), self._begun)
        found: dict[str, list[bytes]] = {}
        for piece in text[len(begin) : -1].split(b"\n" + begin) if text else ():
            tail, _, figure = piece.rpartition(b"} ")
            fate = fates.get(tail)
            if fate is None:
                fate = self._keep(fates, tail, self._learn(tail, scales))
            name, new_tail, scale, is_same, is_counter, _ = fate
            if is_counter and figure[0] in b"-N" and not float(figure.partition(b" ")[0]) >= 0.0:
                self._drop("counter", counts=counts)
                continue
            if not is_same:
                if scale is not _SAME:
                    figure = _scaled_figure(figure, scale)
                    if not figure:
                        self._drop("value", counts=counts)
                        continue
                piece = b"%b} %b" % (new_tail, figure)  # noqa: PLW2901 - another one, or the same
            pieces = found.get(name)
            if pieces is None:
                found[name] = [piece]
            else:
                pieces.append(piece)
        return found

    def _learn(self, tail: bytes, scales: Mapping[Unit, Scale]) -> _Fate:
        item = next((value for label, value in _LABEL.findall(tail) if label == b"item"), b"")
        made = self._known.choose(item.decode())
        if made is None:
            return _Fate(self._name, tail)
        rest = tail if made.keeps else _LABEL.sub(lambda label: b"" if label[1] == b"item" else label[0], tail)
        scale = scales[made.unit]
        return _Fate(made.name, rest, scale, is_same=rest == tail and scale == _SAME, is_counter=made.kind == "counter")

    def _keep(self, fates: dict[bytes, _Fate], tail: bytes, fate: _Fate) -> _Fate:
        """Remember what becomes of labels, unless they are so long that they are hardly anybody else's."""
        if len(tail) <= TAIL_BYTES_MAX:
            fates[tail] = fate
            self.n_learned += 1
        return fate

    def histogram(self, fates: dict[bytes, _Fate]) -> Families:
        """Return what becomes of a histogram: limits and sums are scaled, counts stay."""
        ((name, made),) = self._known.made.items()
        scale = _SCALES[made.unit]
        text = self._scaled_lines(self._fragment.text, made, fates, scale=scale)
        if not text:
            return {}
        open_text = self._fragment.open_text
        opened = None if open_text is None else self._scaled_lines(open_text, made, fates, scale=scale, counts=False)
        return {name: Fragment("histogram", made.help, text, text.count(b"\n"), opened)}

    def _scaled_lines(self, text: bytes, made: Made, fates: dict[bytes, _Fate], *, scale: Scale, counts: bool = True) -> bytes:
        begin = b"{" + self._begun
        cut = _labels_before_exemplars if b" # {" in text else _labels
        names = {f"{self._name}{part}".encode(): f"{made.name}{part}".encode() + begin for part in ("_bucket", "_count", "_sum")}
        a_sum = f"{self._name}_sum".encode()
        a_bucket = f"{self._name}_bucket".encode()
        seen: dict[bytes, None] = {}
        lines: list[bytes] = []
        for line in text[:-1].split(b"\n") if text else ():
            name, _, rest = line.partition(begin)
            labels, figure = cut(rest)
            if name == a_bucket:
                fate = fates.get(labels)
                if fate is None:
                    scaled_labels = _LABEL.sub(lambda label: _scaled_limit(label, scale), labels)
                    key = b",".join(sorted(label[0] for label in _LABEL.finditer(scaled_labels) if label[2]))
                    fate = self._keep(fates, labels, _Fate(made.name, scaled_labels, key=key))
                labels = fate.tail
                if fate.key in seen:  # two spellings of one limit
                    self._drop("duplicate", counts=counts)
                    continue
                seen[fate.key] = None
                figure = _scaled_exemplar(figure, scale)
            elif name == a_sum:
                figure = _scaled_figure(figure, scale)
            lines.append(b"%b%b} %b\n" % (names[name], labels, figure))
        return b"".join(lines)

    def _joined(self, name: str, pieces: Sequence[bytes]) -> bytes:
        begin = b"%b{%b" % (name.encode(), self._begun)
        return begin + (b"\n" + begin).join(pieces) + b"\n" if pieces else b""

    def _drop(self, reason: str, *, counts: bool) -> None:
        if counts:
            self._dropped[reason] = self._dropped.get(reason, 0) + 1


def scaled(text: bytes, scale: Scale) -> bytes:
    """Return a number times a scale, exactly; b"" if that is beyond what 64 bits hold.

    Args:
        text: As the reader leaves it.
        scale: By how much.
    """
    figure = float(text)
    factor, places = scale
    if figure.is_integer() and -_WHOLE_MAX < figure < _WHOLE_MAX:
        quotient = figure * factor / 10**places  # rounded once, so that the shortest decimal that means it is the exact one
        return b"%d" % quotient if quotient.is_integer() else repr(quotient).encode()
    if figure - figure != 0.0:  # infinite, or not a number
        return text
    exact = Decimal(text.decode() if len(text) <= DIGITS_MAX else repr(figure))
    product = _EXACT.multiply(exact, factor).scaleb(-places, _EXACT).normalize(_EXACT)
    written = f"{product:f}" if -20 < product.adjusted() < 20 else str(product).lower()
    return b"" if float(written) in {float("inf"), float("-inf")} else written.encode()


def _scaled_figure(text: bytes, scale: Scale) -> bytes:
    """Return a value with or without a time behind it, scaled; b"" if it cannot be."""
    if b" " not in text:
        return scaled(text, scale)
    value, blank, time = text.partition(b" ")
    value = scaled(value, scale)
    return value and value + blank + time


def _scaled_exemplar(text: bytes, scale: Scale) -> bytes:
    """Return a bucket's value with what stands behind it; an exemplar's value is scaled, too."""
    value, hash_sign, exemplar = text.partition(b" # {")
    if not hash_sign:
        return text
    labels, end, figure = exemplar.rpartition(b"} ")
    figure = _scaled_figure(figure, scale)
    return value + hash_sign + labels + end + figure if figure else value


def _scaled_limit(label: "re.Match[bytes]", scale: Scale) -> bytes:
    return b',le="%b"' % (scaled(label[2], scale) or b"+Inf") if label[1] == b"le" else label[0]


def _labels(text: bytes) -> tuple[bytes, bytes]:
    """Cut the rest of a line behind its labels; the brace behind them goes."""
    labels, _, figure = text.rpartition(b"} ")
    return labels, figure


def _labels_before_exemplars(text: bytes) -> tuple[bytes, bytes]:
    """Do the same where there may be other braces behind them."""
    end = 0
    while (label := _LABEL.match(text, end)) is not None:
        end = label.end()
    return text[:end], text[end + 2 :]
