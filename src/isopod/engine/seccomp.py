"""The default seccomp profile: from the file that Debian's golang-github-containers-common installs to the OCI form that crun and runc
take.

The file is a superset for all machines and capability sets: a rule may ask for architectures, capabilities or a kernel. `convert` picks
what holds here; it is pure. No list of system calls is written by hand, with two exceptions, `_SYS_ADMIN_CALLS` and `_KEYRING_CALLS`:

That profile is made for engines whose containers often live in user namespaces, so it lets everybody mount and make namespaces and
trusts the kernel to refuse. isopod's containers have no user namespace; making one would only open kernel code to them that is closed
otherwise. As with docker, these calls need CAP_SYS_ADMIN: `clone` with a namespace flag is refused, and `clone3`, whose flags lie in
memory where no filter sees them, is said not to exist (libc then uses `clone`).

The kernel's keyrings belong to users, not to namespaces: a container's root would read the keys of the machine's root. Nobody gets
these calls.

Source: containers-common's seccomp.json; OCI runtime specification, config-linux.md, "Seccomp"; seccomp(2), clone(2).
"""

import errno
from collections.abc import Collection, Sequence
from typing import Any, Final

import msgspec

from isopod.world.errors import BadRecord, ToolMissing, from_os_error
from isopod.world.world import World

Json = dict[str, Any]

DEFAULT_PROFILE: Final = "/usr/share/containers/seccomp.json"
PROFILE_PACKAGE: Final = "golang-github-containers-common"
SYS_ADMIN: Final = "CAP_SYS_ADMIN"
_KEYRING_CALLS: Final = ("add_key", "keyctl", "request_key")
_SYS_ADMIN_CALLS: Final = (
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "mount",
    "mount_setattr",
    "move_mount",
    "open_tree",
    "pivot_root",
    "setns",
    "umount",
    "umount2",
    "unshare",
)
_CLONE_NAMESPACE_FLAGS: Final = (0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000)
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
_GO_ARCHITECTURES: Final = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "i686": "x86",
    "ppc64le": "ppc64le",
    "riscv64": "riscv64",
    "s390x": "s390x",
}
_SCMP_ARCHITECTURES: Final = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64", "s390x": "SCMP_ARCH_S390X"}
_ALLOW: Final = "SCMP_ACT_ALLOW"
_ERRNO: Final = "SCMP_ACT_ERRNO"


class Condition(msgspec.Struct, frozen=True, rename="camel"):
    """When a rule holds, or does not."""

    arches: tuple[str, ...] = ()
    caps: tuple[str, ...] = ()
    min_kernel: str = ""


class Argument(msgspec.Struct, frozen=True, rename="camel"):
    """A comparison of one argument of a call."""

    index: int
    value: int
    op: str
    value_two: int = 0


class Rule(msgspec.Struct, frozen=True, rename="camel"):
    """What happens to some calls."""

    names: tuple[str, ...]
    action: str
    args: tuple[Argument, ...] | None = None
    errno_ret: int | None = None
    includes: Condition = Condition()
    excludes: Condition = Condition()


class ArchMap(msgspec.Struct, frozen=True, rename="camel"):
    """An architecture and those whose calls its kernel takes too."""

    architecture: str
    sub_architectures: tuple[str, ...] = ()


class Profile(msgspec.Struct, frozen=True, rename="camel"):
    """The file. Names of errors ("errno") are left aside: their numbers stand beside them."""

    default_action: str
    syscalls: tuple[Rule, ...]
    default_errno_ret: int | None = None
    arch_map: tuple[ArchMap, ...] = ()


class Target(msgspec.Struct, frozen=True):
    """For what a profile is converted: `architecture` and `kernel` as uname(2) has them."""

    architecture: str
    kernel: str
    capabilities: tuple[str, ...]


async def load_profile(world: World, path: str, capabilities: Sequence[str]) -> Json:
    """Read a profile and convert it for this machine.

    Raises:
        ToolMissing: There is no such file.
        BadRecord: It is not a profile.
        UnavailableError: The disk failed.
    """
    try:
        data = await world.disk.read(path, n_bytes_max=4 << 20)
    except FileNotFoundError as error:
        raise ToolMissing(f"the seccomp profile {path}", PROFILE_PACKAGE) from error
    except OSError as error:
        raise from_os_error(error, "read", path) from error
    facts = world.kernel.host_facts()
    try:
        profile = msgspec.json.decode(data, type=Profile)
    except msgspec.MsgspecError as error:
        raise BadRecord(path, str(error), f"install it again: apt-get install --reinstall {PROFILE_PACKAGE}") from error
    return convert(profile, Target(facts.architecture, facts.kernel, tuple(capabilities)))


