"""Confined: runs a program as deploy/systemd/isopod-pulse.service would, as far as that goes without systemd. Part of test_confined.

    confined.py NUMBERS WORDS...

run by `command`, in a mount namespace of its own that cannot be written, without capabilities and with no-new-privileges: then this file
makes the rest of what the unit says hold for itself, and becomes the program.

    RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6    socket(2) of others: EAFNOSUPPORT
    MemoryDenyWriteExecute=yes                          mmap(2), mprotect(2), shmat(2), pkey_mprotect(2): EPERM
    RestrictNamespaces=yes                              unshare(2), setns(2), clone(2) of new ones: EPERM; clone3(2): ENOSYS
    SystemCallFilter=@system-service                    any other call ends the process, as with systemd; NUMBERS are those allowed
    SystemCallArchitectures=native                      likewise

Not tried: PrivateTmp, PrivateDevices and ProtectHome (the test's own files lie there). Source: systemd.exec(5), seccomp(2).
"""

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Final

ARCH_X86_64: Final = 0xC000003E
ALLOW: Final = 0x7FFF0000
KILL: Final = 0x80000000
ERRNO: Final = 0x00050000
LOAD, EQUAL, ANY_BIT, RETURN, AND = 0x20, 0x15, 0x45, 0x06, 0x54
NUMBER, ARCH, ARGUMENTS = 0, 4, 16
"""Offsets in `struct seccomp_data`."""
FAMILIES: Final = (1, 2, 10)
WRITE_EXEC: Final = 2 | 4
NEW_NAMESPACES: Final = 0x7E020080
PR_SET_SECCOMP: Final = 22
MODE_FILTER: Final = 2
READ_ONLY: Final = """
set -e
awk '{print $5}' /proc/self/mountinfo | while read -r target; do
    case "$target" in
        /proc | /proc/* | /dev | /dev/*) ;;
        *) mount -o remount,bind,ro "$target" ;;
    esac
done
exec "$@"
"""

Instruction = tuple[int, int, int, int]
"""Code, where to go on if so and if not, and a value."""


def command(user: int, numbers: Sequence[int], words: Sequence[str]) -> list[str]:
    """Return the command that runs a program confined.

    Args:
        user: Whose it is; 0 for root without capabilities.
        numbers: The system calls it may make.
        words: It.
    """
    bare = f"setpriv --reuid {user} --regid {user} --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all --ambient-caps=-all"
    stage = [sys.executable, "-I", os.path.abspath(__file__), ",".join(map(str, numbers)), *words]
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", READ_ONLY, "sh", *bare.split(), "--", *stage]


def program(allowed: Sequence[int]) -> list[Instruction]:
    """Return the filter: for each rule its instructions, which fall through to the next."""
    rules: list[Instruction] = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, ARCH_X86_64), (RETURN, 0, 0, KILL)]
    rules += _when(
        41, [(LOAD, 0, 0, ARGUMENTS), *[each for family in FAMILIES for each in _equal(family, ALLOW)], _refuse(errno.EAFNOSUPPORT)]
    )
    rules += _when(
        9, [(LOAD, 0, 0, ARGUMENTS + 16), (AND, 0, 0, WRITE_EXEC), *_equal(WRITE_EXEC, ERRNO | errno.EPERM), (RETURN, 0, 0, ALLOW)]
    )
    for call in (10, 329):  # mprotect, pkey_mprotect
        rules += _when(call, [(LOAD, 0, 0, ARGUMENTS + 16), *_bits(4), (RETURN, 0, 0, ALLOW)])
    rules += _when(30, [(LOAD, 0, 0, ARGUMENTS + 16), *_bits(0o100000), (RETURN, 0, 0, ALLOW)])  # shmat, SHM_EXEC
    rules += _when(56, [(LOAD, 0, 0, ARGUMENTS), *_bits(NEW_NAMESPACES), (RETURN, 0, 0, ALLOW)])  # clone
    for call, number in ((272, errno.EPERM), (308, errno.EPERM), (435, errno.ENOSYS)):  # unshare, setns, clone3
        rules += _when(call, [_refuse(number)])
    rules.append((LOAD, 0, 0, NUMBER))
    for call in allowed:
        rules += _equal(call, ALLOW)
    return [*rules, (RETURN, 0, 0, KILL)]


def _when(call: int, then: list[Instruction]) -> Iterator[Instruction]:
    """Give what holds for one system call."""
    yield LOAD, 0, 0, NUMBER
    yield EQUAL, 0, len(then), call
    yield from then


def _equal(value: int, verdict: int) -> list[Instruction]:
    return [(EQUAL, 0, 1, value), (RETURN, 0, 0, verdict)]


def _bits(value: int) -> list[Instruction]:
    return [(ANY_BIT, 0, 1, value), _refuse(errno.EPERM)]


def _refuse(number: int) -> Instruction:
    return (RETURN, 0, 0, ERRNO | number)


def install(allowed: Sequence[int]) -> None:
    """Have the filter hold for this process and all that come of it."""
    code = b"".join(struct.pack("HBBI", *each) for each in program(allowed))
    buffer = ctypes.create_string_buffer(code, len(code))
    table = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.c_char_p(table), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def main() -> None:
    """Be the last stage: look whether the rest holds, install the filter, become the program."""
    numbers, *words = sys.argv[1:]
    try:
        os.close(os.open(f"{os.path.dirname(__file__)}/written", os.O_CREAT | os.O_WRONLY))
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
    else:
        sys.exit("what must not be written can be written")
    install([int(number) for number in numbers.split(",")])
    os.execv(words[0], words)


if __name__ == "__main__":
    main()
