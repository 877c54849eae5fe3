"""The commands about the cluster, asked of the local node; all but `recover`, which works on the folder of a stopped one.

A call ends after 5 seconds unless told otherwise. With `--format json` an error is JSON too, on standard error: code, message, hint,
service, node and time.
"""

from __future__ import annotations

from isopod.cli.download import download
from isopod.cli.lean import number_of, rows_of, text_of
from isopod.cli.options import timeout_s
from isopod.cli.say import invalid, note, open_link, render, say
from isopod.world.host import console
from isopod.world.units import parse_duration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final

    from isopod.cli.parse import Parsed
    from isopod.cli.protocol import Body
    from isopod.world.errors import IsopodError

ACTIONS: Final = ("create", "list", "revoke")


def main(parsed: Parsed) -> int:
    """Run a command about the cluster."""
    assert parsed.command is not None
    verb = VERBS[parsed.command.name]
    try:
        return verb(parsed)
    except Exception as error:
        from isopod.world.errors import IsopodError

        if not isinstance(error, IsopodError) or parsed.value("format") != "json":
            raise
        note(_as_json(error, parsed))
        return error.exit_code


def status(parsed: Parsed) -> int:
    """`isopod cluster status`."""
    return _show(parsed, "cluster.status", {"at": parsed.value("addr", ""), "timeout_s": timeout_s(parsed)})


def members(parsed: Parsed) -> int:
    """`isopod cluster members`."""
    return _show(parsed, "cluster.members", {})


def check(parsed: Parsed) -> int:
    """`isopod cluster check`: 0 if all replicas hold the same, 1 if two differ or nothing could be compared."""
    limit_s = timeout_s(parsed)
    with open_link(parsed) as link:
        report = link.call("kv.consistency", {}, limit_s)
    if parsed.value("format") == "json":
        say(_json(report) + "\n")
    else:
        is_same = report.get("consistent")
        word = "nothing to compare" if is_same is None else "all replicas hold the same state" if is_same else "replicas DIFFER"
        say(f"{word} (index {number_of(report, 'index')})\n")
        for row in rows_of(report, "members"):
            say(f"node {number_of(row, 'node')}: {text_of(row, 'state')} {text_of(row, 'digest')}".rstrip() + "\n")
    return 0 if report.get("consistent") else 1


def join(parsed: Parsed) -> int:
    """`isopod cluster join`."""
    token = parsed.value("token", "") or console.environment("ISOPOD_CLUSTER_TOKEN") or ""
    limit_s = timeout_s(parsed)
    return _change(parsed, "cluster.join", {"address": parsed.words[0], "token": token, "timeout_s": limit_s}, limit_s)


def leave(parsed: Parsed) -> int:
    """`isopod cluster leave`."""
    return _about_node(parsed, "cluster.leave")


def promote(parsed: Parsed) -> int:
    """`isopod cluster promote`."""
    return _about_node(parsed, "cluster.promote")


def demote(parsed: Parsed) -> int:
    """`isopod cluster demote`."""
    return _about_node(parsed, "cluster.demote")


def transfer(parsed: Parsed) -> int:
    """`isopod cluster transfer`."""
    return _about_node(parsed, "cluster.transfer")


def change_settings(parsed: Parsed) -> int:
    """`isopod cluster set`."""
    word = parsed.value("voters-max", "")
    if not word:
        raise invalid("setting", "", "say which", "isopod cluster set --voters-max N")
    limit_s = timeout_s(parsed)
    return _change(parsed, "cluster.set", {"voters_max": int(word), "timeout_s": limit_s}, limit_s)


def token(parsed: Parsed) -> int:
    """`isopod cluster token create`, `list` and `revoke`."""
    action, name = parsed.words[0], parsed.words[1] if len(parsed.words) > 1 else ""
    if action not in ACTIONS:
        raise invalid("action", action, "unknown", f"choose one of: {', '.join(ACTIONS)}")
    if (action == "revoke") != bool(name):
        raise invalid("ID", name, "revoke needs one, create and list take none", "see: isopod cluster token list")
    if action == "list":
        return _show(parsed, "cluster.token-list", {})
    if action == "revoke":
        return _change(parsed, "cluster.token-revoke", {"id": name}, timeout_s(parsed))
    uses = parsed.value("uses", "1")
    if not (uses.isascii() and uses.isdigit() and len(uses) < 7):
        raise invalid("--uses", uses, "want a whole number")
    body: Body = {"valid_s": parse_duration(parsed.value("valid", "1h")), "uses": int(uses), "role": parsed.value("role", "voter")}
    with open_link(parsed) as link:
        made = link.call("cluster.token-create", body, timeout_s(parsed))
    say(_json(made) + "\n" if parsed.value("format") == "json" else text_of(made, "token") + "\n")
    return 0


