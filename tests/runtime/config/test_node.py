"""Row R34: every path and setting by flag, environment and config file, their precedence, and the reference's layout."""

import pytest

from isopod.runtime.config import SETTINGS, NodeConfig, choose_file, load_config
from isopod.world.errors import InvalidArgument
from isopod.world.paths import PATHS, PathRow

FILE = "/etc/isopod/config.toml"
VALUES: dict[str, tuple[object, object, object]] = {
    "layout": ("rtain", "isopod", "rtain"),
    "runtime": ("crun", "runc", "auto"),
    "prefix": ("podx", "pody", "podz"),
    "socket_group": ("staff", "users", "wheel"),
    "log_level": ("debug", "warning", "error"),
    "event_loop": ("asyncio", "uvloop", "asyncio"),
    "pool_size": (1, 2, 3),
    "layers": ("auto", "erofs", "directory"),
    "shards": (2, 3, 4),
    "telemetry": ("127.0.0.1:1", "[::1]:2", "unix:/run/x.sock"),
    "default_subnet": ("10.1.0.0/24", "10.2.0.0/16", "10.3.0.0/24"),
}


@pytest.mark.row("R34")
def test_the_defaults_are_safe_places() -> None:
    config = load_config()
    assert config.paths == {
        "root": "/var/lib/isopod",
        "run_root": "/run/isopod",
        "socket": "/run/isopod/isopod.sock",
        "images": "/var/lib/isopod/images",
        "containers": "/var/lib/isopod/containers",
        "networks": "/var/lib/isopod/net/networks",
        "metadata": "/var/lib/isopod/metadata",
        "wal": "/var/lib/isopod/metadata/current.wal",
        "archive": "/var/lib/isopod/metadata/archive",
        "snapshots": "/var/lib/isopod/metadata/snapshots",
    }
    assert (config.runtime, config.prefix, config.socket_group, config.event_loop) == ("auto", "isopod", "isopod", "uvloop")


@pytest.mark.row("R34")
@pytest.mark.parametrize(
    "how",
    [{"flags": {"--layout": "rtain"}}, {"environment": {"ISOPOD_LAYOUT": "rtain"}}, {"file_text": 'layout = "rtain"'}],
    ids=["flag", "environment", "file"],
)
def test_one_setting_gives_the_reference_s_layout(how: dict[str, object]) -> None:
    paths = load_config(**how).paths  # type: ignore[arg-type]  # the parametrized keywords
    assert paths["root"] == "/tmp/rtain"
    assert paths["socket"] == "/tmp/rtain_daemons.sock"
    assert paths["networks"] == "/tmp/rtain/net/networks"
    assert paths["wal"] == "/tmp/rtain/metadata/current.wal"
    assert paths["archive"] == "/tmp/rtain/metadata/archive"
    assert paths["snapshots"] == "/tmp/rtain/metadata/snapshots"


@pytest.mark.row("R34")
@pytest.mark.parametrize("row", PATHS, ids=lambda row: row.name)
def test_every_path_by_flag_environment_and_file(row: PathRow) -> None:
    by_file = f'[paths]\n{row.key} = "/by/file"\n'
    assert load_config(file_text=by_file).paths[row.name] == "/by/file"
    assert load_config(environment={row.variable: "/by/env"}).paths[row.name] == "/by/env"
    assert load_config(flags={row.flag: "/by/flag"}).paths[row.name] == "/by/flag"
    assert load_config(environment={row.variable: "/by/env"}, file_text=by_file).paths[row.name] == "/by/env"
    everywhere = load_config(flags={row.flag: "/by/flag"}, environment={row.variable: "/by/env"}, file_text=by_file)
    assert everywhere.paths[row.name] == "/by/flag"
    others = {name: path for name, path in everywhere.paths.items() if "{" + row.name + "}" not in default_of(name) and name != row.name}
    if row.name not in ("root", "metadata", "run_root"):
        assert others == {name: path for name, path in load_config().paths.items() if name != row.name}


def default_of(name: str) -> str:
    return next(row.default for row in PATHS if row.name == name)


@pytest.mark.row("R34")
def test_paths_below_a_chosen_one_follow_it() -> None:
    config = load_config(flags={"--root": "/data"}, environment={"ISOPOD_METADATA": "/fast/meta"})
    assert config.paths["images"] == "/data/images"
    assert config.paths["wal"] == "/fast/meta/current.wal"


