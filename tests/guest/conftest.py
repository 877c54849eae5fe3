"""Machines that the tests of one file share: a boot takes seconds, what is tested takes milliseconds."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guest import machine, rootfs

LAYERS = [["l0i", None], ["l1i", None]]


@contextmanager
def open_machine(**settings: Any) -> Iterator[machine.Machine]:
    """A configured machine with busybox in two layers."""
    absent = machine.missing()
    if absent is not None:
        pytest.skip(absent)
    with tempfile.TemporaryDirectory(prefix="isopod-guest-") as name:
        folder = Path(name)
        upper, lower = rootfs.make_layers(folder)
        with machine.booted(folder, [machine.Disk(upper, "l0i"), machine.Disk(lower, "l1i")]) as booted:
            booted.channel.request("configure", **machine.configuration(LAYERS, **settings))
            yield booted


@pytest.fixture(scope="module")
def guest() -> Iterator[machine.Machine]:
    """A configured machine, the same for all tests of a file."""
    with open_machine() as booted:
        yield booted


@pytest.fixture
def channel(guest: machine.Machine) -> machine.Channel:
    """Its agent, freshly greeted."""
    guest.channel.greet()
    return guest.channel
