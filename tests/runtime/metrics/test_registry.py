"""The registry against prometheus_client's parser."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from isopod.runtime.metrics import BUCKETS_S, Registry, Sample

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('\n"\\{},='), max_size=12)


def parsed(registry: Registry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return what another implementation reads in our text."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(registry.render())
        for sample in family.samples
    }


def test_the_oracle_reads_what_was_counted() -> None:
    registry = Registry()
    registry.counter("calls_total", "Calls.", method="run", outcome="ok").inc(3)
    registry.counter("calls_total", "Calls.", method="run", outcome="error").inc()
    gauge = registry.gauge("open", "Open\\ now\nand here.")
    gauge.set(5)
    gauge.inc(2)
    gauge.dec(1.5)
    histogram = registry.histogram("took_seconds", "Time.", (0.1, 1.0), kind="a")
    for value in (0.05, 0.1, 0.5, 2.0):
        histogram.observe(value)
    assert parsed(registry) == {
        ("calls_total", (("method", "run"), ("outcome", "ok"))): 3,
        ("calls_total", (("method", "run"), ("outcome", "error"))): 1,
        ("open", ()): 5.5,
        ("took_seconds_bucket", (("kind", "a"), ("le", "0.1"))): 2,
        ("took_seconds_bucket", (("kind", "a"), ("le", "1.0"))): 3,
        ("took_seconds_bucket", (("kind", "a"), ("le", "+Inf"))): 4,
        ("took_seconds_sum", (("kind", "a"),)): pytest.approx(2.65),
        ("took_seconds_count", (("kind", "a"),)): 4,
    }
    kinds = {family.name: (family.type, family.documentation) for family in text_string_to_metric_families(registry.render())}
    assert kinds == {
        "calls": ("counter", "Calls."),
        "open": ("gauge", "Open\\ now\nand here."),
        "took_seconds": ("histogram", "Time."),
    }
    assert histogram.count == 4


@given(TEXTS, TEXTS, st.floats())
def test_any_label_help_and_value_survives(label: str, help_text: str, value: float) -> None:
    registry = Registry()
    registry.gauge("g", help_text, a=label, b="").set(value)
    (read,) = parsed(registry).items()
    (name, labels), seen = read
    assert (name, labels) == ("g", (("a", label), ("b", "")))
    assert seen == value or (math.isnan(seen) and math.isnan(value))


def test_statistics_and_text_agree() -> None:
    registry = Registry()
    registry.counter("a_total", "A.", x="1").inc(2)
    registry.histogram("b_seconds", "B.").observe(0.3)
    samples = registry.statistics()
    assert samples[0] == Sample("a_total", (("x", "1"),), 2)
    assert {(s.name, tuple(sorted(s.labels))): s.value for s in samples} == parsed(registry)
    assert len(samples) == 1 + len(BUCKETS_S) + 1 + 2
    registry.counter("a_total", "A.", x="1").inc()
    assert samples[0].value == 2  # a snapshot


def test_the_same_name_and_labels_is_the_same_series() -> None:
    registry = Registry()
    assert registry.counter("a_total", "A.", x="1") is registry.counter("a_total", "A.", x="1")
    assert registry.counter("a_total", "A.", x="1") is not registry.counter("a_total", "A.", x="2")


def test_a_family_is_one_thing() -> None:
    registry = Registry()
    registry.counter("a_total", "A.", x="1")
    registry.histogram("h_seconds", "H.", (1.0,))
    for wrong in (
        lambda: registry.gauge("a_total", "A.", x="1"),
        lambda: registry.counter("a_total", "Another.", x="1"),
        lambda: registry.counter("a_total", "A.", y="1"),
        lambda: registry.counter("a_total", "A."),
        lambda: registry.histogram("h_seconds", "H.", (2.0,)),
        lambda: registry.counter("a", "No total."),
        lambda: registry.gauge("1a", "A digit first."),
        lambda: registry.gauge("a b", "A space."),
        lambda: registry.gauge("", "Nothing."),
        lambda: registry.histogram("i_seconds", "Falling.", (2.0, 1.0)),
        lambda: registry.histogram("i_seconds", "None.", ()),
        lambda: registry.histogram("i_seconds", "Reserved.", (1.0,), le="x"),
        lambda: registry.counter("a_total", "A.", x="1").inc(-1),
        lambda: registry.counter("a_total", "A.", x="1").inc(float("nan")),
    ):
        with pytest.raises(ValueError):
            wrong()
    assert Registry().render() == ""