def convert(profile: Profile, target: Target) -> Json:
    """Return the `linux.seccomp` of an OCI configuration."""
    rules = [rule for rule in profile.syscalls if _holds(rule, target)]
    if SYS_ADMIN not in target.capabilities:
        rules = _without_namespaces(rules, clone_flags_index=1 if target.architecture == "s390x" else 0)
    oci: Json = {"defaultAction": profile.default_action, "syscalls": [_oci_rule(rule) for rule in rules]}
    if profile.default_errno_ret is not None:
        oci["defaultErrnoRet"] = profile.default_errno_ret
    architectures = _architectures(profile, target.architecture)
    if architectures:
        oci["architectures"] = architectures
    return oci


def _holds(rule: Rule, target: Target) -> bool:
    architecture = _GO_ARCHITECTURES.get(target.architecture, target.architecture)
    wanted, unwanted = rule.includes, rule.excludes
    if architecture in unwanted.arches or any(cap in target.capabilities for cap in unwanted.caps):
        return False
    if unwanted.min_kernel and _version(target.kernel) >= _version(unwanted.min_kernel):
        return False
    if wanted.arches and architecture not in wanted.arches:
        return False
    if wanted.min_kernel and _version(target.kernel) < _version(wanted.min_kernel):
        return False
    return all(cap in target.capabilities for cap in wanted.caps)


def _without_namespaces(rules: Sequence[Rule], *, clone_flags_index: int) -> list[Rule]:
    """Take away from allowing rules what needs CAP_SYS_ADMIN, and say how it is refused."""
    taken = [*_SYS_ADMIN_CALLS, *_KEYRING_CALLS, "clone", "clone3"]
    kept = [_without(rule, taken) if rule.action == _ALLOW else rule for rule in rules]
    known = {name for rule in rules if rule.action == _ALLOW for name in rule.names}
    refused = [name for name in _SYS_ADMIN_CALLS if name in known]
    return [
        *(rule for rule in kept if rule.names),
        *([Rule(tuple(refused), _ERRNO, errno_ret=errno.EPERM)] if refused else []),
        *(_clone_rules(clone_flags_index) if "clone" in known else []),
        *([Rule(("clone3",), _ERRNO, errno_ret=errno.ENOSYS)] if "clone3" in known else []),
    ]


def _clone_rules(index: int) -> list[Rule]:
    """Allow `clone` without namespace flags; each flag alone is refused, so that the caller is told EPERM rather than the default."""
    mask = sum(_CLONE_NAMESPACE_FLAGS)
    refused = [
        Rule(("clone",), _ERRNO, args=(Argument(index, flag, "SCMP_CMP_MASKED_EQ", flag),), errno_ret=errno.EPERM)
        for flag in _CLONE_NAMESPACE_FLAGS
    ]
    return [Rule(("clone",), _ALLOW, args=(Argument(index, mask, "SCMP_CMP_MASKED_EQ", 0),)), *refused]


def _without(rule: Rule, names: Collection[str]) -> Rule:
    return msgspec.structs.replace(rule, names=tuple(name for name in rule.names if name not in names))


def _oci_rule(rule: Rule) -> Json:
    row: Json = {"names": list(rule.names), "action": rule.action}
    if rule.errno_ret is not None:
        row["errnoRet"] = rule.errno_ret
    if rule.args:
        row["args"] = [{"index": a.index, "value": a.value, "valueTwo": a.value_two, "op": a.op} for a in rule.args]
    return row


def _architectures(profile: Profile, machine: str) -> list[str]:
    name = _SCMP_ARCHITECTURES.get(machine)
    if name is None:
        return []
    sub = next((row.sub_architectures for row in profile.arch_map if row.architecture == name), ())
    return [name, *sub]


def _version(text: str) -> tuple[int, int]:
    """Return the first two numbers of "6.18.44-fc"; a missing one is 0."""
    numbers = [_leading_number(part) for part in text.split(".")[:2]]
    return (numbers[0], numbers[1] if len(numbers) > 1 else 0)


def _leading_number(text: str) -> int:
    digits = text[: len(text) - len(text.lstrip("0123456789"))]
    return int(digits) if digits else 0
