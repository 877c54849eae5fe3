"""`isopod config`: what a node would be told, and whether a file is sound; without a node."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.cli.scripted_node import SOURCE, TIMEOUT_S, environment, isopod, lines

LAUNCH = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from isopod.cli.main import main; site = sys.argv.pop(1); "
    "sys.exit(main(sys.argv[1:], site_packages=site))"
)


def config(*words: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[bytes]":
    """Run `isopod config` as its launcher does: an isolated interpreter that is told where the installed packages are."""
    argv = [sys.executable, "-I", "-S", "-c", LAUNCH, SOURCE, sysconfig.get_paths()["purelib"], "config", *words]
    return subprocess.run(argv, capture_output=True, timeout=TIMEOUT_S, env=environment(env), check=False)


def write(folder: str, name: str, text: str) -> str:
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
    return path


@pytest.mark.row("S23")
def test_show_says_each_value_and_where_it_was_said(folder: str) -> None:
    path = write(folder, "c.toml", "pool_size = 3\n[paths]\nroot = '/data'\n")
    drop_in = write(folder, "c.d/10-site.yaml", "default_subnet: 10.9.0.0/24\n")
    environment = {"ISOPOD_CONFIG": path, "RUST_LOG": "warn", "ISOPOD_POOL_SZE": "3"}
    ended = config("show", "--origin", env=environment)
    assert ended.returncode == 0, ended.stderr
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines(ended.stdout)}
    assert rows["SETTING"] == "VALUE ORIGIN"
    assert rows["pool_size"] == f"3 file {path}"
    assert rows["default_subnet"] == f'"10.9.0.0/24" drop-in {drop_in}'
    assert rows["log_level"] == '"warning" environment RUST_LOG'
    assert rows["event_loop"] == '"uvloop" default'
    assert rows["paths.root"] == f'"/data" file {path}'
    assert rows["paths.images"] == '"/data/images" default'
    assert rows["prefix"].startswith('"iso')
    assert lines(ended.stderr) == ["note: ISOPOD_POOL_SZE is no setting and is not looked at: did you mean ISOPOD_POOL_SIZE?"]
    same = config("show", "--config", path, "--format", "json", env={})
    assert json.loads(same.stdout)["paths"]["root"] == "/data"
    entries = json.loads(config("show", "--origin", "--config", path, "--format", "json").stdout)
    assert {"key": "pool_size", "value": 3, "layer": "file", "place": path} in entries
    text = config("show", "--config", path, "--format", "toml").stdout.decode()
    assert tomllib.loads(text)["pool_size"] == 3
    again = write(folder, "again.toml", text)
    assert config("show", "--config", again, "--format", "toml").stdout.decode() == text


@pytest.mark.row("S23")
def test_check_tells_a_sound_file_from_a_broken_one(folder: str) -> None:
    good = write(folder, "good.json", '{"pool_size": 3}')
    ended = config("check", good)
    assert (ended.returncode, ended.stdout.decode()) == (0, f"{good}: sound\n")
    for name, text, message, hint in (
        ("a.toml", "pool_sizes = 3", "key in {} 'pool_sizes': unknown", "did you mean pool_size?"),
        ("b.yaml", "pool_size: 300", "pool_size in {} '300': want a whole number from 0 to 256", ""),
        ("c.yaml", "pool_size: 3\npool_size: 4", "config file '{}': the key 'pool_size' stands twice (line 2)", ""),
    ):
        path = write(folder, name, text)
        ended = config("check", path)
        assert (ended.returncode, ended.stdout) == (2, b"")
        said = lines(ended.stderr)
        assert said[0] == f"error: {message.format(path)}"
        assert said[1:] == ([f"hint: {hint}"] if hint else [])
    ended = config("check", os.path.join(folder, "none.toml"))
    assert (ended.returncode, "no such file" in lines(ended.stderr)[0]) == (2, True)
    assert config("show", "--format", "xml").returncode == 2
    assert config("check").returncode == 2


@pytest.mark.row("R34")
def test_the_client_finds_the_socket_in_drop_ins_and_json(folder: str) -> None:
    def said(**variables: str) -> str:
        return lines(isopod("ps", env=variables).stderr)[0]

    path = write(folder, "c.json", '{"paths": {"socket": "/json.sock"}}')
    assert "/json.sock" in said(ISOPOD_CONFIG=path)
    write(folder, "c.d/20.toml", "[paths]\nsocket = '/drop-in.sock'\n")
    write(folder, "c.d/10.json", '{"paths": {"socket": "/earlier.sock"}}')
    write(folder, "c.d/30.toml", "pool_size = 1\n")
    assert "/drop-in.sock" in said(ISOPOD_CONFIG=path)
    shown = json.loads(config("show", "--config", path, "--format", "json").stdout)
    assert shown["paths"]["socket"] == "/drop-in.sock"
    yaml = write(folder, "y.yaml", "paths: {socket: /yaml.sock}\n")
    ended = isopod("ps", env={"ISOPOD_CONFIG": yaml})
    assert lines(ended.stderr)[-1] == "hint: say so: set ISOPOD_SOCKET"
    quiet = write(folder, "z.yaml", "pool_size: 3\n")
    assert "/run/isopod/isopod.sock" in said(ISOPOD_CONFIG=quiet)
    broken = write(folder, "b.json", '{"socket": ')
    assert "not JSON" in said(ISOPOD_CONFIG=broken)
