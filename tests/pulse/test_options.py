"""Flags and variables of the agent: what they mean, which one wins, and what is refused."""

import msgspec
import pytest

from isopod.cli import grammar
from isopod.pulse.labels import given_labels
from isopod.pulse.options import FLAGS, read_settings, settings_from
from isopod.pulse.settings import PulseSettings
from isopod.world.errors import InvalidArgument

FIRST_FOUR = {
    "KATA_PULSE_LISTEN": "127.0.0.1:1",
    "RUNTIME_ENDPOINT": "/run/one.sock",
    "RUST_LOG": "debug",
    "KATA_PULSE_METRICS_INTERVAL": "7",
}


@pytest.mark.row("K1")
def test_without_flags_and_variables_the_defaults_hold() -> None:
    told = settings_from([], {})
    assert told == PulseSettings()
    assert (told.listen, told.runtime_endpoint) == ("127.0.0.1:8090", "/run/containerd/containerd.sock")
    assert (told.log_level, told.interval_s) == ("info", 60.0)


@pytest.mark.row("K1")
def test_a_flag_beats_a_variable_and_a_variable_the_default() -> None:
    by_variable = settings_from([], FIRST_FOUR)
    assert (by_variable.listen, by_variable.runtime_endpoint) == ("127.0.0.1:1", "/run/one.sock")
    assert (by_variable.log_level, by_variable.interval_s) == ("debug", 7.0)
    words = ["--listen-address", "127.0.0.1:2", "--runtime-endpoint=/run/two.sock", "--log-level", "error", "--metrics-interval-secs", "9"]
    by_flag = settings_from(words, FIRST_FOUR)
    assert (by_flag.listen, by_flag.runtime_endpoint) == ("127.0.0.1:2", "/run/two.sock")
    assert (by_flag.log_level, by_flag.interval_s) == ("error", 9.0)


@pytest.mark.row("K1", "T16")
def test_where_a_setting_came_from_is_known() -> None:
    words = ["--listen-address", "127.0.0.1:2", "-view=kata", "--pod-label", "app", "--pprof"]
    given = read_settings(words, {**FIRST_FOUR, "ISOPOD_PULSE_LOG_LEVEL": "error", "ISOPOD_PULSE_POD_LABELS": "tier"})
    assert given.settings == settings_from(words, {**FIRST_FOUR, "ISOPOD_PULSE_LOG_LEVEL": "error", "ISOPOD_PULSE_POD_LABELS": "tier"})
    assert given.origins == {
        "listen": "flag --listen-address",
        "runtime_endpoint": "variable RUNTIME_ENDPOINT",
        "log_level": "variable ISOPOD_PULSE_LOG_LEVEL",
        "interval_s": "variable KATA_PULSE_METRICS_INTERVAL",
        "view": "flag --view",
        "pod_labels": "flag --pod-label",
        "pprof": "flag --pprof",
    }
    assert read_settings([], {}).origins == {}


