"""What is refused before anything exists."""

from typing import Any

import pytest

from isopod.api.messages import ContainerSpec, Image, ImageConfig, Mount, PortMapping, Resources
from isopod.engine.creation import first_record
from isopod.world.errors import InvalidArgument
from isopod.world.world import World

IMAGE = Image(
    id="sha256:" + "1" * 64,
    names=("i:latest",),
    created_at_ns=1,
    architecture="amd64",
    size_bytes=1,
    layers=(),
    config=ImageConfig(entrypoint=("/init",), command=("serve",), env={"A": "1", "B": "2"}, working_dir="/srv", user="web"),
)


def made(**spec: Any) -> Any:
    return first_record(ContainerSpec(image="i", **spec), IMAGE, identifier="ab" * 32, now_ns=5, boot_id="boot")


def test_the_image_fills_what_was_not_said() -> None:
    record = made()
    assert (record.command, record.working_dir, record.user) == (("/init", "serve"), "/srv", "web")
    assert (record.name, record.hostname, record.status) == ("abababababab", "abababababab", "created")


def test_what_was_said_wins() -> None:
    record = made(command=("run",), env={"B": "3"}, working_dir="/x", user="root", name="n", hostname="h")
    assert (record.command, record.env) == (("/init", "run"), {"A": "1", "B": "3"})
    assert (record.working_dir, record.user, record.name, record.hostname) == ("/x", "root", "n", "h")


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "../up"},
        {"name": "-dash"},
        {"name": "x" * 64},
        {"hostname": "a/b"},
        {"working_dir": "relative"},
        {"command": ("a\0b",)},
        {"env": {"": "x"}},
        {"env": {"A=B": "x"}},
        {"resources": Resources(memory_bytes_max=1024)},
        {"resources": Resources(memory_bytes_max=-5)},
        {"resources": Resources(cpus=0)},
        {"resources": Resources(pids_max=0)},
        {"resources": Resources(disk_bytes_max=1 << 30)},
        {"resources": Resources(network_in_bytes_per_s=100)},
        {"resources": Resources(network_out_bytes_per_s=1 << 40)},
        {"ports": (PortMapping(port=0),)},
        {"ports": (PortMapping(port=80),), "network": "host"},
        {"mounts": (Mount(source="/a", destination="relative"),)},
        {"mounts": (Mount(source="/a", destination="/x/../../y"),)},
        {"mounts": (Mount(source="/a", destination="/proc/sys"),)},
        {"mounts": (Mount(source="/a", destination="/"),)},
        {"mounts": (Mount(source="name", destination="/x", kind="volume"),)},
        {"mounts": (Mount(source="relative", destination="/x"),)},
        {"mounts": (Mount(source="/a", destination="/x"), Mount(source="/b", destination="//x/."))},
    ],
)
def test_nonsense_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        made(**spec)


async def test_a_missing_source_is_refused(world: World, folder: str) -> None:
    from isopod.engine.creation import check_sources

    await check_sources(world, [Mount(source=folder, destination="/x")])
    with pytest.raises(InvalidArgument, match="absent"):
        await check_sources(world, [Mount(source=f"{folder}/absent", destination="/x")])
