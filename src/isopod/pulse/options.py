"""Options: the agent's flags and variables, and the settings they make. Flags beat variables, variables beat defaults.

Flags may begin with one dash or two, as kata-monitor's do; a value follows as the next word or behind "=". This table is the help too.
Source: the documented flags and variables of KataPulse and of kata-monitor.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final, NamedTuple, get_args

import msgspec

from isopod.pulse.cadvisor import Part
from isopod.pulse.cri import socket_path
from isopod.pulse.settings import Given, PulseSettings, TlsVersion, View
from isopod.world.errors import InvalidArgument

SECONDS_MAX: Final = 86_400
BYTES_MAX: Final = 10**12 - 1
COUNT_MAX: Final = 99_999
"""Of what is no number of bytes."""
_LEVELS: Final = {"trace": "debug", "warn": "warning", "fatal": "error", "panic": "error"}
LEVELS: Final = ("debug", "info", "warning", "error")


class Flag(NamedTuple):
    """One setting.

    Args:
        name: Without dashes.
        field: Of `PulseSettings`.
        variable: Of the environment, "" for none of its own (ISOPOD_PULSE_... stands for every one).
        is_switch: Whether it needs no value.
    """

    name: str
    field: str
    variable: str = ""
    is_switch: bool = False


FLAGS: Final = (
    Flag("listen-address", "listen", "KATA_PULSE_LISTEN"),
    Flag("runtime-endpoint", "runtime_endpoint", "RUNTIME_ENDPOINT"),
    Flag("log-level", "log_level", "RUST_LOG"),
    Flag("metrics-interval-secs", "interval_s", "KATA_PULSE_METRICS_INTERVAL"),
    Flag("go-root", "go_root"),
    Flag("rust-root", "rust_root"),
    Flag("node-socket", "node_socket"),
    Flag("view", "view"),
    Flag("cadvisor-without", "cadvisor_without"),
    Flag("strict-compat", "strict_compat", is_switch=True),
    Flag("base-units", "base_units", is_switch=True),
    Flag("merge-histograms", "merge_histograms", is_switch=True),
    Flag("pod-label", "pod_labels"),
    Flag("pod-annotation", "pod_annotations"),
    Flag("policy-file", "policy_file"),
    Flag("pause-after", "pause_after_s"),
    Flag("keep-rounds", "keep_rounds"),
    Flag("shards", "shards"),
    Flag("in-flight-max", "in_flight_max"),
    Flag("request-timeout", "request_s"),
    Flag("tls-cert-file", "tls_cert_file"),
    Flag("tls-key-file", "tls_key_file"),
    Flag("tls-client-ca-file", "tls_client_ca_file"),
    Flag("tls-min-version", "tls_min_version"),
    Flag("tls-cipher-suites", "tls_cipher_suites"),
    Flag("token-file", "token_file"),
    Flag("basic-auth-file", "basic_auth_file"),
    Flag("enable-lifecycle", "enable_lifecycle", is_switch=True),
    Flag("pprof", "pprof", is_switch=True),
    Flag("push-url", "push_url"),
    Flag("push-interval", "push_interval_s"),
    Flag("push-timeout", "push_timeout_s"),
    Flag("push-queue-bytes", "push_queue_bytes_max"),
    Flag("push-label", "push_labels"),
    Flag("push-token-file", "push_token_file"),
    Flag("push-basic-file", "push_basic_file"),
    Flag("push-ca-file", "push_ca_file"),
    Flag("push-cert-file", "push_cert_file"),
    Flag("push-key-file", "push_key_file"),
)
_BY_NAME: Final = {flag.name: flag for flag in FLAGS}
_LISTS: Final = ("pod_labels", "pod_annotations", "cadvisor_without", "push_labels", "tls_cipher_suites")
"""Fields of several values: flags may be repeated, and a value may be several with commas between them."""
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "view": get_args(View),
    "tls_min_version": get_args(TlsVersion),
    "cadvisor_without": get_args(Part),
}
_TRUE: Final = ("true", "1", "yes", "on")
_FALSE: Final = ("false", "0", "no", "off")


def settings_from(words: Sequence[str], environment: Mapping[str, str]) -> PulseSettings:
    """Return the settings. Args and Raises as `read_settings`."""
    return read_settings(words, environment).settings


def read_settings(words: Sequence[str], environment: Mapping[str, str]) -> Given:
    """Return the settings, and where they came from.

    Args:
        words: Flags and values.
        environment: The process's variables.

    Raises:
        InvalidArgument: A flag is unknown, or a value makes no sense.
    """
    told: dict[str, Any] = {}  # of many types, checked by the struct
    origins: dict[str, str] = {}
    for flag in FLAGS:
        for variable in (flag.variable, f"ISOPOD_PULSE_{flag.field.upper()}"):
            value = environment.get(variable, "") if variable else ""
            if value:
                told[flag.field] = _value(flag, value, variable)
                origins[flag.field] = f"variable {variable}"
    several: dict[str, tuple[str, ...]] = {}
    for flag, value in _pairs(words):
        origins[flag.field] = f"flag --{flag.name}"
        if flag.field in _LISTS:
            several[flag.field] = (*several.get(flag.field, ()), *_value(flag, value, f"--{flag.name}"))
        else:
            told[flag.field] = _value(flag, value, f"--{flag.name}")
    try:
        return Given(msgspec.convert({**told, **several}, PulseSettings), origins)
    except msgspec.ValidationError as error:
        raise InvalidArgument("pulse setting", str(error), "see `isopod pulse --help`") from None


def _pairs(words: Sequence[str]) -> list[tuple[Flag, str]]:
    pairs = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        flag = _BY_NAME.get(name.removeprefix("-").removeprefix("-"))
        if not name.startswith("-") or flag is None:
            close = get_close_matches(name.lstrip("-"), _BY_NAME, 1)
            hint = f"did you mean --{close[0]}?" if close else "see `isopod pulse --help`"
            raise InvalidArgument("argument", word, "unknown", hint)
        if not equals and not flag.is_switch:
            if not left:
                raise InvalidArgument("flag", word, "wants a value", "see `isopod pulse --help`")
            value = left.pop(0)
        pairs.append((flag, value if equals or not flag.is_switch else "true"))
    return pairs


def _value(flag: Flag, text: str, source: str) -> Any:
    """Return what a text means for a setting."""
    if flag.field == "log_level":
        # Any other word means info, as both references have it: an agent is not kept from starting by its log.
        word = text.lower()
        level = _LEVELS.get(word, word)
        return level if level in LEVELS else "info"
    if flag.field == "pause_after_s":
        return _seconds(text, source, or_0=True)
    if flag.field in ("interval_s", "request_s", "push_interval_s", "push_timeout_s"):
        return _seconds(text, source)
    if flag.field in ("keep_rounds", "in_flight_max", "shards", "push_queue_bytes_max"):
        most = BYTES_MAX if flag.field.endswith("bytes_max") else COUNT_MAX
        if not (text.isascii() and text.isdigit()) or len(text) > len(str(most)):
            raise InvalidArgument(source, text, f"want a whole number, at most {most}")
        return int(text)
    if flag.field in _LISTS:
        return tuple(_chosen(flag, name, source) for name in text.split(",") if name)
    if flag.is_switch:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise InvalidArgument(source, text, "want true or false")
        return text.lower() in _TRUE
    if flag.field == "runtime_endpoint":
        return endpoint(text)
    return _chosen(flag, text, source)


def _chosen(flag: Flag, text: str, source: str) -> str:
    choices = _CHOICES.get(flag.field)
    if choices is not None and text not in choices:
        raise InvalidArgument(source, text, f"choose one of {', '.join(choices)}")
    return text


def _seconds(text: str, source: str, *, or_0: bool = False) -> float:
    try:
        value = float(text) if len(text) <= 20 and "_" not in text else -1.0
    except ValueError:
        value = -1.0
    if not (0 < value <= SECONDS_MAX or (or_0 and value == 0)):
        least = "0 or more" if or_0 else "above 0"
        raise InvalidArgument(source, text, f"want seconds: {least}, at most {SECONDS_MAX}", "for example: 60")
    return value


def endpoint(text: str) -> str:
    """Return the path of a runtime's socket: unix:///run/x.sock and /run/x.sock mean the same; "none" is no runtime.

    Raises:
        InvalidArgument: It is no path of a Unix socket.
    """
    if text == "none":
        return ""
    return socket_path(text)
