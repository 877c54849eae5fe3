"""Rates from two rounds, and the rows of /top."""

import json
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.pulse.cadvisor import measure
from isopod.pulse.model import Pod
from isopod.pulse.rates import SORT_KEYS, Rates, Row, Sample, SortKey, as_json, ordered, sample_of
from tests.pulse.guests import MIB, POD, guest


class Entry:
    def __init__(self, identifier: str, pod: Pod | None = None) -> None:
        self.id: Final = identifier
        self.pod: Final = pod
        self.up: Final = True

    def age_s(self, now: float, /) -> float | None:
        return now - 10.0


def sample(cpu_s: float | None = 0.0, **more: float | None) -> Sample:
    zero = dict.fromkeys(Sample._fields, 0.0)
    return Sample(**{**zero, "cpu_s": cpu_s, **more})


def row(rates: Rates, identifier: str = "a", now_s: float = 12.0) -> Row:
    return rates.rows([Entry(identifier, POD)], now_s)[0]


def test_two_rounds_make_rates() -> None:
    rates = Rates()
    rates.put("a", 10.0, sample(5.0, memory_bytes=7.0, received_bytes=100.0, written_bytes=0.0))
    assert (row(rates).cpu_cores, row(rates).memory_bytes) == (None, 7)
    rates.put("a", 12.0, sample(8.0, memory_bytes=9.0, received_bytes=1100.0, written_bytes=1.0))
    found = row(rates)
    assert (found.cpu_cores, found.memory_bytes, found.received_bytes_per_s, found.written_bytes_per_s) == (1.5, 9, 500.0, 0.5)
    assert (found.id, found.name, found.namespace, found.age_s, found.up) == ("a", "web-0", "team", 2.0, True)


def test_a_counter_that_went_back_gives_no_rate() -> None:
    rates = Rates()
    rates.put("a", 10.0, sample(5.0, sent_bytes=50.0))
    rates.put("a", 11.0, sample(1.0, sent_bytes=60.0))
    assert (row(rates).cpu_cores, row(rates).sent_bytes_per_s) == (None, 10.0)
    rates.put("a", 12.0, sample(1.5))
    assert row(rates).cpu_cores == 0.5


def test_what_a_guest_does_not_say_is_unknown_not_zero() -> None:
    rates = Rates()
    nothing = sample_of(measure({}))
    rates.put("a", 10.0, nothing)
    rates.put("a", 11.0, nothing)
    assert {getattr(row(rates), name) for name in Row.__struct_fields__ if name.endswith("per_s") or name == "cpu_cores"} == {None}
    assert row(rates).memory_bytes is None
    assert row(rates, "never seen").cpu_cores is None


def test_the_same_again_and_twice_at_once() -> None:
    rates = Rates()
    rates.put("a", 10.0, sample(5.0))
    rates.again("a", 11.0)
    assert row(rates).cpu_cores == 0.0
    rates.put("a", 11.0, sample(6.0))
    assert row(rates).cpu_cores == 1.0, "a later word of the same moment counts, and nothing is divided by zero"
    rates.again("b", 11.0)
    assert len(rates) == 1


def test_who_is_gone_is_forgotten_and_their_number_is_bounded() -> None:
    rates = Rates(sandboxes_max=3)
    for index in range(3):
        rates.put(str(index), float(index), sample())
    rates.put("0", 5.0, sample())
    rates.put("new", 6.0, sample(memory_bytes=3.0))
    assert [row(rates, each).memory_bytes for each in ("0", "1", "2", "new")] == [0, None, 0, 3], "1 was silent for longest"
    rates.remove("0")
    rates.remove("0")
    assert len(rates) == 2


def test_samples_are_of_the_figures() -> None:
    values = guest(interfaces=("eth0", "lo", "eth1"), disks=("vda", "vda1", "vdb"))
    assert sample_of(measure(values)) == Sample(7.6, 412 * MIB, 2000, 4000, 16384, 2048)
    del values["kata_guest_meminfo"]
    assert sample_of(measure(values)).memory_bytes is None


def test_json_of_top() -> None:
    rates = Rates()
    rates.put("a", 10.0, sample(5.0))
    rates.put("a", 12.0, sample(6.0))
    document = json.loads(as_json(rates.rows([Entry("a", POD), Entry("b")], 12.0)))
    known, unknown = document["sandboxes"]
    assert list(known) == [
        "id",
        "name",
        "namespace",
        "cpu_cores",
        "memory_bytes",
        "received_bytes_per_s",
        "sent_bytes_per_s",
        "read_bytes_per_s",
        "written_bytes_per_s",
        "age_s",
        "up",
    ]
    assert (known["cpu_cores"], known["name"]) == (0.5, "web-0")
    assert (unknown["cpu_cores"], unknown["name"], unknown["id"]) == (None, "", "b")


@pytest.mark.parametrize("key", SORT_KEYS)
def test_order(key: SortKey) -> None:
    def made(name: str, cpu: float | None, memory: int, sent: float, read: float) -> Row:
        return Row(
            id=name,
            name=name,
            namespace="",
            cpu_cores=cpu,
            memory_bytes=memory,
            received_bytes_per_s=None,
            sent_bytes_per_s=sent,
            read_bytes_per_s=read,
            written_bytes_per_s=1.0,
            age_s=None,
            up=False,
        )

    rows = [made("b", None, 5, 3.0, 1.0), made("a", 0.0, 4, 2.0, 9.0), made("c", 2.0, 3, 1.0, 5.0)]
    expected = {"cpu": "cab", "memory": "bac", "network": "bac", "disk": "acb", "name": "abc"}
    assert "".join(each.name for each in ordered(rows, key)) == expected[key]


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e15)), min_size=1, max_size=8))
def test_no_rate_is_ever_negative(rounds: list[tuple[float, float]]) -> None:
    rates = Rates()
    for at_s, cpu_s in rounds:
        rates.put("a", at_s, sample(cpu_s))
        cores = row(rates).cpu_cores
        assert cores is None or cores >= 0
