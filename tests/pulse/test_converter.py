"""A sandbox from round to round: units that stay, rates that come of it, and nothing left when it goes."""

import time

from isopod.pulse.converter import Converter
from isopod.pulse.model import Families, Target
from tests.pulse.guests import CPU, POD, SANDBOX, guest
from tests.pulse.test_cadvisor import LOCAL, figure
from tests.pulse.test_rates import Entry

BUDGET_S = 0.1e-3


def cores(converter: Converter, identifier: str) -> float | None:
    return converter.rates.rows([Entry(identifier, POD)], 100.0)[0].cpu_cores


def test_rounds_of_a_sandbox_whose_guest_counts_ticks() -> None:
    converter = Converter()
    target = Target(SANDBOX, "go", "")
    start_s = POD.created_ns // 10**9
    families: Families = {}
    for up_s in (100, 110):
        ticks = {item: value / 1000 * up_s for item, value in CPU.items()}
        values = guest(cpu={"total": ticks, "0": {"idle": up_s * 100.0 - 760, "user": 760.0}})
        families = converter.take(target, values, POD, at_s=float(up_s), now_ns=(start_s + up_s) * 10**9)
    assert figure(families, "container_cpu_usage_seconds_total", cpu="total") == 8.36
    assert figure(families, "container_last_seen") == start_s + 110
    assert cores(converter, SANDBOX) == 0.076
    assert converter.units.statistics()["ticks"] == 1
    converter.again(SANDBOX, 120.0)
    assert cores(converter, SANDBOX) == 0.0
    converter.forget(SANDBOX)
    assert (len(converter.rates), converter.units.statistics()["ticks"]) == (0, 0)


def test_a_local_container() -> None:
    converter = Converter()
    families: Families = {}
    for at_s, cpu_s in ((1.0, 12.0), (3.0, 14.0)):
        families = converter.take_local(LOCAL._replace(cpu_s=cpu_s), at_s=at_s, now_ns=5)
    assert b"14\n" in families["container_cpu_usage_seconds_total"].text
    assert cores(converter, LOCAL.id) == 1.0


def test_it_is_cheap() -> None:
    """The best of many rounds, so that a busy machine does not decide; a round has some 100 figures to look at."""
    converter = Converter()
    target, values = Target(SANDBOX, "go", ""), guest()
    best_s = 1.0
    for index in range(200):
        begun_s = time.process_time()
        for _ in range(5):
            converter.take(target, values, POD, at_s=float(index), now_ns=index)
        best_s = min(best_s, (time.process_time() - begun_s) / 5)
    assert best_s < BUDGET_S
