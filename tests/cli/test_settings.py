"""Which socket is meant: flag, environment, config file, default, in this order."""

import os

import pytest

from tests.cli.scripted_node import isopod, lines


def socket_said(*words: str, **variables: str) -> str:
    """Return the path that a command without a node complains about."""
    ended = isopod(*words, "ps", env=variables)
    [complaint, _hint] = lines(ended.stderr)
    return complaint.removeprefix("error: cannot reach the isopod node at ").split(": ")[0]


@pytest.mark.row("R34")
def test_precedence(folder: str) -> None:
    config = os.path.join(folder, "config.toml")
    with open(config, "w", encoding="utf-8") as file:
        file.write('pool_size = 3\n[paths]\nsocket = "/from/config.sock"\nroot = "/r"\n')
    assert socket_said("-H", "/from/flag.sock", ISOPOD_SOCKET="/from/env.sock", ISOPOD_CONFIG=config) == "/from/flag.sock"
    assert socket_said(ISOPOD_SOCKET="/from/env.sock", ISOPOD_CONFIG=config) == "/from/env.sock"
    assert socket_said(ISOPOD_RUN_ROOT="/elsewhere", ISOPOD_CONFIG=config) == "/from/config.sock"
    assert socket_said(ISOPOD_RUN_ROOT="/elsewhere") == "/elsewhere/isopod.sock"
    assert socket_said(ISOPOD_LAYOUT="rtain") == "/tmp/rtain_daemons.sock"
    with open(config, "w", encoding="utf-8") as file:
        file.write('layout = "rtain"\n')
    assert socket_said(ISOPOD_CONFIG=config) == "/tmp/rtain_daemons.sock"
    with open(config, "w", encoding="utf-8") as file:
        file.write("pool_size = 'this is not looked at by the client")
    assert socket_said(ISOPOD_CONFIG=config, ISOPOD_RUN_ROOT="/elsewhere") == "/elsewhere/isopod.sock"


def test_a_damaged_config_file_and_a_wrong_layout(folder: str) -> None:
    config = os.path.join(folder, "config.toml")
    with open(config, "w", encoding="utf-8") as file:
        file.write("socket = ")
    ended = isopod("ps", env={"ISOPOD_CONFIG": config})
    assert ended.returncode == 2
    assert lines(ended.stderr)[0].startswith(f"error: configuration '{config}': not TOML: ")
    ended = isopod("ps", env={"ISOPOD_LAYOUT": "flat"})
    assert (ended.returncode, lines(ended.stderr)[0]) == (2, "error: layout 'flat': choose one of: isopod, rtain")


def test_agrees_with_the_node(folder: str) -> None:
    from isopod.runtime.config import load_config

    for variables in ({}, {"ISOPOD_RUN_ROOT": "/a"}, {"ISOPOD_LAYOUT": "rtain"}, {"ISOPOD_SOCKET": "/b.sock"}):
        assert socket_said(**variables) == load_config(environment=variables).paths["socket"]
