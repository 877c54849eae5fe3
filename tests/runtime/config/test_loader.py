"""Row S23: any schema from TOML, YAML and JSON, drop-ins, environment and flags; errors name the key and its place; the builder."""

import json
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isopod.runtime.config import (
    SEASTAR,
    Alias,
    ConfigBuilder,
    ConfigConflict,
    ConfigLoader,
    FileText,
    Origin,
    RuntimeConfig,
    show,
)
from isopod.runtime.config.layers import make_names
from isopod.runtime.config.schema import describe, flatten, leaves
from isopod.runtime.config.texts import parse
from isopod.world.errors import InvalidArgument


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """A section inside a section."""

    size: Annotated[int, msgspec.Meta(ge=1, le=8)] = 4
    hosts: tuple[str, ...] = ()


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """A section."""

    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 80
    tls: bool = False
    pool: Pool = Pool()
    limits: dict[str, int] = {}

    def __post_init__(self) -> None:
        if self.tls and self.port == 80:
            raise ConfigConflict("port", "80 is not for TLS")


class Shop(msgspec.Struct, frozen=True, kw_only=True):
    """An application's own settings."""

    name: str
    rate: float = 0.5
    server: Server = Server()
    password: Annotated[str, msgspec.Meta(extra={"secret": True}, min_length=3)] | None = None


LOADER = ConfigLoader(Shop, prefix="SHOP", aliases=(Alias("OLD_SHOP_PORT", "server.port"), Alias("OLDER_PORT", "server.port")))
TOML = 'name = "a"\n[server]\nport = 1\n[server.pool]\nsize = 2\nhosts = ["x", "y"]\n'
YAML = "name: a\nserver:\n  port: 1\n  pool: {size: 2, hosts: [x, y]}\n"
JSON = '{"name": "a", "server": {"port": 1, "pool": {"size": 2, "hosts": ["x", "y"]}}}'


@pytest.mark.row("S23")
@pytest.mark.parametrize("path,text", [("/a.toml", TOML), ("/a.yaml", YAML), ("/a.yml", YAML), ("/a.json", JSON)])
def test_one_configuration_in_three_formats(path: str, text: str) -> None:
    config = LOADER.load(files=[FileText(path, text)]).config
    assert config == Shop(name="a", server=Server(port=1, pool=Pool(size=2, hosts=("x", "y"))))


@pytest.mark.row("S23")
def test_the_last_layer_that_speaks_wins_and_is_remembered() -> None:
    files = [FileText("/c.toml", TOML), FileText("/c.d/10.json", '{"server": {"pool": {"size": 3}}}', "drop-in")]
    layers: dict[str, Any] = {"files": files}
    seen = []
    for more in (
        {},
        {"environment": {"SHOP_SERVER_POOL_SIZE": "5"}},
        {"flags": {"--server-pool-size": "6"}},
        {"values": {"server.pool.size": 7}},
    ):
        layers |= more
        loaded = LOADER.load(**layers)
        seen.append((loaded.config.server.pool.size, str(loaded.origin("server.pool.size"))))
    assert seen == [
        (3, "drop-in /c.d/10.json"),
        (5, "environment SHOP_SERVER_POOL_SIZE"),
        (6, "flag --server-pool-size"),
        (7, "builder"),
    ]
    loaded = LOADER.load(**layers)
    assert (loaded.origin("server.port"), loaded.origin("rate")) == (Origin("file", "/c.toml"), Origin("default"))
    assert loaded.files == ("/c.toml", "/c.d/10.json")


@pytest.mark.parametrize(
    "text,value", [("true", True), ("1", True), ("yes", True), ("ON", True), ("false", False), ("0", False), ("no", False), ("off", False)]
)
def test_booleans_of_the_environment(text: str, value: bool) -> None:
    environment = {"SHOP_SERVER_TLS": text, "SHOP_SERVER_PORT": "443", "SHOP_NAME": "n"}
    assert LOADER.load(environment=environment).config.server.tls is value


def test_lists_and_tables_of_the_environment() -> None:
    environment = {"SHOP_NAME": "n", "SHOP_SERVER_POOL_HOSTS": "a, b,", "SHOP_SERVER_LIMITS": '{"x": 1}', "SHOP_RATE": "2.5"}
    config = LOADER.load(environment=environment).config
    assert (config.server.pool.hosts, config.server.limits, config.rate) == (("a", "b"), {"x": 1}, 2.5)
    assert LOADER.load(environment={"SHOP_NAME": "n", "SHOP_SERVER_POOL_HOSTS": '["a,b"]'}).config.server.pool.hosts == ("a,b",)