@pytest.mark.row("K1")
def test_every_flag_has_a_variable_too() -> None:
    values = {"view": "kata", "tls_min_version": "VersionTLS13", "log_level": "error", "listen": "127.0.0.1:9", "runtime_endpoint": "/x"}
    together = {
        "tls_cert_file": "/c", "tls_key_file": "/k", "push_url": "https://r/", "push_cert_file": "/c", "push_key_file": "/k",
        "push_labels": "a=b", "cadvisor_without": "cpu", "tls_cipher_suites": "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    }  # fmt: skip
    for flag in FLAGS:
        text = {**values, **together}.get(
            flag.field, "true" if flag.is_switch else "/7" if flag.field.endswith(("_file", "root", "socket")) else "7"
        )
        alone = {"pause_after_s": text} if flag.field == "pause_after_s" else {**together, flag.field: text}
        environment = {f"ISOPOD_PULSE_{name.upper()}": value for name, value in alone.items()}
        if flag.field == "push_basic_file":
            environment["ISOPOD_PULSE_PUSH_TOKEN_FILE"] = ""
        given = read_settings([], environment)
        assert given.origins[flag.field] == f"variable ISOPOD_PULSE_{flag.field.upper()}"
        assert getattr(given.settings, flag.field) != getattr(PulseSettings(), flag.field), flag.name


@pytest.mark.row("K1")
def test_isopods_own_variable_beats_the_references() -> None:
    told = settings_from([], {**FIRST_FOUR, "ISOPOD_PULSE_LISTEN": "127.0.0.1:3"})
    assert told.listen == "127.0.0.1:3"


def test_flags_may_begin_with_one_dash() -> None:
    assert settings_from(["-listen-address", "127.0.0.1:2", "-log-level=warn"], {}) == PulseSettings(
        listen="127.0.0.1:2", log_level="warning"
    )


@pytest.mark.row("K2")
@pytest.mark.parametrize("interval", ["0", "-1", "soon", "", "nan", "inf", "1e99", "1_0", "9" * 400])
def test_an_interval_that_is_none_is_refused(interval: str) -> None:
    with pytest.raises(InvalidArgument, match="seconds|wants"):
        settings_from([f"--metrics-interval-secs={interval}"], {})


@pytest.mark.row("K2")
def test_every_flag_is_in_the_help_with_the_default_that_holds() -> None:
    shown = {name: option for option in grammar.PULSE.options for name in option.names}
    assert sorted(shown) == sorted(f"--{flag.name}" for flag in FLAGS)
    defaults = {field.name: field.default for field in msgspec.structs.fields(PulseSettings)}
    for flag in FLAGS:
        option, default = shown[f"--{flag.name}"], defaults[flag.field]
        if option.default and option.default != "none":
            assert option.default == (f"{default:g}" if isinstance(default, float) else str(default)), flag.name


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--listen"], "did you mean --listen-address"),
        (["--listen-address"], "wants a value"),
        (["--listen-address", "8090"], "want HOST:PORT"),
        (["--listen-address", "localhost:99999"], "want HOST:PORT"),
        (["serve"], "unknown"),
        (["--runtime-endpoint", "tcp://1.2.3.4:5"], "tcp is not spoken"),
        (["--runtime-endpoint", ""], "want an absolute path"),
        (["--view", "everything"], "view"),
        (["--strict-compat=maybe"], "want true or false"),
        (["--keep-rounds", "many"], "want a whole number"),
        (["--in-flight-max", "0"], "must be above 0"),
        (["--pause-after", "soon"], "want seconds"),
        (["--pause-after", "60", "--push-url", "http://r/"], "needs figures always"),
        (["--tls-cert-file", "/a"], "certificate and key go together"),
        (["--tls-client-ca-file", "/a"], "needs a certificate"),
        (["--tls-min-version", "VersionTLS10"], "--tls-min-version 'VersionTLS10': choose one of VersionTLS12, VersionTLS13"),
        (["--view", "x"], "--view 'x': choose one of all, kata, cadvisor"),
        (["--cadvisor-without", "cpu,weather"], "--cadvisor-without 'weather': choose one of cpu, memory,"),
        (["--listen-address", "foo"], "listen address 'foo': want HOST:PORT with a port up to 65535 for example: 127.0.0.1:8090"),
        (["--keep-rounds", "99999999"], "want a whole number, at most 99999"),
        (["--shards", "99"], "0 decides by the processors"),
        (["--push-url", "receiver:9090"], "must begin with http"),
        (["--push-url", "http://user:word@receiver/"], "carries credentials"),
        (["--push-url", "http://r/", "--push-interval", "0"], "want seconds"),
        (["--push-url", "http://r/", "--push-timeout", "soon"], "want seconds"),
        (["--push-url", "http://r/", "--push-queue-bytes", "64MiB"], "want a whole number"),
        (["--push-url", "http://r/", "--push-queue-bytes", "0"], "must be above 0"),
        (["--push-url", "http://r/", "--push-label", "cluster"], "want NAME=VALUE"),
        (["--push-url", "http://r/", "--push-token-file", "/a", "--push-basic-file", "/b"], "do not go together"),
        (["--push-url", "https://r/", "--push-cert-file", "/a"], "certificate and key go together"),
        (["--push-url", "http://r/", "--push-ca-file", "/a"], "need https"),
        (["--push-token-file", "/a"], "needs one"),
        (["--push-label", "a=b"], "needs one"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(words: list[str], why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        settings_from(words, {})
    assert why in f"{caught.value.message} {caught.value.hint}"


def test_a_pause_of_nothing_is_written_in_several_ways() -> None:
    for text in ("0", "0.0", "0.00", "-0"):
        assert settings_from(["--pause-after", text], {}).pause_after_s == 0
    with pytest.raises(InvalidArgument, match="0 or more"):
        settings_from(["--pause-after", "-1"], {})


@pytest.mark.row("T21")
@pytest.mark.parametrize(
    "words",
    [
        ["--push-url", "receiver:9090/?key=sesame"],
        ["--push-url", "http://user:sesame@receiver/?key=sesame"],
        ["--push-url", "http://receiver:99999/?key=sesame"],
        ["--push-url", "http://receiver/?key=sesame with blanks: sesame"],
        ["--push-url", f"http://receiver/?key=sesame{'x' * 100_000}"],
        ["--push-url", "http://receiver/?key=sesame", "--push-ca-file", "/a"],
    ],
)
def test_an_error_about_the_push_url_shows_no_secret_of_it(words: list[str]) -> None:
    with pytest.raises(InvalidArgument, match=r"^push URL '[^']*\?\.\.\.': ") as caught:
        settings_from(words, {})
    assert "sesame" not in f"{caught.value.message} {caught.value.hint}"


def test_the_runtime_endpoint_takes_both_forms_and_none() -> None:
    for text in ("unix:///run/x.sock", "/run/x.sock", "unix:/run/x.sock"):
        assert settings_from(["--runtime-endpoint", text], {}).runtime_endpoint == "/run/x.sock"
    assert not settings_from(["--runtime-endpoint", "none"], {}).runtime_endpoint


@pytest.mark.row("K22")
@pytest.mark.parametrize(
    ("word", "level"), [("trace", "debug"), ("DEBUG", "debug"), ("warn", "warning"), ("kata=debug", "info"), ("loud", "info")]
)
def test_levels_of_the_references_and_any_other_word(word: str, level: str) -> None:
    assert settings_from(["--log-level", word], {}).log_level == level


def test_lists_add_up_and_switches_need_no_value() -> None:
    told = settings_from(["--pod-label", "app", "--pod-label=tier,zone", "--pprof", "--strict-compat=false"], {})
    assert (told.pod_labels, told.pprof, told.strict_compat) == (("app", "tier", "zone"), True, False)


@pytest.mark.row("T20")
def test_what_is_told_of_pushing() -> None:
    words = ["--push-url=https://r/write?x=1", "--push-interval", "1.5", "--push-timeout=2", "--push-queue-bytes", "1048576"]
    words += ["--push-label", "cluster=lab,zone=a", "--push-label=url=http://x?a=b", "--push-token-file", "/token", "--push-ca-file=/ca"]
    told = settings_from([*words, "--push-cert-file=/crt", "--push-key-file=/key"], {"ISOPOD_PULSE_PUSH_URL": "http://other/"})
    assert (told.push_url, told.push_interval_s, told.push_timeout_s, told.push_queue_bytes_max) == (
        "https://r/write?x=1",
        1.5,
        2.0,
        1 << 20,
    )
    assert given_labels(told.push_labels) == (("cluster", "lab"), ("zone", "a"), ("url", "http://x?a=b"))
    assert (told.push_token_file, told.push_ca_file, told.push_cert_file, told.push_key_file) == ("/token", "/ca", "/crt", "/key")
    assert settings_from([], {"ISOPOD_PULSE_PUSH_URL": "http://other/"}).push_url == "http://other/"
