"""In what a guest counts CPU time: told by its age, or by two looks, and by neither if it was paused."""

import pytest

from isopod.pulse.cpu_units import UNIT_S, CpuUnits, Unit
from isopod.pulse.model import Pod, Runtime, Values
from tests.pulse.guests import POD, guest

AGE_S = 1000.0
CREATED_NS = POD.created_ns


def look(
    units: CpuUnits, up_s: float, unit_s: float, *, age_s: float | None = None, at_s: float = 0.0, runtime: Runtime = "go", n_cpus: int = 2
) -> float:
    """Have a guest say that its CPUs have run for `up_s`; return the unit that is taken."""
    share = up_s / unit_s
    cpu = {str(index): {"user": share * 0.25, "idle": share * 0.5, "iowait": share * 0.25, "guest": share} for index in range(n_cpus)}
    cpu["total"] = {"user": share * n_cpus, "system": 0.0}
    values: Values = guest(cpu=cpu)
    pod: Pod | None = POD
    if age_s is None:
        pod = None
        del values["kata_shim_process_start_time_seconds"]
    now_ns = CREATED_NS + int((age_s or 0) * 1e9)
    return units.unit_s("a", values, pod, runtime=runtime, at_s=at_s, now_ns=now_ns)


@pytest.mark.row("T17")
@pytest.mark.parametrize("unit", UNIT_S)
def test_told_by_the_age_at_the_first_look(unit: Unit) -> None:
    units = CpuUnits()
    assert look(units, AGE_S - 3.0, UNIT_S[unit], age_s=AGE_S) == UNIT_S[unit]
    assert units.statistics() == {**dict.fromkeys((*UNIT_S, "undecided"), 0), unit: 1}
    assert look(units, 5.0, 1.0, age_s=AGE_S * 9) == UNIT_S[unit], "what is decided stays decided"


@pytest.mark.row("T17")
@pytest.mark.parametrize("unit", UNIT_S)
def test_told_by_two_looks_where_the_age_is_not_known(unit: Unit) -> None:
    units = CpuUnits()
    unit_s = UNIT_S[unit]
    assert look(units, 500.0, unit_s, at_s=70.0) == UNIT_S["milliseconds"]
    assert units.statistics()["undecided"] == 1
    assert look(units, 501.0, unit_s, at_s=71.0) == UNIT_S["milliseconds"], "too soon to tell"
    assert look(units, 510.0, unit_s, at_s=80.0) == unit_s
    assert units.statistics()["undecided"] == 0


def test_a_young_guest_is_judged_by_two_looks() -> None:
    units = CpuUnits()
    look(units, 0.5, 0.01, age_s=5.0, at_s=0.0)
    assert units.statistics()["undecided"] == 1
    assert look(units, 5.5, 0.01, age_s=9.9, at_s=5.0) == 0.01


def test_a_guest_that_was_paused_is_not_taken_for_another() -> None:
    """Its sum is a fifth of its age: neither milliseconds nor ticks. It runs again: two looks tell."""
    units = CpuUnits()
    assert look(units, AGE_S / 5, 0.001, age_s=AGE_S, at_s=0.0) == 0.001
    assert units.statistics()["undecided"] == 1
    assert look(units, AGE_S / 5 + 10, 0.001, age_s=AGE_S + 10, at_s=10.0) == 0.001
    assert units.statistics()["milliseconds"] == 1


def test_only_shims_in_go_may_be_so_old() -> None:
    units = CpuUnits()
    assert look(units, AGE_S, 1.0, age_s=AGE_S, runtime="rust") == 0.001
    values = guest(cpu={"0": {"user": AGE_S}}, more={"kata_shim_agent_answers": (((), 1.0),)})
    assert units.unit_s("a", values, POD, runtime="go", at_s=0.0, now_ns=CREATED_NS + int(AGE_S * 1e9)) == 0.001
    assert set(units.statistics().values()) == {0}


def test_the_shim_s_start_stands_for_the_sandbox_s_where_nobody_knows_it() -> None:
    values = guest(cpu={"0": {"user": AGE_S * 100}}, more={"kata_shim_process_start_time_seconds": (((), 1_600_000_000.0),)})
    assert CpuUnits().unit_s("a", values, None, runtime="go", at_s=0.0, now_ns=int((1_600_000_000 + AGE_S) * 1e9)) == 0.01


def test_nothing_said_nothing_decided_and_nothing_kept() -> None:
    units = CpuUnits()
    for cpu in ({}, {"total": {"user": 7.0}}, {"0": {"user": 2.0**64}}):
        assert units.unit_s("a", guest(cpu=cpu), POD, runtime="go", at_s=0.0, now_ns=CREATED_NS) == 0.001
    assert set(units.statistics().values()) == {0}
    look(units, 1.0, 0.001)
    units.forget("a")
    units.forget("a")
    assert set(units.statistics().values()) == {0}