@pytest.mark.row("S23")
@pytest.mark.parametrize(
    "how,message,hint",
    [
        ({"files": [FileText("/c.toml", "nmae = 'x'")]}, "key in /c.toml 'nmae': unknown", "did you mean name?"),
        ({"files": [FileText("/c.yaml", "server: {prt: 3}")]}, "key in /c.yaml 'server.prt': unknown", "did you mean server.port?"),
        ({"files": [FileText("/c.json", '{"size": 3}')]}, "key in /c.json 'size': unknown", "did you mean server.pool.size?"),
        ({"files": [FileText("/c.toml", "zzz = 1")]}, "key in /c.toml 'zzz': unknown", "known are: name, rate, "),
        ({"files": [FileText("/c.toml", "server = 3")]}, "server in /c.toml '3': want a table: [server]", ""),
        ({"files": [FileText("/c.toml", "[server]\nport = 0")]}, "server.port in /c.toml '0': want a whole number from 1 to 65535", ""),
        ({"files": [FileText("/c.toml", "[server]\nport = '80'")]}, "server.port in /c.toml '80': want a whole number", ""),
        ({"files": [FileText("/c.toml", "name = 'a'\n[server]\ntls = true")]}, "server.port '80': 80 is not for TLS", ""),
        ({"files": [FileText("/c.toml", "name='a'\n[server]\ntls = true\nport = 80")]}, "server.port in /c.toml '80': 80 is not for", ""),
        ({"environment": {"SHOP_SERVER_TLS": "maybe"}}, "SHOP_SERVER_TLS 'maybe': want true or false", ""),
        ({"environment": {"SHOP_SERVER_LIMITS": "{"}}, "SHOP_SERVER_LIMITS '{': want a table", ""),
        ({"environment": {"OLD_SHOP_PORT": "x"}}, "OLD_SHOP_PORT 'x': want a whole number from 1 to 65535", ""),
        ({"environment": {"SHOP_PASSWORD": "no"}}, "SHOP_PASSWORD '[redacted]': want a text, not empty", ""),
        ({"flags": {"--server-prt": "3"}}, "flag '--server-prt': unknown", "did you mean --server-port?"),
        ({"flags": {"--rate": ""}}, "--rate '': must not be empty", ""),
        ({"values": {"rate": "fast"}}, "rate 'fast': want a number", ""),
        ({}, "setting 'name': missing", "say it in a file, or as SHOP_NAME"),
    ],
)
def test_what_does_not_fit_is_refused_by_key_place_and_what_would_fit(how: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        LOADER.load(**how)
    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_a_wrong_value_is_refused_also_where_a_later_layer_hides_it() -> None:
    with pytest.raises(InvalidArgument, match="server.port in /c.toml"):
        LOADER.load(files=[FileText("/c.toml", "name = 'a'\n[server]\nport = 0")], flags={"--server-port": "1"})


@pytest.mark.row("S23")
def test_aliases_speak_where_the_own_variable_is_silent() -> None:
    def load(**environment: str) -> tuple[int, str, tuple[str, ...]]:
        loaded = LOADER.load(environment={"SHOP_NAME": "n", **environment})
        return loaded.config.server.port, loaded.origin("server.port").place, loaded.notes

    assert load(OLD_SHOP_PORT="81") == (81, "OLD_SHOP_PORT", ())
    assert load(OLD_SHOP_PORT="81", SHOP_SERVER_PORT="82") == (
        82,
        "SHOP_SERVER_PORT",
        ("OLD_SHOP_PORT is passed over: SHOP_SERVER_PORT is set",),
    )
    assert load(OLD_SHOP_PORT="81", OLDER_PORT="83") == (81, "OLD_SHOP_PORT", ("OLDER_PORT is passed over: OLD_SHOP_PORT is set",))
    assert load(SHOP_SERVER_PROT="1")[2] == ("SHOP_SERVER_PROT is no setting and is not looked at: did you mean SHOP_SERVER_PORT?",)
    assert load(SHOP_KEEPER="x")[2] == ()


@pytest.mark.row("S23")
def test_every_variable_of_the_reference_reaches_its_setting() -> None:
    values = {
        "bool": "yes", "int": "7", "str": "x", "app.environment": "production", "database.url": "sqlite:///x", "logging.level": "warn",
        "logging.format": "json", "tls.min_version": "1.3", "websocket.max_frame_size": "5", "tls.ca_file": "/ca",
    }  # fmt: skip
    loader = ConfigLoader(RuntimeConfig)
    assert len(SEASTAR) == len({alias.variable for alias in SEASTAR}) == len(loader.names.aliases) == 34
    environment = {}
    for alias in SEASTAR:
        kind = (
            "bool" if loader.names.leaves[alias.key].is_flag else "int" if "whole number" in loader.names.leaves[alias.key].want else "str"
        )
        environment[alias.variable] = values.get(alias.key, values[kind])
    loaded = loader.load(environment=environment)
    found = flatten(loaded.config)
    for alias in SEASTAR:
        assert loaded.origin(alias.key) == Origin("environment", alias.variable)
        shown = str(found[alias.key]).lower()
        assert shown == {"yes": "true", "warn": "warning"}.get(environment[alias.variable], environment[alias.variable])
    assert {"SEASTAR_SMP_NUM_SHARDS", "SEASTAR_LOG_LEVEL", "SEASTAR_TLS_CA_FILE"} <= set(environment)


@pytest.mark.parametrize(
    "key,value",
    [
        ("app.name", ""), ("app.environment", "moon"), ("reactor.task_queue_size", 0), ("reactor.task_queue_size", 1_000_001),
        ("reactor.io_polling_timeout_ms", 60_001), ("smp.num_shards", 1025), ("smp.message_queue_size", 10_000_001),
        ("database.url", "redis://x"), ("metrics.export_interval_secs", 86_401), ("metrics.http_server.port", 0),
        ("logging.level", "loud"), ("logging.file.max_size_mb", 10_241), ("tls.min_version", "1.1"),
        ("websocket.max_message_size", (100 << 20) + 1), ("websocket.max_connections", 0),
    ],
)  # fmt: skip
def test_the_reference_s_ranges(key: str, value: object) -> None:
    with pytest.raises(InvalidArgument, match=f"^{key} "):
        ConfigBuilder(RuntimeConfig).set(key, value).build()


@pytest.mark.row("S23")
def test_the_builder_checks_what_it_builds() -> None:
    config = ConfigBuilder(RuntimeConfig).smp(num_shards=2).logging(level="debug").section("metrics.http_server", port=9100).build()
    assert (config.smp.num_shards, config.logging.level, config.smp.pin_threads) == (2, "debug", True)
    assert config.metrics.http_server is not None
    assert (config.metrics.http_server.bind, config.metrics.http_server.port, config.tls) == ("127.0.0.1", 9100, None)
    layered = ConfigBuilder(RuntimeConfig).smp(num_shards=2)
    built = layered.build(
        files=[FileText("/a.toml", "[smp]\nnum_shards = 8\npin_threads = false")], environment={"ISOPOD_SMP_NUM_SHARDS": "9"}
    )
    assert (built.smp.num_shards, built.smp.pin_threads) == (2, False)
    with pytest.raises(InvalidArgument, match=r"smp.num_shard.*unknown") as caught:
        ConfigBuilder(RuntimeConfig).smp(num_shard=2)
    assert caught.value.hint == "did you mean smp.num_shards?"
    with pytest.raises(AttributeError):
        _ = ConfigBuilder(RuntimeConfig).smpp
    for wrong, key in (
        (ConfigBuilder(RuntimeConfig).websocket(max_frame_size=2 << 20), "websocket.max_frame_size"),
        (ConfigBuilder(RuntimeConfig).database(url="sqlite:///x", min_connections=20), "database.min_connections"),
        (ConfigBuilder(RuntimeConfig).tls(cert_file="/c"), "tls.key_file"),
        (ConfigBuilder(RuntimeConfig).tls(cert_file="/c", key_file="/k", require_client_cert=True), "tls.require_client_cert"),
    ):
        with pytest.raises(InvalidArgument, match=key):
            wrong.build()


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("/a.toml", "a = 1\na = 2", "not TOML: "),
        ("/a.json", '{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ("/a.json", '{"x": {"b": 1, "b": 2}}', "the key 'b' stands twice"),
        ("/a.yaml", "a: 1\nb:\n  c: 1\n  c: 2\n", "the key 'c' stands twice (line 4)"),
        ("/a.yaml", "a: !!python/object/apply:os.system ['true']", "not YAML: "),
        ("/a.yaml", "a: [", "not YAML: "),
        ("/a.yaml", "a: &x [1]\nb: [" + "*x, " * 65 + "]", "not YAML: more than 64 aliases"),
        ("/a.yaml", "a: &x0 [1, 2]\n" + "".join(f"a{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 32)), "not YAML: more than"),
        ("/a.yaml", "a0: &x0 {k: v}\n" + "".join(f"a{i}: &x{i} {{<<: [*x{i - 1}, *x{i - 1}]}}\n" for i in range(1, 32)), "not YAML: more "),
        ("/a.yaml", "".join(f"k{i}: 1\n" for i in range(50_000)), "not YAML: more than 16384 values"),
        ("/a.json", "{" + "".join(f'"k{i}": 1, ' for i in range(60_000)) + '"k59999": 1}', "the key 'k59999' stands twice"),
        ("/a.yaml", "a: !!bool 'perhaps'", "not YAML: "),
        ("/a.yaml", "a: !!int ''", "not YAML: "),
        ("/a.yaml", "a: !!timestamp 'soon'", "not YAML: "),
        ("/a.yaml", "- a\n- b", "want a table"),
        ("/a.yaml", "1: a", "want a table"),
        ("/a.json", "[1]", "want a table"),
        ("/a.json", '{"a": NaN}', "not JSON: NaN is no number"),
        ("/a.json", "{'a'}", "not JSON: "),
        ("/a.json", "[" * 100_000, "nested too deeply"),
        ("/a.yaml", "[" * 20_000, "nested too deeply"),
        ("/a.toml", "x = " + "[" * 20_000, ""),
        ("/a.toml", "#" * ((1 << 20) + 1), "larger than 1 MiB"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(text, name)
    assert str(caught.value).startswith(f"config file '{name}': {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name,text", [("/a.toml", ""), ("/a.yaml", ""), ("/a.yaml", "# nothing"), ("/a.json", " ")])
def test_an_empty_file_says_nothing(name: str, text: str) -> None:
    assert parse(text, name) == {}


@given(st.text(max_size=60), st.sampled_from(["/a.toml", "/a.yaml", "/a.json"]))
def test_any_text_is_a_configuration_or_refused(text: str, name: str) -> None:
    try:
        LOADER.load(files=[FileText(name, text)])
    except InvalidArgument as error:
        assert "\n" not in str(error)


def test_types_in_words() -> None:
    words = {leaf.key: leaf.want for leaf in leaves(Shop)}
    assert words["server.pool.size"] == "a whole number from 1 to 8"
    assert words["rate"] == "a number"
    assert words["server.pool.hosts"] == "a list"
    assert describe(Annotated[float, msgspec.Meta(gt=0, lt=1)]) == "a number above 0 and below 1"
    assert describe(Annotated[int, msgspec.Meta(ge=3)] | None) == "a whole number of at least 3"
    assert describe(Annotated[int, msgspec.Meta(lt=3)]) == "a whole number below 3"


def test_two_settings_never_share_a_name() -> None:
    class Inner(msgspec.Struct, frozen=True):
        b_c: int = 0

    class Other(msgspec.Struct, frozen=True):
        c: int = 0

    class Outer(msgspec.Struct):
        a: Inner = Inner()
        a_b: Other = Other()

    with pytest.raises(ValueError, match=r"a_b.c and a.b_c are both called X_A_B_C"):
        make_names(leaves(Outer), prefix="X", aliases=())


@pytest.mark.row("S23")
def test_show_says_every_value_and_where_it_came_from() -> None:
    loaded = LOADER.load(files=[FileText("/c.toml", TOML)], environment={"SHOP_PASSWORD": "hunter2"})
    table = show(loaded.config, loaded.origins, with_origin=True)
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert lines["server.port"].split() == ["server.port", "1", "file", "/c.toml"]
    assert lines["rate"].split() == ["rate", "0.5", "default"]
    assert lines["password"].split() == ["password", '"[redacted]"', "environment", "SHOP_PASSWORD"]
    assert "ORIGIN" not in show(loaded.config, loaded.origins)
    assert json.loads(show(loaded.config, loaded.origins, form="json"))["server"]["pool"] == {"size": 2, "hosts": ["x", "y"]}
    entries = json.loads(show(loaded.config, loaded.origins, form="json", with_origin=True))
    assert {"key": "server.port", "value": 1, "layer": "file", "place": "/c.toml"} in entries
    for with_origin in (False, True):
        odd = Shop(name='a "quoted"\n\x7f\\ name', server=Server(limits={"a.b c": 1, "d": 2}, pool=Pool(hosts=("x",))))
        text = show(odd, loaded.origins, form="toml", with_origin=with_origin)
        assert LOADER.load(files=[FileText("/again.toml", text)]).config == odd
        assert json.loads(show(odd, {}, form="json"))["server"]["limits"] == {"a.b c": 1, "d": 2}


def test_what_is_huge_or_contains_itself_is_refused_in_one_short_line() -> None:
    for name, text in (
        ("/a.yaml", "server: {pool: {hosts: &x [*x]}}"),
        ("/a.yaml", "server: &x [*x]"),
        ("/a.yaml", "server: &x {server: *x}"),
        ("/a.yaml", "rate: '" + "x" * 100_000 + "'"),
        ("/a.json", json.dumps({"k" * 100_000: 1})),
        ("/a.json", '{"server": {"pool": {"hosts": ' + "[" * 900 + "]" * 900 + "}}}"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            LOADER.load(files=[FileText(name, text)])
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)
