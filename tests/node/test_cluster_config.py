"""What a node is told about its cluster: flags, variables and the table [cluster], and where its files go then."""

import pytest

from isopod.node.cluster import cluster_config
from isopod.runtime.config import load_config, load_node, show
from isopod.runtime.config.cluster import CLUSTER_SETTINGS, ClusterSection
from isopod.world.errors import InvalidArgument

pytestmark = pytest.mark.row("B1")


def test_every_setting_has_a_row_a_flag_a_variable_and_a_key() -> None:
    assert [row.name for row in CLUSTER_SETTINGS] == list(ClusterSection.__struct_fields__)
    texts = {"node_id": "7", "voters_max": "3", "role": "agent", "data_dir": "/x", "peers": "a:1,b:2", "join": "a:1"}
    for row in CLUSTER_SETTINGS:
        text = texts.get(row.name, "true" if row.want == "true or false" else "h:7000")
        by_flag = getattr(load_config(flags={row.flag: text}).cluster, row.name)
        by_variable = getattr(load_config(environment={f"ISOPOD_CLUSTER_{row.name.upper()}": text}).cluster, row.name)
        assert by_flag == by_variable
        assert by_flag not in (getattr(ClusterSection(), row.name), "")


def test_a_plain_node_is_in_no_cluster() -> None:
    config = load_config()
    assert cluster_config(config) is None
    assert config.paths["root"] == "/var/lib/isopod"
    assert config.cluster.data_dir == "/var/lib/isopod/cluster"
    assert config.default_subnet == "10.88.0.0/24"


def test_a_bound_node_keeps_its_places() -> None:
    config = load_config(flags={"--bind": "10.0.0.1:7000"})
    told = cluster_config(config)
    assert told is not None
    assert (told.node_id, told.bind, told.data_dir, told.role, told.peers) == (1, "10.0.0.1:7000", "/var/lib/isopod/cluster", "voter", ())
    assert config.paths["root"] == "/var/lib/isopod"


def test_nodes_with_folders_of_their_own_do_not_meet() -> None:
    nodes = [load_node(flags={"--bind": f"127.0.0.1:700{n}", "--id": str(n), "--data-dir": f"/srv/n{n}"}) for n in (1, 2)]
    one, two = (each.config for each in nodes)
    assert (one.paths["root"], one.paths["socket"], one.cluster.data_dir) == ("/srv/n1/engine", "/srv/n1/isopod.sock", "/srv/n1")
    assert one.paths["run_root"] == f"/run/{one.prefix}"
    assert one.prefix != two.prefix
    assert (one.default_subnet, two.default_subnet) == ("10.88.1.0/24", "10.88.2.0/24")
    assert "made from cluster.data_dir" in str(nodes[0].origin("paths.socket"))
    control = load_config(flags={"--role": "control", "--data-dir": "/srv/n1"})
    assert control.paths["run_root"] == "/srv/n1/run"
    chosen = load_config(flags={"--data-dir": "/srv/n1", "--root": "/data", "--bind": "127.0.0.1:7000"})
    assert (chosen.paths["root"], chosen.paths["socket"]) == ("/data", "/run/isopod/isopod.sock")
    told = load_config(flags={"--data-dir": "/srv/n1", "--bind": "127.0.0.1:7000", "--default-subnet": "10.9.0.0/24", "--socket": "/s"})
    assert (told.default_subnet, told.paths["socket"]) == ("10.9.0.0/24", "/s")


def test_the_file_has_a_table() -> None:
    text = '[cluster]\nnode_id = 3\nbind = "10.0.0.3:7000"\npeers = ["1:10.0.0.1:7000", "10.0.0.2:7000"]\ninit_primary = true\n'
    told = cluster_config(load_config(file_text=text))
    assert told is not None
    assert [tuple(peer) for peer in told.peers] == [(1, "10.0.0.1:7000"), (0, "10.0.0.2:7000")]
    assert told.init == "primary"


def test_a_token_is_not_shown() -> None:
    loaded = load_node(environment={"ISOPOD_CLUSTER_TOKEN": "a-secret-0123456789"})
    assert loaded.config.cluster.token == "a-secret-0123456789"
    for form in ("table", "json", "toml"):
        assert "a-secret" not in show(loaded.config, loaded.origins, form=form, with_origin=True)
    lines = show(load_node().config, {}, form="toml").splitlines()
    assert [line for line in lines if "token" in line] == ['token_file = ""', 'push_token_file = ""'], "only where they lie, of [pulse]"


@pytest.mark.parametrize(
    "flags,why",
    [
        ({"--id": "0"}, "--id '0': want a whole number from 1 on"),
        ({"--id": "x"}, "--id 'x'"),
        ({"--voters-max": "2"}, "--voters-max '2': want 1, 3, 5 or 7"),
        ({"--role": "king"}, "--role 'king': want node, control or agent"),
        ({"--data-dir": "relative"}, "--data-dir 'relative': want an absolute path"),
        ({"--init-primary": "perhaps"}, "--init-primary 'perhaps': want true or false"),
        ({"--bnd": "x"}, "did you mean --bind?"),
        ({"--token": ""}, "--token '': must not be empty"),
    ],
)
def test_what_does_not_fit_is_named_as_it_was_written(flags: dict[str, str], why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_config(flags=flags)
    assert why in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    "flags,why",
    [
        ({"--init-primary": "true", "--join-cluster": "true"}, "founds or joins"),
        ({"--peers": "1:2:3:4"}, "peer"),
        ({"--peers": "nowhere"}, "peer"),
        ({"--peers": "0:h:1"}, "must be non-zero"),
    ],
)
def test_settings_that_contradict_each_other(flags: dict[str, str], why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        cluster_config(load_config(flags={"--bind": "127.0.0.1:7000", **flags}))


def test_peers_without_ids_give_each_node_its_place() -> None:
    for number, bind in enumerate(("a:1", "b:1", "c:1"), 1):
        told = cluster_config(load_config(flags={"--bind": bind, "--peers": "a:1,b:1,c:1"}))
        assert told is not None
        assert told.node_id == number
