"""The OCI configuration: what every container gets, and what its record adds."""

from typing import Any

import msgspec

from isopod.api.messages import Container, Endpoint, Mount, Resources
from isopod.engine.bundle import BundlePaths, Confinement, build_config, build_resources
from isopod.engine.users import ResolvedUser
from isopod.world.kernel import CgroupFacts

CGROUPS = CgroupFacts("hybrid", ("cpu", "memory", "pids"), "test")
ROOT = ResolvedUser(0, 0, (0,), "/root")
USER = ResolvedUser(1000, 1000, (1000, 2000), "/home")
PATHS = BundlePaths("/b", "/b/rootfs", "/b/hosts", "/b/hostname", "/b/resolv.conf")
RECORD = Container(
    id="a" * 64,
    name="box",
    created_at_ns=1,
    updated_at_ns=1,
    image="i",
    image_id="sha256:0",
    command=("true",),
    working_dir="/w",
    user="",
    hostname="box",
    network=Endpoint(network="none"),
)


def config(user: ResolvedUser = ROOT, namespace: str | None = "/ns", **changes: Any) -> Any:
    record = msgspec.structs.replace(RECORD, **changes)
    return build_config(record, PATHS, user, Confinement(namespace, "/isopod/x", {"defaultAction": "SCMP_ACT_ERRNO"}, CGROUPS))


def test_every_container_is_confined() -> None:
    made = config()
    assert made["process"]["noNewPrivileges"] is True
    assert "CAP_SYS_ADMIN" not in made["process"]["capabilities"]["bounding"]
    assert len(made["process"]["capabilities"]["bounding"]) == 14
    assert {"/proc/kcore", "/proc/keys", "/sys/firmware"} <= set(made["linux"]["maskedPaths"])
    assert "/proc/sys" in made["linux"]["readonlyPaths"]
    assert made["linux"]["seccomp"] == {"defaultAction": "SCMP_ACT_ERRNO"}
    kinds = [namespace["type"] for namespace in made["linux"]["namespaces"]]
    assert sorted(kinds) == ["cgroup", "ipc", "mount", "network", "pid", "uts"]
    assert made["linux"]["resources"]["devices"][0] == {"allow": False, "access": "rwm"}


def test_the_hosts_network_is_no_namespace() -> None:
    kinds = [namespace["type"] for namespace in config(namespace="")["linux"]["namespaces"]]
    assert "network" not in kinds
    assert {"type": "network"} in config(namespace=None)["linux"]["namespaces"]


def test_an_ordinary_user_gets_no_capabilities() -> None:
    process = config(USER)["process"]
    assert process["capabilities"]["effective"] == process["capabilities"]["permitted"] == []
    assert process["user"] == {"uid": 1000, "gid": 1000, "additionalGids": [1000, 2000]}
    assert "HOME=/home" in process["env"]


def test_given_variables_win_over_the_defaults() -> None:
    env = config(env={"PATH": "/x", "HOME": "/y", "HOSTNAME": "z"}, terminal=True)["process"]["env"]
    assert env == ["PATH=/x", "HOME=/y", "HOSTNAME=z", "TERM=xterm"]


def test_limits_become_resources() -> None:
    made = build_resources(Resources(memory_bytes_max=1 << 25, cpus=0.2, pids_max=10), CGROUPS)
    assert made["memory"] == {"limit": 1 << 25, "swap": 1 << 25}
    assert made["cpu"] == {"quota": 20000, "period": 100000}
    assert made["pids"] == {"limit": 10}
    assert build_resources(Resources(), CGROUPS).keys() == {"devices"}


def test_no_mount_hides_another() -> None:
    destinations = ("/x/y", "/x", "/etc", "/z")
    made = config(mounts=tuple(Mount(source="/h", destination=path) for path in destinations))["mounts"]
    order = [mount["destination"] for mount in made][-7:]
    assert order == ["/x", "/etc", "/z", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/x/y"]


def test_binds_and_tmpfs_are_mounted_as_asked() -> None:
    mounts = (Mount(source="/h", destination="/c", read_only=True), Mount(source="", destination="/t", kind="tmpfs"))
    made = [mount for mount in config(mounts=mounts)["mounts"] if mount["destination"] in ("/c", "/t")]
    assert made[0] == {"destination": "/c", "type": "bind", "source": "/h", "options": ["rbind", "rprivate", "ro"]}
    assert (made[1]["type"], "nodev" in made[1]["options"]) == ("tmpfs", True)
