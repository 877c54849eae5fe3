"""Verb: a method with its handler, its decoders and its metrics. Counting is batched: a call adds to plain numbers, which are handed to the
metrics once per turn of the loop."""

import inspect
from typing import Final

from isopod.net.rpc.call import AnyHandler, AnyMethod
from isopod.net.rpc.codec import Codec
from isopod.runtime.metrics import Counter, Histogram, Registry

FAST_NS: Final = 5_000_000
"""The first bound of a duration histogram: nearly all calls are below, and counted without looking for their place."""
_FAST_S: Final = FAST_NS / 1e9
OUTCOMES: Final = ("ok", "error", "cancelled", "bug")


class Meter:
    """The metrics of one method, whatever its encoding."""

    __slots__ = ("calls", "duration", "fast_ns", "is_noted", "n_fast")

    def __init__(self, method: str, metrics: Registry) -> None:
        self.calls: dict[str, Counter] = {
            outcome: metrics.counter("isopod_rpc_calls_total", "Calls answered.", method=method, outcome=outcome) for outcome in OUTCOMES
        }
        self.duration: Histogram = metrics.histogram(
            "isopod_rpc_call_duration_seconds", "From a request's arrival to its answer.", method=method
        )
        self.n_fast = 0
        """Calls with outcome "ok" below `FAST_NS` that are not handed over yet."""
        self.fast_ns = 0
        self.is_noted = False

    def count(self, outcome: str, duration_ns: int) -> None:
        """Count one call at once."""
        self.calls[outcome].inc()
        self.duration.observe(duration_ns / 1e9)

    def publish(self) -> None:
        """Hand over what was added up."""
        self.is_noted = False
        self.calls["ok"].inc(self.n_fast)
        self.duration.observe_many(_FAST_S, self.n_fast, self.fast_ns / 1e9)
        self.n_fast = self.fast_ns = 0


class Verb:
    """What a session looks up for a request.

    Args:
        method: The method.
        handler: Serves it.
        codec: Its decoders, in one encoding.
        meter: Its metrics, shared by its encodings.
    """

    __slots__ = ("codec", "decode", "handler", "has_streams", "is_plain", "is_raw", "meter", "method", "name", "task_name", "tends_to_wait")

    def __init__(self, method: AnyMethod, handler: AnyHandler, codec: "Codec[object, object]", meter: Meter) -> None:
        self.method = method
        self.name = method.name
        self.handler = handler
        self.codec = codec
        self.decode = codec.request
        self.meter = meter
        self.task_name = f"rpc {method.name}"
        self.has_streams = method.sends is not None or method.receives is not None
        self.is_plain = not self.has_streams and not inspect.iscoroutinefunction(handler)
        """Whether to call the handler as soon as its request is there."""
        self.is_raw = method.reply is bytes
        self.tends_to_wait = False
        """Whether its last handler had to wait."""
