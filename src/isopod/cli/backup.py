"""`backup` and `restore`: the records of a node into a file, and back.

Restoring needs no node, but the installed packages, and the node's lock: nobody restores under a running node.
"""

from __future__ import annotations

from isopod.cli.download import download
from isopod.cli.lean import number_of, text_of
from isopod.cli.say import note, say
from isopod.world.host import console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from isopod.cli.parse import Parsed


def save(parsed: Parsed) -> int:
    """`isopod backup`."""
    path = console.absolute(parsed.words[0])
    facts = download(parsed, "system.backup", path)
    say(f"{path}: {number_of(facts, 'containers')} containers up to record {number_of(facts, 'cursor')}, {text_of(facts, 'digest')}\n")
    return 0


def put_back(parsed: Parsed) -> int:
    """`isopod restore`."""
    from isopod.node.restore import restore_file

    flags = {f"--{name}": console.absolute(parsed.value(name)) for name in ("config", "root", "run-root") if parsed.value(name)}
    restored = restore_file(console.absolute(parsed.words[0]), flags, force=parsed.flag("force"))
    if restored.aside:
        note(f"note: the records from before are in {restored.aside}\n")
    say(f"{restored.containers} containers as of record {restored.cursor}\n")
    return 0
