"""Operations: what is allowed, what it makes of a record, and what subscribers are told. Pure."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.api.messages import Container, Endpoint, Mount, Resources
from isopod.engine import operations as ops
from isopod.engine.states import TABLE
from isopod.world.errors import AlreadyExists, InUse, InvalidArgument, IsopodError, NotFound, WrongState
from tests.engine.test_bundle import RECORD

ID = RECORD.id


class Shelf:
    """Some records."""

    def __init__(self, *records: Container) -> None:
        self.records = {record.id: record for record in records}

    def get(self, identifier: str) -> Container | None:
        return self.records.get(identifier)

    def id_of(self, name: str) -> str | None:
        return next((record.id for record in self.records.values() if record.name == name), None)


def with_status(status: Any, **changes: Any) -> Shelf:
    return Shelf(msgspec.structs.replace(RECORD, status=status, **changes))


@pytest.mark.row("R14")
def test_a_record_has_all_the_groups_of_fields() -> None:
    fields = set(Container.__struct_fields__)
    assert len(fields) >= 20
    assert fields >= {
        *("id", "name", "created_at_ns", "updated_at_ns", "image", "command", "working_dir", "user", "env", "labels"),
        *("status", "pid", "started_at_ns", "finished_at_ns", "exit_code", "error", "restart_count", "health"),
        *("network", "resources", "mounts"),
    }
    assert {"ip_address", "mac_address", "ports", "network"} <= set(Endpoint.__struct_fields__)
    assert {"memory_bytes_max", "cpus", "pids_max", "disk_bytes_max"} <= set(Resources.__struct_fields__)


@pytest.mark.row("R15")
@pytest.mark.parametrize("before", ["created", "running", "paused", "restarting", "exited"])
@pytest.mark.parametrize("after", ["created", "running", "paused", "restarting", "exited"])
def test_steps_that_the_table_does_not_have_are_refused(before: Any, after: Any) -> None:
    legal = before == after or any(state == before and to == after for (state, _), to in TABLE.items())
    for change in (
        ops.UpdateStatus(ID, after),
        ops.UpdateState(ID, msgspec.structs.replace(ops.state_of(RECORD), status=after)),
    ):
        if legal:
            ops.check(change, with_status(before))
        else:
            with pytest.raises(WrongState, match=f"box is {before}: cannot become {after}"):
                ops.check(change, with_status(before))


@pytest.mark.row("R18")
@pytest.mark.parametrize(
    "mount,error",
    [
        (Mount(source="/data", destination="data"), InvalidArgument),
        (Mount(source="data", destination="/data"), InvalidArgument),
        (Mount(source="/data", destination="/x/../etc"), InvalidArgument),
        (Mount(source="/data/../etc", destination="/x"), InvalidArgument),
        (Mount(source="/data", destination="/"), InvalidArgument),
        (Mount(source="/data", destination="/proc/x"), InvalidArgument),
        (Mount(source="/data", destination="/a\0b"), InvalidArgument),
        (Mount(source="/data", destination=""), InvalidArgument),
        (Mount(source="vol", destination="/x", kind="volume"), InvalidArgument),
        (Mount(source="/other", destination="/there/"), AlreadyExists),
        (Mount(source="/other", destination="//there/."), AlreadyExists),
    ],
)
def test_mounts_that_make_no_sense_are_refused(mount: Mount, error: type[IsopodError]) -> None:
    shelf = with_status("exited", mounts=(Mount(source="/data", destination="/there"),))
    with pytest.raises(error):
        ops.check(ops.AddMount(ID, mount), shelf)


@pytest.mark.row("R18")
def test_mounts_are_changed_of_what_does_not_run_only() -> None:
    good = Mount(source="/data", destination="/x", read_only=True)
    for status in ("starting", "running", "paused", "stopping", "removing"):
        with pytest.raises(WrongState):
            ops.check(ops.AddMount(ID, good), with_status(status))
    shelf = with_status("created")
    ops.check(ops.AddMount(ID, good), shelf)
    made = ops.apply(ops.AddMount(ID, good), RECORD, at_ns=5, revision=9)
    assert made is not None
    assert (made.mounts, made.updated_at_ns, made.revision) == ((good,), 5, 9)
    gone = ops.apply(ops.RemoveMount(ID, "/x/"), made, at_ns=6, revision=10)
    assert gone is not None
    assert gone.mounts == ()
    with pytest.raises(NotFound):
        ops.check(ops.RemoveMount(ID, "/y"), shelf)


@pytest.mark.row("R17")
def test_a_container_is_on_one_network_at_most() -> None:
    attach = ops.AttachNetwork(ID, Endpoint(network="backend"))
    ops.check(attach, Shelf(RECORD))
    on = ops.apply(attach, RECORD, at_ns=1, revision=1)
    assert on is not None
    with pytest.raises(AlreadyExists):
        ops.check(attach, Shelf(on))
    with pytest.raises(InUse) as refused:
        ops.check(ops.AttachNetwork(ID, Endpoint(network="other")), Shelf(on))
    assert "isopod network disconnect backend box" in refused.value.hint
    off = ops.apply(ops.DetachNetwork(ID), on, at_ns=1, revision=2)
    assert off is not None
    assert off.network == Endpoint(network="none")
    with pytest.raises(NotFound):
        ops.check(ops.DetachNetwork(ID), Shelf(off))


@pytest.mark.row("R16", "R35")
@pytest.mark.parametrize(
    "change",
    [
        ops.UpdateResources(ID, Resources(memory_bytes_max=1)),
        ops.UpdateResources(ID, Resources(cpus=0.0)),
        ops.UpdateResources(ID, Resources(pids_max=0)),
        ops.UpdateResources(ID, Resources(disk_bytes_max=1 << 30)),
        ops.UpdateEnvironment(ID, {"": "x"}),
        ops.UpdateEnvironment(ID, {"A=B": "x"}),
        ops.UpdateEnvironment(ID, {"A": "x\0"}),
        ops.UpdateLabels(ID, {"": "x"}),
        ops.UpdateLabels(ID, {"a": "x" * 70_000}),
        ops.UpdateLabels(ID, {str(n): "" for n in range(1025)}),
    ],
)
def test_values_out_of_range_are_refused(change: ops.Operation) -> None:
    with pytest.raises(InvalidArgument):
        ops.check(change, Shelf(RECORD))


def test_what_is_not_there_cannot_be_changed() -> None:
    for change in (
        ops.Delete(ID),
        ops.UpdateLabels(ID, {}),
        ops.UpdateStatus(ID, "running"),
        ops.AddMount(ID, Mount(source="/", destination="/x")),
    ):
        with pytest.raises(NotFound):
            ops.check(change, Shelf())


def test_a_taken_name_or_id_is_refused() -> None:
    for record in (RECORD, msgspec.structs.replace(RECORD, id="b" * 64)):
        with pytest.raises(AlreadyExists):
            ops.check(ops.Create(record), Shelf(RECORD))
    for record in (msgspec.structs.replace(RECORD, id="../x"), msgspec.structs.replace(RECORD, id="b" * 64, name="a/b")):
        with pytest.raises(InvalidArgument):
            ops.check(ops.Create(record), Shelf(RECORD))


@pytest.mark.row("R27")
def test_a_draft_sees_what_came_before_and_leaves_its_base_alone() -> None:
    shelf = Shelf(RECORD)
    draft = ops.Draft(shelf)
    other = msgspec.structs.replace(RECORD, id="b" * 64)
    draft.add([ops.Delete(ID), ops.Create(other)])
    assert draft.get(ID) is None
    assert draft.id_of("box") == other.id
    with pytest.raises(AlreadyExists):
        draft.add([ops.UpdateLabels(other.id, {"a": "b"}), ops.Create(msgspec.structs.replace(RECORD, id="c" * 64))])
    kept = draft.get(other.id)
    assert kept is not None
    assert kept.labels == {}
    assert shelf.records == {ID: RECORD}


@pytest.mark.row("R30")
def test_every_change_tells_what_it_did() -> None:
    def told(change: ops.Operation, record: Container | None = RECORD) -> Any:
        return ops.event(change, record, at_ns=7)

    assert told(ops.Create(RECORD), None).kind == "created"
    assert told(ops.Delete(ID)).kind == "deleted"
    ended = told(ops.UpdateState(ID, msgspec.structs.replace(ops.state_of(RECORD), status="exited", exit_code=3)))
    assert (ended.kind, ended.status_before, ended.status, ended.exit_code) == ("status", "created", "exited", 3)
    assert told(ops.UpdateStatus(ID, "created")) is None
    assert told(ops.UpdateHealth(ID, "healthy")).health_before == "none"
    assert told(ops.UpdateHealth(ID, "none")) is None
    assert told(ops.UpdateLabels(ID, {"a": "b"})).labels == {"a": "b"}
    assert told(ops.UpdateEnvironment(ID, {"a": "b"})).env == {"a": "b"}
    assert told(ops.UpdateResources(ID, Resources(cpus=1.0))).resources.cpus == 1.0
    assert told(ops.AttachNetwork(ID, Endpoint(network="x"))).network == "x"
    assert told(ops.DetachNetwork(ID)).kind == "network"
    assert told(ops.AddMount(ID, Mount(source="/a", destination="/b"))).mount_added.destination == "/b"
    assert told(ops.RemoveMount(ID, "/b")).mount_removed == "/b"


NAMES = st.sampled_from(["a", "b", "c"])
IDS = st.sampled_from(["a" * 64, "b" * 64, "c" * 64])
CHANGES = st.one_of(
    st.builds(lambda i, n: ops.Create(msgspec.structs.replace(RECORD, id=i, name=n)), IDS, NAMES),
    st.builds(ops.Delete, IDS),
    st.builds(ops.UpdateStatus, IDS, st.sampled_from(["created", "starting", "running", "exited"])),
    st.builds(lambda i, n: ops.UpdateLabels(i, {"n": str(n)}), IDS, st.integers(0, 9)),
    st.builds(lambda i, n: ops.AddMount(i, Mount(source="/s", destination=f"/{n}")), IDS, NAMES),
    st.builds(lambda i, n: ops.RemoveMount(i, f"/{n}"), IDS, NAMES),
)


@given(st.lists(st.lists(CHANGES, min_size=1, max_size=4), max_size=20))
def test_batches_are_all_or_nothing_and_names_stay_unique(batches: list[list[ops.Operation]]) -> None:
    draft = ops.Draft(Shelf())
    model = Shelf()
    for batch in batches:
        trial = Shelf(*model.records.values())
        try:
            for change in batch:
                ops.check(change, trial)
                made = ops.apply(change, trial.get(change.id), at_ns=0, revision=0)
                if made is None:
                    del trial.records[change.id]
                else:
                    trial.records[change.id] = made
        except IsopodError:
            with pytest.raises(IsopodError):
                draft.add(batch)
        else:
            draft.add(batch)
            model = trial
        for identifier in ("a" * 64, "b" * 64, "c" * 64):
            assert draft.get(identifier) == model.get(identifier)
        for name in "abc":
            assert draft.id_of(name) == model.id_of(name)
