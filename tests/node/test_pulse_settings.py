"""The node's [pulse] section: every setting that the agent has as a flag, under the same name, with the same default, and what fits."""

from typing import Final, Literal

import msgspec
import pytest

from isopod.node.faces import pulse_origins, pulse_settings
from isopod.pulse.options import FLAGS, settings_from
from isopod.pulse.settings import PulseSettings
from isopod.runtime.config import load_config, load_node, show
from isopod.runtime.config.pulse import PulseSection
from isopod.world.errors import InvalidArgument

pytestmark = pytest.mark.row("K1")
BY_THE_NODE: Final = {"log_level", "go_root", "node_socket"}
"""What the node answers by settings of its own."""
OTHER_DEFAULTS: Final = {"listen", "runtime_endpoint"}
"""A node serves nothing and asks no runtime unless it is told to."""
SUITE: Final = "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384"
VALUES: Final[dict[str, object]] = {
    "listen": "127.0.0.1:1", "runtime_endpoint": "/run/crio.sock", "interval_s": 7.5, "rust_root": "/rust", "view": "kata",
    "cadvisor_without": ["cpu", "memory"], "base_units": True, "merge_histograms": True,
    "pod_labels": ["app", "tier"], "pod_annotations": ["team"],
    "policy_file": "/policy", "keep_rounds": 3, "shards": 4, "in_flight_max": 5, "request_s": 6.5, "tls_cert_file": "/crt",
    "tls_key_file": "/key", "tls_client_ca_file": "/ca", "tls_min_version": "VersionTLS13", "tls_cipher_suites": [SUITE],
    "token_file": "/token", "basic_auth_file": "/users", "enable_lifecycle": True, "pprof": True, "push_url": "https://r/w",
    "push_interval_s": 8.5, "push_timeout_s": 9.5, "push_queue_bytes_max": 10_000_000, "push_labels": ["a=b", "c=d"],
    "push_token_file": "/push-token", "push_ca_file": "/push-ca", "push_cert_file": "/push-crt", "push_key_file": "/push-key",
}  # fmt: skip
ALONE: Final = {
    "push_basic_file": ('push_url = "http://r/"\npush_basic_file = "/pair"\n', "/pair"),
    "pause_after_s": ("pause_after_s = 90.5\n", 90.5),
    "strict_compat": ("strict_compat = true\n", True),
}
"""What does not go together with one of those."""


def section_fields() -> dict[str, object]:
    return {field.name: field.default for field in msgspec.structs.fields(PulseSection)}


def test_the_section_has_every_flag_and_nothing_else() -> None:
    assert {flag.field for flag in FLAGS} - BY_THE_NODE == set(section_fields())
    assert {*VALUES, *ALONE} == set(section_fields()), "and each is tried below"


def test_defaults_are_the_agents() -> None:
    agents = {field.name: field.default for field in msgspec.structs.fields(PulseSettings)}
    differing = {name for name, default in section_fields().items() if default != agents[name]}
    assert differing == OTHER_DEFAULTS


def test_every_setting_of_a_file_reaches_the_agent() -> None:
    lines = [f"{name} = {msgspec.json.encode(value).decode()}\n" for name, value in VALUES.items()]
    made = pulse_settings(load_config(file_text=f'log_level = "debug"\n[vm]\nmonitor_root = "/sbs"\n[pulse]\n{"".join(lines)}'))
    told = msgspec.to_builtins(made)
    assert {name: list(told[name]) if isinstance(told[name], tuple) else told[name] for name in VALUES} == VALUES
    assert (made.log_level, made.go_root, made.node_socket) == ("debug", "/sbs", "/run/isopod/isopod.sock")
    for name, (lines_of_it, value) in ALONE.items():
        alone = load_config(file_text=f'[pulse]\nlisten = "127.0.0.1:1"\n{lines_of_it}')
        assert getattr(pulse_settings(alone), name) == value


def test_a_variable_means_the_same_to_the_node_and_to_the_agent() -> None:
    environment = {
        f"ISOPOD_PULSE_{name.upper()}": ",".join(map(str, value))
        if isinstance(value, list)
        else str(value).lower()
        if value is True
        else str(value)
        for name, value in VALUES.items()
    }
    by_node, by_agent = pulse_settings(load_config(environment=environment)), settings_from([], environment)
    for name in VALUES:
        assert getattr(by_node, name) == getattr(by_agent, name) != getattr(PulseSettings(), name), name


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("interval_s = 0", "want a number of seconds"),
        ('view = "everything"', "want all, kata or cadvisor"),
        ('policy_file = "relative"', "want an absolute path"),
        ('cadvisor_without = ["weather"]', "want a list of parts"),
        ("keep_rounds = -1", "want a whole number"),
        ("pause_after_s = -1", "want a number of seconds, or 0"),
        ("in_flight_max = 0", "want a whole number above 0"),
        ("shards = 65", "from 0 to 64"),
        ('enable_lifecycle = "yes"', "want true or false"),
        ("push_queue_bytes_max = 0", "want a whole number above 0"),
        ('basic_auth_files = "/x"', "unknown"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(line: str, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_config(file_text=f"[pulse]\n{line}\n")
    assert why in str(caught.value) and line.partition(" ")[0] in str(caught.value)


@pytest.mark.parametrize("text", ["unix:///run/crio.sock", "unix:/run/crio.sock", "/run/crio.sock", "none", ""])
def test_the_runtime_endpoint_takes_what_the_flag_takes(text: str) -> None:
    made = pulse_settings(load_config(file_text=f'[pulse]\nlisten = "127.0.0.1:1"\nruntime_endpoint = "{text}"\n'))
    assert made.runtime_endpoint == ("/run/crio.sock" if "crio" in text else "")


@pytest.mark.parametrize("text", ["tcp://1.2.3.4:5", "run/crio.sock", "unix:run/crio.sock"])
def test_another_runtime_endpoint_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="runtime_endpoint.*want an absolute path, unix:///PATH, or none"):
        load_config(file_text=f'[pulse]\nruntime_endpoint = "{text}"\n')


@pytest.mark.row("T21")
@pytest.mark.parametrize("form", ["table", "json", "toml"])
def test_what_is_shown_of_the_push_url_has_no_secret(form: Literal["table", "json", "toml"]) -> None:
    loaded = load_node(environment={"ISOPOD_PULSE_PUSH_URL": "https://receiver/write?key=sesame"})
    text = show(loaded.config, loaded.origins, form=form, with_origin=True)
    assert "https://receiver/write?..." in text and "sesame" not in text
    assert loaded.config.pulse.push_url.endswith("sesame")


def test_what_makes_no_sense_together_is_refused_too() -> None:
    with pytest.raises(InvalidArgument, match="certificate and key go together"):
        pulse_settings(load_config(file_text='[pulse]\nlisten = "127.0.0.1:1"\ntls_cert_file = "/x"\n'))


@pytest.mark.row("T16")
def test_the_agent_knows_where_the_node_was_told() -> None:
    loaded = load_node(environment={"ISOPOD_PULSE_VIEW": "kata", "ISOPOD_LOG_LEVEL": "debug"}, flags={"--pulse-listen": "127.0.0.1:1"})
    assert pulse_origins({key: str(origin) for key, origin in loaded.origins.items()}) == {
        "runtime_endpoint": "the node's default",
        "node_socket": "the node's default",
        "view": "the node's environment ISOPOD_PULSE_VIEW",
        "log_level": "the node's environment ISOPOD_LOG_LEVEL",
        "listen": "the node's flag --pulse-listen",
    }
