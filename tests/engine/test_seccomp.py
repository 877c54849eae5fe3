"""The seccomp profile: which rules are taken for which machine, and what a default container cannot call."""

import json
from typing import Any

import msgspec
import pytest

from isopod.engine.capabilities import DEFAULT_CAPABILITIES
from isopod.engine.seccomp import DEFAULT_PROFILE, Profile, Target, convert, load_profile
from isopod.world.errors import BadRecord, ToolMissing
from isopod.world.world import World

X86 = Target("x86_64", "6.18.44-x", DEFAULT_CAPABILITIES)
SMALL = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 38,
    "defaultErrno": "ENOSYS",
    "archMap": [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
    ],
    "syscalls": [
        {"names": ["read", "mount", "clone", "clone3", "unshare"], "action": "SCMP_ACT_ALLOW", "args": [], "includes": {}, "excludes": {}},
        {"names": ["arch_prctl"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["amd64", "x32"]}},
        {"names": ["chroot"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_CHROOT"]}},
        {"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "errno": "EPERM", "excludes": {"caps": ["CAP_SYS_CHROOT"]}},
        {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
        {"names": ["old"], "action": "SCMP_ACT_ALLOW", "excludes": {"minKernel": "4.8"}},
        {"names": ["not_here"], "action": "SCMP_ACT_ALLOW", "excludes": {"arches": ["amd64"]}},
        {
            "names": ["personality"],
            "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 4294967295, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
        },
    ],
}


def small() -> Profile:
    return msgspec.convert(SMALL, Profile)


def allowed(profile: dict[str, Any]) -> list[str]:
    return [name for row in profile["syscalls"] if row["action"] == "SCMP_ACT_ALLOW" for name in row["names"]]


def with_caps(*capabilities: str) -> Target:
    return Target("x86_64", "6.18.44-x", (*DEFAULT_CAPABILITIES, *capabilities))


def test_the_frame() -> None:
    oci = convert(small(), X86)
    assert (oci["defaultAction"], oci["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 38)
    assert oci["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    assert convert(small(), Target("aarch64", "6.1", ()))["architectures"] == ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
    assert sorted({key for row in oci["syscalls"] for key in row}) == ["action", "args", "errnoRet", "names"]


def test_arguments_are_kept() -> None:
    row = next(row for row in convert(small(), X86)["syscalls"] if row["names"] == ["personality"])
    assert row["args"] == [{"index": 0, "value": 4294967295, "valueTwo": 0, "op": "SCMP_CMP_EQ"}]


def test_rules_of_other_architectures_and_kernels_are_left_out() -> None:
    here = allowed(convert(small(), X86))
    assert "arch_prctl" in here and "ptrace" in here
    assert "old" not in here and "not_here" not in here
    there = allowed(convert(small(), Target("aarch64", "4.7.9", DEFAULT_CAPABILITIES)))
    assert "arch_prctl" not in there and "ptrace" not in there
    assert "old" in there and "not_here" in there


@pytest.mark.parametrize(
    "kernel, is_new", [("4.8", True), ("4.8.0", True), ("4.10-rc1", True), ("5", True), ("4.7.99", False), ("3.19", False)]
)
def test_kernels_compare_by_number(kernel: str, is_new: bool) -> None:
    assert ("ptrace" in allowed(convert(small(), Target("x86_64", kernel, ())))) is is_new


def test_rules_follow_capabilities() -> None:
    with_chroot, without = convert(small(), X86), convert(small(), Target("x86_64", "6.1", ()))
    assert "chroot" in allowed(with_chroot) and "chroot" not in allowed(without)
    assert {"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1} in without["syscalls"]
    assert {"names": ["chroot"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1} not in with_chroot["syscalls"]


def test_namespaces_and_mounts_need_sys_admin() -> None:
    rows = convert(small(), X86)["syscalls"]
    assert {"names": ["mount", "unshare"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1} in rows
    assert {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38} in rows
    clones = [row for row in rows if row["names"] == ["clone"]]
    assert clones[0] == {
        "names": ["clone"],
        "action": "SCMP_ACT_ALLOW",
        "args": [{"index": 0, "value": 0x7E020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
    }
    assert sum(row["args"][0]["value"] for row in clones[1:]) == 0x7E020000
    assert all(row["action"] == "SCMP_ACT_ERRNO" and row["errnoRet"] == 1 for row in clones[1:])
    assert {"mount", "unshare", "clone", "clone3"} <= set(allowed(convert(small(), with_caps("CAP_SYS_ADMIN"))))


async def test_a_missing_profile_names_its_package(world: World, folder: str) -> None:
    with pytest.raises(ToolMissing) as caught:
        await load_profile(world, f"{folder}/none.json", DEFAULT_CAPABILITIES)
    assert caught.value.hint == "install it: apt-get install golang-github-containers-common"


@pytest.mark.parametrize("data", [b"", b"{}", b'{"defaultAction": 1, "syscalls": []}', b"\xff"])
async def test_a_damaged_profile_is_said_to_be_one(world: World, folder: str, data: bytes) -> None:
    await world.disk.write(f"{folder}/seccomp.json", data)
    with pytest.raises(BadRecord):
        await load_profile(world, f"{folder}/seccomp.json", DEFAULT_CAPABILITIES)


async def test_a_profile_is_loaded_for_this_machine(world: World, folder: str) -> None:
    await world.disk.write(f"{folder}/seccomp.json", json.dumps(SMALL).encode())
    oci = await load_profile(world, f"{folder}/seccomp.json", DEFAULT_CAPABILITIES)
    facts = world.kernel.host_facts()
    assert oci == convert(small(), Target(facts.architecture, facts.kernel, DEFAULT_CAPABILITIES))


@pytest.mark.host
async def test_what_a_default_container_cannot_call(host_world: World) -> None:
    oci = await load_profile(host_world, DEFAULT_PROFILE, DEFAULT_CAPABILITIES)
    assert oci["defaultAction"] == "SCMP_ACT_ERRNO"
    may = allowed(oci)
    assert {"read", "write", "execve", "openat", "socket", "chroot", "chown", "kill"} <= set(may)
    dangerous = [
        *("kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "bpf", "perf_event_open", "open_by_handle_at"),
        *("add_key", "keyctl", "request_key"),
        *("mount", "umount2", "fsopen", "move_mount", "pivot_root", "unshare", "setns", "clone3", "userfaultfd", "swapon", "iopl"),
        *("clock_settime", "settimeofday", "acct", "quotactl", "lookup_dcookie", "vmsplice", "add_key"),
    ]
    assert [name for name in dangerous if name in may] == []
    clones = [row for row in oci["syscalls"] if "clone" in row["names"] and row["action"] == "SCMP_ACT_ALLOW"]
    assert len(clones) == 1 and clones[0]["args"]
    privileged = await load_profile(host_world, DEFAULT_PROFILE, (*DEFAULT_CAPABILITIES, "CAP_SYS_ADMIN", "CAP_SYS_MODULE"))
    assert {"mount", "unshare", "clone", "clone3", "bpf", "init_module"} <= set(allowed(privileged))


def test_docker_has_fourteen_default_capabilities() -> None:
    assert len(DEFAULT_CAPABILITIES) == 14
    assert list(DEFAULT_CAPABILITIES) == sorted(DEFAULT_CAPABILITIES)
    assert "CAP_SYS_ADMIN" not in DEFAULT_CAPABILITIES and "CAP_NET_ADMIN" not in DEFAULT_CAPABILITIES