@pytest.mark.row("R34")
@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.name)
def test_every_setting_by_flag_environment_and_file(row: object) -> None:
    from isopod.runtime.config import SettingRow

    assert isinstance(row, SettingRow)
    flag, variable, key = VALUES[row.name]
    in_file = f"{row.key} = {key!r}\n".replace("'", '"')
    assert getattr(load_config(file_text=in_file), row.name) == key
    assert getattr(load_config(environment={row.variable: str(variable)}), row.name) == variable
    assert getattr(load_config(flags={row.flag: str(flag)}), row.name) == flag
    assert getattr(load_config(environment={row.variable: str(variable)}, file_text=in_file), row.name) == variable
    everywhere = load_config(flags={row.flag: str(flag)}, environment={row.variable: str(variable)}, file_text=in_file)
    assert getattr(everywhere, row.name) == flag


def test_every_field_has_a_row() -> None:
    sections = ("cluster", "grpc", "paths", "pulse", "records", "vm")
    assert [row.name for row in SETTINGS] == [name for name in NodeConfig.__struct_fields__ if name not in sections]


@pytest.mark.parametrize(
    "how,message",
    [
        ({"file_text": "pool_sizes = 3"}, f"key in {FILE} 'pool_sizes': unknown"),
        ({"file_text": '[paths]\nrooot = "/x"'}, f"key in {FILE} 'paths.rooot': unknown"),
        ({"file_text": 'pool_size = "3"'}, f"pool_size in {FILE} '3': want a whole number"),
        ({"file_text": "pool_size = 999"}, f"pool_size in {FILE} '999': want a whole number"),
        ({"file_text": "runtime = 3"}, f"runtime in {FILE} '3': want auto, crun or runc"),
        ({"file_text": "[paths]\nroot = 3"}, f"paths.root in {FILE} '3': want an absolute path"),
        ({"file_text": "paths = 3"}, f"paths in {FILE} '3': want a table"),
        ({"file_text": '[paths]\nroot = ""'}, f"paths.root in {FILE} '': want an absolute path"),
        ({"file_text": "a = = b"}, f"config file '{FILE}': not TOML"),
        ({"environment": {"ISOPOD_POOL_SIZE": "many"}}, "ISOPOD_POOL_SIZE 'many': want a whole number"),
        ({"environment": {"ISOPOD_ROOT": "relative/path"}}, "ISOPOD_ROOT 'relative/path': want an absolute path"),
        ({"flags": {"--runtime": "docker"}}, "--runtime 'docker': want auto, crun or runc"),
        ({"flags": {"--prefix": "Much-too-long"}}, "--prefix 'Much-too-long': want 1-8 small letters"),
        ({"flags": {"--root": ""}}, "--root '': must not be empty"),
        ({"flags": {"--rooot": "/x"}}, "flag '--rooot': unknown"),
        ({"flags": {"--default-subnet": "10.0.0.1/24"}}, "--default-subnet '10.0.0.1/24': want an IPv4 subnet"),
        ({"flags": {"--default-subnet": "10.0.0.0/31"}}, "want an IPv4 subnet"),
        ({"flags": {"--default-subnet": "10.0.0.0"}}, "want an IPv4 subnet"),
        ({"flags": {"--default-subnet": "fd00::/64"}}, "want an IPv4 subnet"),
        ({"flags": {"--socket-group": "a:b"}}, "--socket-group 'a:b': want a group's name"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_name_its_user_gave_it(how: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_config(**how)  # type: ignore[arg-type]  # the parametrized keywords
    assert message in str(caught.value)


def test_empty_variables_and_strangers_in_the_environment_are_nothing() -> None:
    assert load_config(environment={"ISOPOD_ROOT": "", "HOME": "/x", "ISOPOD_CONFIG": "/y", "ISOPOD_UNKNOWN": "z"}) == load_config()


def test_the_file_is_chosen_by_flag_then_environment_then_default() -> None:
    assert choose_file(flags={}, environment={}) == (FILE, False)
    assert choose_file(flags={}, environment={"ISOPOD_CONFIG": "/a"}) == ("/a", True)
    assert choose_file(flags={"--config": "/b"}, environment={"ISOPOD_CONFIG": "/a"}) == ("/b", True)
    assert load_config(flags={"--config": "/b"}) == load_config()


def test_two_nodes_on_one_machine_have_prefixes_of_their_own() -> None:
    one, two = (load_config(flags={"--root": root}).prefix for root in ("/data/one", "/data/two"))
    assert len({one, two, load_config().prefix}) == 3
    assert one == load_config(flags={"--root": "/data/one"}).prefix
    assert load_config(flags={"--root": "/data/one", "--prefix": "mine"}).prefix == "mine"