def backup(parsed: Parsed) -> int:
    """`isopod cluster backup`."""
    path = console.absolute(parsed.words[0])
    facts = download(parsed, "cluster.backup", path)
    say(f"{path}: revision {number_of(facts, 'revision')}, {number_of(facts, 'n_bytes')} bytes, sha256:{text_of(facts, 'digest')}\n")
    return 0


def restore(parsed: Parsed) -> int:
    """`isopod cluster restore`."""
    from isopod.cli.upload import FileSource, open_file, upload

    fd = open_file(console.absolute(parsed.words[0]))
    with FileSource(fd, owned=True) as source, open_link(parsed) as link:
        done = upload(link, "cluster.restore", {"force": parsed.flag("force")}, source)
    origin = f"cluster {text_of(done, 'source_cluster_id')} at revision {number_of(done, 'source_revision')}"
    say(f"{number_of(done, 'n_keys')} keys, as of {origin}\n")
    return 0


def recover(parsed: Parsed) -> int:
    """`isopod cluster recover`."""
    from isopod.node.recover import recover_folder

    report = recover_folder(console.absolute(parsed.words[0]), do_it=parsed.flag("yes"))
    if parsed.value("format") == "json":
        say(report.as_json())
    else:
        say(report.as_text())
    return 0


# --- helpers ----------------------------------------------------------------------------------------------------------


def _show(parsed: Parsed, method: str, body: Body) -> int:
    limit_s = timeout_s(parsed)
    with open_link(parsed) as link:
        say(render(link, method, body, parsed.value("format", "table"), timeout_s=limit_s))
    return 0


def _about_node(parsed: Parsed, method: str) -> int:
    """Ask for a change of one node."""
    word = parsed.words[0] if parsed.words else "0"
    if not (word.isascii() and word.isdigit() and len(word) < 20) or (parsed.words and int(word) == 0):
        raise invalid("node id", word, "must be non-zero" if word == "0" else "want a number", "see: isopod cluster members")
    limit_s = timeout_s(parsed)
    return _change(parsed, method, {"node_id": int(word), "timeout_s": limit_s}, limit_s)


def _change(parsed: Parsed, method: str, body: Body, limit_s: float) -> int:
    with open_link(parsed) as link:
        done = link.call(method, body, limit_s)
    say(_json(done) + "\n" if parsed.value("format") == "json" else text_of(done, "message") + "\n")
    return 0


def _json(body: object) -> str:
    import json

    return json.dumps(body, indent=2)


def _as_json(error: IsopodError, parsed: Parsed) -> str:
    """Return an error as programs read it."""
    import json
    from datetime import UTC, datetime

    from isopod.cli.settings import socket_path

    moment = datetime.fromtimestamp(console.unix_time_ns() / 1e9, UTC).isoformat().replace("+00:00", "Z")
    node = parsed.value("addr", "") or f"unix:{socket_path(parsed.value('socket'))}"
    said = {"code": error.code, "message": error.message, "hint": error.hint, "service": "cluster", "node": node, "timestamp": moment}
    return json.dumps({"error": said}) + "\n"


VERBS: Final[dict[str, Callable[[Parsed], int]]] = {
    "cluster status": status,
    "cluster members": members,
    "cluster check": check,
    "cluster join": join,
    "cluster leave": leave,
    "cluster promote": promote,
    "cluster demote": demote,
    "cluster transfer": transfer,
    "cluster set": change_settings,
    "cluster token": token,
    "cluster backup": backup,
    "cluster restore": restore,
    "cluster recover": recover,
}
"""What carries out the commands, by their name."""
