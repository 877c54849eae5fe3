"""MetricFamily: Prometheus' message made at run time from its documented field numbers: output is read by somebody else's decoder."""

from collections.abc import Iterator
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FIELD = descriptor_pb2.FieldDescriptorProto
_TYPES: Final = {"string": _FIELD.TYPE_STRING, "double": _FIELD.TYPE_DOUBLE, "uint64": _FIELD.TYPE_UINT64, "int64": _FIELD.TYPE_INT64}
_MESSAGES: Final[dict[str, tuple[str, ...]]] = {
    "LabelPair": ("1 string name", "2 string value"),
    "Gauge": ("1 double value",),
    "Counter": ("1 double value",),
    "Quantile": ("1 double quantile", "2 double value"),
    "Summary": ("1 uint64 sample_count", "2 double sample_sum", "3 *Quantile quantile"),
    "Untyped": ("1 double value",),
    "Bucket": ("1 uint64 cumulative_count", "2 double upper_bound"),
    "Histogram": ("1 uint64 sample_count", "2 double sample_sum", "3 *Bucket bucket"),
    "Metric": (
        "1 *LabelPair label",
        "2 Gauge gauge",
        "3 Counter counter",
        "4 Summary summary",
        "5 Untyped untyped",
        "6 int64 timestamp_ms",
        "7 Histogram histogram",
    ),
    "MetricFamily": ("1 string name", "2 string help", "3 MetricType type", "4 *Metric metric"),
}
_KINDS: Final = ("COUNTER", "GAUGE", "SUMMARY", "UNTYPED", "HISTOGRAM")

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(data: bytes) -> Iterator[Any]:
    """Iterate over the messages of a delimited stream."""
    wanted = _family()
    at = 0
    while at < len(data):
        size = shift = 0
        while True:
            size |= (data[at] & 0x7F) << shift
            shift += 7
            at += 1
            if not data[at - 1] & 0x80:
                break
        assert at + size <= len(data), "the last message is cut"
        family = wanted()
        family.ParseFromString(data[at : at + size])
        at += size
        yield family


def series_of(data: bytes) -> tuple[dict[str, str], Series]:
    """Return the kinds of a stream's families, and what the text format would say of their series."""
    kinds: dict[str, str] = {}
    found: Series = {}
    for family in read(data):
        assert family.name not in kinds, "one message for each family"
        kinds[family.name] = _KINDS[family.type].lower()
        for metric in family.metric:
            for name, extra, value in _samples(family.name, metric):
                labels = tuple(sorted([*((each.name, each.value) for each in metric.label), *extra]))
                assert (name, labels) not in found, "each series once"
                found[name, labels] = value
    return kinds, found


def _samples(name: str, metric: Any) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
    for word in ("gauge", "counter", "untyped"):
        if metric.HasField(word):
            yield name, (), getattr(metric, word).value
    for word, parts, of, at in (("summary", "quantile", "value", "quantile"), ("histogram", "bucket", "cumulative_count", "upper_bound")):
        if metric.HasField(word):
            each = getattr(metric, word)
            for part in getattr(each, parts):
                suffix, label = ("_bucket", "le") if word == "histogram" else ("", "quantile")
                yield name + suffix, ((label, str(float(getattr(part, at)))),), getattr(part, of)
            yield f"{name}_sum", (), each.sample_sum
            yield f"{name}_count", (), each.sample_count


def _family() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="metric_family.proto", package="t", syntax="proto2")
    kinds = file.enum_type.add(name="MetricType")
    for place, word in enumerate(_KINDS):
        kinds.value.add(name=word, number=place)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in fields:
            number, of, field_name = field.split()
            made = message.field.add(name=field_name, number=int(number))
            made.label = _FIELD.LABEL_REPEATED if of.startswith("*") else _FIELD.LABEL_OPTIONAL
            of = of.removeprefix("*")
            if of in _TYPES:
                made.type = _TYPES[of]
            else:
                made.type = _FIELD.TYPE_ENUM if of == "MetricType" else _FIELD.TYPE_MESSAGE
                made.type_name = f".t.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.MetricFamily"))
