"""The policy: what of a round is taken in, and a file that is followed."""

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.pulse import core
from isopod.pulse.labels import kata_labels
from isopod.pulse.model import Families, Pod
from isopod.pulse.policy import HIDDEN, OVER_BUDGET, RELABELLED, Policy, PolicyConfig, PolicyFile, parse_policy, read_policy
from isopod.testing import wait_for_condition_with_backoff
from isopod.world.errors import InvalidArgument, UnavailableError
from isopod.world.world import World
from tests.pulse.shims import FakeShims
from tests.pulse.test_agent import asking
from tests.telemetry.kit import Memo

pytestmark = pytest.mark.row("T19")

PROD, TEST = Pod("u1", "web", "prod"), Pod("u2", "try", "test")
A = "a" * 64


def families(n_series: int = 2, *, value: int = 1) -> Families:
    body = b"".join(b'kata_x{n="%d"} %d\n' % (n, value) for n in range(n_series))
    return core.read(
        b"# TYPE kata_x gauge\n" + body + b"# TYPE kata_y gauge\nkata_y 1\n", kata_labels("s", PROD), core.Rules(), {}
    ).families


def policy(**told: Any) -> Policy:
    return Policy(msgspec.convert(told, PolicyConfig))


def take(chosen: Policy, identifier: str = "s", pod: Pod | None = PROD, *, now_s: float = 0.0, **told: Any) -> Any:
    return chosen.take(identifier, pod, told.get("families", families()), containers={}, before=told.get("before", {}), now_s=now_s)


def test_without_a_policy_all_is_taken() -> None:
    assert Policy().is_open
    told = families()
    assert take(Policy(), families=told).families is told


def test_rules_leave_out_what_they_say_and_that_is_counted() -> None:
    chosen = policy(metric_relabel_configs=[{"source_labels": ["__name__"], "regex": "kata_x", "action": "drop"}])
    taken = take(chosen)
    assert list(taken.families) == ["kata_y"]
    assert taken.dropped == {RELABELLED: 2}


def test_namespaces_are_allowed_or_denied() -> None:
    allowing = policy(namespaces={"allow": ["prod"]})
    assert take(allowing).families
    assert take(allowing, pod=TEST).dropped == {HIDDEN: 3}
    assert take(allowing, pod=None).dropped == {HIDDEN: 3}, "nobody has said whose it is"
    denying = policy(namespaces={"deny": ["test"]})
    assert take(denying).families
    assert take(denying, pod=None).families
    assert not take(denying, pod=TEST).families


def test_a_budget_holds_for_its_namespace_and_is_freed_again() -> None:
    chosen = policy(series_budgets={"namespaces": {"prod": 7}})
    assert take(chosen, "one").families
    assert take(chosen, "two").families
    assert take(chosen, "three").dropped == {OVER_BUDGET: 3}
    assert take(chosen, "other", TEST).families, "another namespace has no budget"
    assert take(chosen, "one").families, "who was there first stays"
    assert not take(chosen, "one", families=families(10)).families, "unless it grows too large itself"
    assert take(chosen, "three").families
    chosen.forget("two")
    assert take(chosen, "one").families
    assert chosen.config.series_budgets.default is None


def test_the_default_budget_is_one_for_each_namespace() -> None:
    chosen = policy(series_budgets={"default": 3, "namespaces": {"test": 6}})
    assert take(chosen, "one").families
    assert not take(chosen, "two").families
    assert take(chosen, "three", TEST).families
    assert take(chosen, "four", TEST).families


def test_a_family_with_an_interval_is_taken_that_rarely() -> None:
    chosen = policy(family_intervals_s={"kata_x": 100})
    first = take(chosen, families=families(value=1)).families
    second = take(chosen, families=families(value=2), before=first, now_s=60.0).families
    assert second["kata_x"] is first["kata_x"]
    third = take(chosen, families=families(value=3), before=second, now_s=100.0).families
    assert b" 3\n" in third["kata_x"].text
    fourth = take(chosen, families=families(value=4), before=third, now_s=160.0).families
    assert fourth["kata_x"] is third["kata_x"]


