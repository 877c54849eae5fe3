"""Families made by hand: what the reader would make of a shim's text, for tests of what comes after it."""

from collections.abc import Mapping

from isopod.pulse.labels import block, kata_labels
from isopod.pulse.model import Families, Fragment, Kind, Pod

Samples = Mapping[str, float]


def fragment(text: str, kind: Kind = "gauge", help_text: str = "Help.", open_text: str | None = None) -> Fragment:
    """Return a fragment of lines."""
    return Fragment(kind, help_text.encode(), text.encode(), text.count("\n"), None if open_text is None else open_text.encode())


def labelled(identifier: str, pod: Pod | None, name: str, samples: Mapping[str, float], kind: Kind = "gauge") -> Fragment:
    """Return a fragment of a sandbox: `samples` are figures by what stands behind the sandbox's own labels."""
    begun = block(kata_labels(identifier, pod)).decode()
    return fragment("".join([f"{name}{{{begun}{',' + own if own else ''}}} {value:g}\n" for own, value in samples.items()]), kind)


def sandbox(identifier: str, pod: Pod | None = None, value: float = 1.0) -> Families:
    """Return families of each kind, all with one figure in them."""
    begun = block(kata_labels(identifier, pod)).decode()
    rows = "".join([f'kata_rpc_bucket{{{begun},action="a",le="{le}"}} {value:g}\n' for le in ("1", "2", "+Inf")])
    rows += f'kata_rpc_sum{{{begun},action="a"}} {value:g}\nkata_rpc_count{{{begun},action="a"}} {value:g}\n'
    quantiles = "".join([f'kata_pause_seconds{{{begun},quantile="{q}"}} {value:g}\n' for q in ("0", "0.5", "1")])
    quantiles += f"kata_pause_seconds_sum{{{begun}}} {value:g}\nkata_pause_seconds_count{{{begun}}} {value:g}\n"
    return {
        "kata_agent_threads": labelled(identifier, pod, "kata_agent_threads", {"": value}),
        "kata_guest_load": labelled(identifier, pod, "kata_guest_load", {'item="load1"': value, 'item="load5"': value}),
        "kata_odd": labelled(identifier, pod, "kata_odd", {'path="a,b=\\"c\\"}\\\\"': value}, "untyped"),
        "kata_pause_seconds": fragment(quantiles, "summary"),
        "kata_reads_total": labelled(identifier, pod, "kata_reads_total", {"": value}, "counter"),
        "kata_rpc": fragment(rows, "histogram"),
        "kata_scrape_count": labelled(identifier, pod, "kata_scrape_count", {"": value}, "counter"),
    }
