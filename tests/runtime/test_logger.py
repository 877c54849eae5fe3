"""Logger: one bounded JSON line per event, without secrets, and never an exception."""

import json
from datetime import datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.runtime.logger import LINE_BYTES_MAX, REDACTED, Level, Logger, is_secret
from isopod.world.world import World


class FixedClock:
    """A clock that stands."""

    def __init__(self, now_ns: int = 1_700_000_000_123_456_789) -> None:
        self.at_ns = now_ns

    def now_ns(self) -> int:
        return self.at_ns

    def monotonic_ns(self) -> int:
        return self.at_ns


def make(level: Level = "debug") -> tuple[Logger, list[bytes]]:
    lines: list[bytes] = []
    return Logger(lines.append, FixedClock(), level=level), lines


def test_a_line_is_json_with_time_level_event_and_facts() -> None:
    logger, lines = make()
    logger.info("container.started", name="web", pid=7, ratio=0.5, ok=True, none=None, ports={80: 8080}, argv=("a", "b"))
    assert lines[0].endswith(b"}\n")
    assert json.loads(lines[0]) == {
        "time": "2023-11-14T22:13:20.123456Z", "level": "info", "event": "container.started", "name": "web", "pid": 7, "ratio": 0.5,
        "ok": True, "none": None, "ports": {"80": 8080}, "argv": ["a", "b"],
    }  # fmt: skip


async def test_times_are_the_world_s(world: World) -> None:
    lines: list[bytes] = []
    logger = Logger(lines.append, world.clock)
    before = world.clock.now_ns()
    logger.info("x")
    at = datetime.fromisoformat(json.loads(lines[0])["time"])
    assert before // 1000 <= round(at.timestamp() * 1e6) <= world.clock.now_ns() // 1000


@pytest.mark.parametrize("level,expected", [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_levels(level: Level, expected: int) -> None:
    logger, lines = make(level)
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    logger.error("d")
    assert len(lines) == expected
    assert logger.is_enabled("error")
    assert logger.is_enabled("debug") == (level == "debug")


def test_bound_facts_are_in_every_line_and_later_ones_win() -> None:
    logger, lines = make()
    child = logger.bind(shard=0, peer="a").bind(peer="b")
    child.info("x", shard=1)
    logger.info("y")
    assert json.loads(lines[0]) | {"time": ""} == {"time": "", "level": "info", "event": "x", "shard": 1, "peer": "b"}
    assert set(json.loads(lines[1])) == {"time", "level", "event"}


@pytest.mark.parametrize(
    "key", ["password", "DB_PASSWORD", "api-key", "auth_token", "Authorization", "client_secret", "private_key", "Cookie"]
)
def test_secrets_do_not_leave(key: str) -> None:
    logger, lines = make()
    logger.bind(**{key: "hunter2"}).error(
        "x", env={key: "hunter2", "PATH": "/bin"}, nested=[{"a": {key: "hunter2"}}], **{f"{key}_2": "hunter2"}
    )
    assert b"hunter2" not in lines[0]
    assert json.loads(lines[0])[key] == REDACTED
    assert json.loads(lines[0])["env"] == {key: REDACTED, "PATH": "/bin"}


def test_ordinary_names_are_no_secrets() -> None:
    assert not any(is_secret(key) for key in ("name", "pass", "key", "path", "auth", "compass"))


def test_structs_and_other_objects_are_shown_as_what_they_are() -> None:
    class Point(msgspec.Struct):
        x: int
        secret: str

    logger, lines = make()
    logger.info("p", point=Point(1, "hunter2"), error=ValueError("no"), data=b"by\xfftes", big=1 << 70)
    line = json.loads(lines[0])
    assert line["point"] == {"x": 1, "secret": REDACTED}
    assert (line["error"], line["data"], line["big"]) == ("no", "by\ufffdtes", hex(1 << 70))


deep = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50) | st.binary(max_size=50),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=5),
    max_leaves=30,
)


@given(st.dictionaries(st.from_regex("[a-z]{1,8}", fullmatch=True), deep, max_size=5))
def test_anything_can_be_logged(facts: dict[str, object]) -> None:
    logger, lines = make()
    logger.info("x", **facts)
    line = json.loads(lines[0])
    assert line["level"] in ("info", facts.get("level"))
    assert len(lines[0]) <= LINE_BYTES_MAX


def test_lines_are_bounded() -> None:
    logger, lines = make()
    logger.info("long", text="x" * 100_000, many=["y" * 3000] * 100, traceback="begin " + "z" * 100_000 + " end")
    logger.info("text", text="\udc80" + "x" * 100_000, traceback="begin " + "z" * 100_000 + " end", items=list(range(1000)))
    assert all(len(line) <= LINE_BYTES_MAX for line in lines)
    assert json.loads(lines[0])["too_long_bytes"] > LINE_BYTES_MAX
    line = json.loads(lines[1])
    assert "characters" in line["text"]
    assert line["traceback"].startswith("begin ")
    assert line["traceback"].endswith(" end")
    assert len(line["items"]) == 64


def test_a_line_that_cannot_be_written_is_counted() -> None:
    def broken(line: bytes) -> None:
        raise BlockingIOError(11, "full")

    logger = Logger(broken, FixedClock())
    logger.info("x")
    logger.bind(a=1).error("y")
    assert logger.n_dropped == 2


def test_seconds_are_formatted_anew() -> None:
    clock = FixedClock(1_700_000_000_999_999_999)
    lines: list[bytes] = []
    logger = Logger(lines.append, clock)
    logger.info("x")
    clock.at_ns += 1
    logger.info("x")
    assert [json.loads(line)["time"] for line in lines] == ["2023-11-14T22:13:20.999999Z", "2023-11-14T22:13:21.000000Z"]
