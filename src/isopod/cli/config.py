"""The commands about a node's settings: they need the installed packages, and no node."""

from __future__ import annotations

from isopod.cli.say import note, say
from isopod.node.configure import check_file, read_configuration
from isopod.runtime.config import CONFIG_FLAG, show
from isopod.world.host import console, daemon

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from isopod.cli.parse import Parsed


def show_(parsed: Parsed) -> int:
    """`isopod config show`."""
    path = parsed.value("config")
    loaded = read_configuration({CONFIG_FLAG: console.absolute(path)} if path else {}, daemon.environment())
    for line in loaded.notes:
        note(f"note: {line}\n")
    form = parsed.value("format", "table")
    assert form in ("table", "json", "toml")
    say(show(loaded.config, loaded.origins, form=form, with_origin=parsed.flag("origin")))  # type: ignore[arg-type]  # see above
    return 0


def check(parsed: Parsed) -> int:
    """`isopod config check`."""
    path = console.absolute(parsed.words[0])
    check_file(path)
    say(f"{path}: sound\n")
    return 0


VERBS: Final[dict[str, Callable[[Parsed], int]]] = {"config show": show_, "config check": check}
"""What carries out the commands, by their name."""
