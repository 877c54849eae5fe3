"""Metrics: counters, gauges and histograms on mapped pages, and their Prometheus text.

Metrics stand beside the code that counts: it asks the registry once, at construction, for a series with its label values, and
then pays one addition and one store per event. Reading is never a message: whoever scrapes reads cells, its own and those of every other
shard.

Rules: names carry base units, counters end in `_total`; a family has one kind, one help text and one set of label names.
Source: Prometheus text exposition format 0.0.4.
"""

from isopod.runtime.metrics.instruments import (
    Counter,
    Gauge,
    Histogram,
    Metric,
    ThreadSafeCounter,
    ThreadSafeGauge,
    ThreadSafeHistogram,
)
from isopod.runtime.metrics.model import (
    BUCKETS_S,
    CONTENT_TYPE,
    SERIES_MAX,
    Aggregation,
    Family,
    HistogramReading,
    Kind,
    Labels,
    Layout,
    Reading,
    Sample,
    Series,
    Snapshot,
    number,
)
from isopod.runtime.metrics.registry import Home, Registry
from isopod.runtime.metrics.shards import ShardMetrics, next_generation
from isopod.runtime.metrics.text import PrometheusText

__all__ = [
    "BUCKETS_S",
    "CONTENT_TYPE",
    "SERIES_MAX",
    "Aggregation",
    "Counter",
    "Family",
    "Gauge",
    "Histogram",
    "HistogramReading",
    "Home",
    "Kind",
    "Labels",
    "Layout",
    "Metric",
    "PrometheusText",
    "Reading",
    "Registry",
    "Sample",
    "Series",
    "ShardMetrics",
    "Snapshot",
    "ThreadSafeCounter",
    "ThreadSafeGauge",
    "ThreadSafeHistogram",
    "next_generation",
    "number",
]