def test_a_file_says_all_of_it() -> None:
    text = b"""
metric_relabel_configs:
  - {source_labels: [__name__], regex: kata_shim_go_.*, action: drop}
namespaces: {allow: [prod, staging]}
series_budgets: {default: 50000, namespaces: {prod: 200000}}
family_intervals_s: {kata_guest_vm_stat: 300}
"""
    config = parse_policy(text, "/p").config
    assert config.metric_relabel_configs[0].action == "drop"
    assert (config.namespaces.allow, config.series_budgets.namespaces) == (("prod", "staging"), {"prod": 200_000})
    assert config.family_intervals_s == {"kata_guest_vm_stat": 300}
    assert parse_policy(b"", "/p").is_open


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"\xff", "UTF-8"),
        (b"a: [", "/p"),
        (b"odd: 1", "odd"),
        (b"- 1", "object"),
        (b"metric_relabel_configs: [{action: explode}]", "explode"),
        (b"metric_relabel_configs: [{regex: '('}]", "rule '1'"),
        (b"metric_relabel_configs: [{target_label: sandbox_id}]", "says whose"),
        (b"family_intervals_s: {x: 0}", "> 0|greater"),
        (b"series_budgets: {default: -1}", ">= 0|-1"),
        (b"a: !!python/object/apply:os.system [id]", "tag"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(text: bytes, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        parse_policy(text, "/p")


CRASHING = (
    "namespaces: {deny: [2020-02-30]}", "x: 0x_", "x: 0b_", "x: !!float abc", "x: !!int ''", "x: !!bool foo", "x: !!timestamp foo",
    f"x: {'7' * 5000}", "x: 2020-01-01T00:00:00+99:99", "x: 1" + ":59" * 200 + ".5", "x: !!binary é", "x: !!int '-'",
)  # fmt: skip
"""Values that are of no type in which they are written."""


@pytest.mark.parametrize("text", CRASHING)
def test_a_value_that_is_not_of_its_type_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^policy '/p': ") as caught:
        parse_policy(text.encode(), "/p")
    assert len(caught.value.message) < 400 and "\n" not in caught.value.message


def test_a_text_that_nothing_can_show_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no Unicode"):
        parse_policy(b'namespaces: {deny: ["\\uD800"]}', "/p")


TAGS = st.sampled_from(
    ["", "!!int", "!!float", "!!bool", "!!timestamp", "!!binary", "!!null", "!!str", "!!set", "!!omap", "!!pairs", "!!map"]
)
SCALARS = st.one_of(
    st.text("0123456789abxo_:.-+eTZ ", max_size=24),
    st.text(max_size=12).map(repr),
    st.sampled_from(["''", "{}", "[]", "[[1, 2]]", "{a: b}", ".nan", ".inf", "1e999", "=", "<<", "&a [*a]", "2020-13-01", "0o9", "0_"]),
)
PLACES = st.sampled_from(
    ["{}", "namespaces: {{deny: [{}]}}", "series_budgets: {{default: {}}}", "family_intervals_s: {{x: {}}}", "? {}\n: 1"]
)


@given(PLACES, TAGS, SCALARS)
def test_whatever_a_value_is_it_is_taken_or_refused(place: str, tag: str, scalar: str) -> None:
    try:
        policy = parse_policy(place.format(f"{tag} {scalar}").encode(errors="surrogatepass"), "/p")
    except InvalidArgument:
        return
    assert msgspec.json.encode(policy.config)


async def test_a_file_that_is_not_there_is_an_error(world: World, folder: str) -> None:
    with pytest.raises(UnavailableError, match="policy"):
        await read_policy(world.disk, f"{folder}/none.yaml")


@pytest.mark.virtual_time
async def test_a_file_is_followed_and_nonsense_leaves_what_holds(world: World, folder: str) -> None:
    path = f"{folder}/policy.yaml"
    await world.disk.make_directory(folder)
    await world.disk.write(path, b"namespaces: {deny: [a]}")
    adopted: list[Policy] = []
    memo = Memo(world.clock)
    followed = PolicyFile(world.disk, path, on_change=adopted.append, clock=world.clock, logger=memo.logger)
    await followed.open()
    following = asyncio.get_running_loop().create_task(followed.follow())
    try:
        await world.disk.write(path, b"namespaces: {deny: [b]}")
        await wait_for_condition_with_backoff(lambda: len(adopted) == 2, timeout_s=20.0)
        assert adopted[-1].config.namespaces.deny == ("b",)
        await world.disk.write(path, b"namespaces: {deny: b")
        followed.ask()
        await wait_for_condition_with_backoff(lambda: not followed.is_good, timeout_s=20.0)
        await world.disk.write(path, b"namespaces: {deny: [b]}")
        followed.ask()
        await wait_for_condition_with_backoff(lambda: followed.is_good, timeout_s=20.0)
        assert len(adopted) == 2, "what holds already is not adopted again"
        assert memo.events().count("pulse.policy_refused") == 1
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_an_agent_holds_to_its_policy_and_to_the_next_one(world: World, folder: str) -> None:
    path = f"{folder}/policy.yaml"
    await world.disk.make_directory(folder)
    await world.disk.write(path, b"namespaces: {allow: [prod]}")
    async with FakeShims(world, f"{folder}/sbs") as shims, asking(world, folder, policy_file=path, interval_s=0.2) as asked:
        await shims.add(A)
        await asked.until(lambda: asked.up(A))
        assert await asked.values("kata_shim_threads") == {}
        asked.agent.describe("cri", {A: PROD})
        await asked.until(lambda: bool(asked.agent.store.entries()[0].families))
        assert await asked.values("kata_shim_threads") == {A: 7}
        await world.disk.write(path, b"metric_relabel_configs: [{source_labels: [__name__], regex: kata_shim_threads, action: drop}]")
        asked.agent.reload()
        await asked.until(lambda: not asked.agent.store.entries()[0].families)
        _, text = await asked.get("/metrics")
        assert 'reason="relabelled"' in text
