"""Guest: the files every virtual machine boots from, and the words its kernel is told.

Made at set-up (`make setup-vm`), looked at here: a kernel, a memory file system whose init is isopod's agent, and the shim that runs
beside each machine. What is missing is said with its name and what to do.
"""

from typing import Final, NamedTuple

import msgspec

from isopod.world.errors import BadRecord, Unsupported
from isopod.world.world import World

FACTS_FILE: Final = "guest.json"
FACTS_BYTES_MAX: Final = 64 << 10
_HINT: Final = "`make setup-vm` makes it, or name another folder with --guest"
_FILES: Final = {"kernel": "vmlinux", "initrd": "initrd.img", "shim": "isopod-shim"}
_WORDS: Final = (
    *("console=ttyS0", "reboot=t", "panic=-1", "quiet", "loglevel=1"),
    # What Linux tests or waits for at its start although no guest of ours needs it: half a second under TCG.
    *("cryptomgr.notests", "8250.nr_uarts=1", "audit=0", "random.trust_cpu=on", "rcupdate.rcu_expedited=1"),
    *("initcall_blacklist=jent_mod_init,load_system_certificate_list", "lsm=capability,landlock,yama"),
)


class GuestFiles(NamedTuple):
    """Paths and facts of one guest."""

    kernel: str
    initrd: str
    shim: str
    kernel_release: str
    agent: str
    digest: str
    """Of kernel and initrd: what was saved of a running guest is good for this one only."""


class _Facts(msgspec.Struct):
    kernel: str
    agent: str
    digest: str


async def find_guest(world: World, folder: str) -> GuestFiles:
    """Look at the guest's files.

    Args:
        world: Where they are.
        folder: Their folder, absolute.

    Raises:
        Unsupported: One is missing.
        BadRecord: What describes them cannot be read.
    """
    for name in (FACTS_FILE, *_FILES.values()):
        if await world.disk.stat(f"{folder}/{name}") is None:
            raise Unsupported("a virtual machine", f"there is no {folder}/{name}", _HINT)
    path = f"{folder}/{FACTS_FILE}"
    try:
        facts = msgspec.json.decode(await world.disk.read(path, n_bytes_max=FACTS_BYTES_MAX), type=_Facts)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRecord(path, str(error), _HINT) from error
    paths = {kind: f"{folder}/{name}" for kind, name in _FILES.items()}
    return GuestFiles(**paths, kernel_release=facts.kernel, agent=facts.agent, digest=facts.digest)


def kernel_words(accelerator: str, tsc_khz: int) -> tuple[str, ...]:
    """Return what every guest's kernel is told; a driver adds what belongs to its machine.

    Args:
        accelerator: "kvm" or "tcg".
        tsc_khz: The host's clock, 0 if it is not known. Told, it keeps Linux from calibrating against a timer that TCG emulates too badly:
            every second boot hangs there otherwise.
    """
    if accelerator != "tcg":
        return _WORDS
    return (*_WORDS, "tsc=reliable", "no_timer_check", *((f"tsc_early_khz={tsc_khz}",) if tsc_khz else ()))
