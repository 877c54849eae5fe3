"""The commands about a journal's files: they need the installed packages, and no node; a node that uses the folder is a refusal."""

from __future__ import annotations

import asyncio
import base64
from contextlib import aclosing

import msgspec

from isopod.cli.say import complain, invalid, note, say
from isopod.journal import Journal, JournalSettings
from isopod.journal.folder import CURRENT, explained
from isopod.journal.recovery import read_header, read_manifest
from isopod.journal.repair import plan, repair
from isopod.journal.source import open_source
from isopod.journal.verify import Survey, claim_existing, reading, verify
from isopod.world.errors import JournalDamaged, WrongState
from isopod.world.host import console
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Final

    from isopod.cli.parse import Parsed
    from isopod.journal import Record
    from isopod.journal.repair import RepairPlan
    from isopod.journal.verify import IntegrityReport
    from isopod.world.world import World

    Verb = Callable[[World, str, Parsed], Coroutine[None, None, int]]

EXIT_DAMAGED: Final = 5
EXIT_REFUSED: Final = 1
PREVIEW_CHARS: Final = 60
PROBLEMS_SHOWN: Final = 20


async def verify_(world: World, folder: str, parsed: Parsed) -> int:
    """`isopod journal verify`."""
    report = await verify(world, folder)
    if parsed.value("format", "table") == "json":
        facts = report._asdict() | {"is_valid": report.is_valid, "error_count": report.error_count, "success_rate": report.success_rate}
        say(_json(_plain(facts)))
    else:
        say(_report(report))
    if report.is_valid:
        return 0
    complain(f"{folder}: {_count(report.error_count, 'error')}", f"`isopod journal repair {folder}` says what can be saved")
    return EXIT_DAMAGED


async def dump(world: World, folder: str, parsed: Parsed) -> int:
    """`isopod journal dump`."""
    first, limit = _number(parsed, "from", 0), _number(parsed, "limit", 1 << 62)
    show = _record_json if parsed.value("format", "table") == "json" else _record_line
    n_shown = n_problems = 0
    async with reading(world, folder), aclosing(Survey(world, folder).pieces()) as pieces:
        while n_shown < limit:
            with explained("read the journal in", folder):  # and not what an output says
                piece = await anext(pieces, None)
            if piece is None:
                break
            if piece.problem is not None:
                n_problems += 1
                bad = piece.problem
                complain(JournalDamaged(f"{folder}/{bad.path}", bad.offset, bad.why, lsn=bad.lsn).message, "")
            for record in piece.batch.records if piece.batch is not None else ():
                if record.lsn >= first and n_shown < limit:
                    say(show(record))
                    n_shown += 1
    return EXIT_DAMAGED if n_problems else 0


async def compact(world: World, folder: str, parsed: Parsed) -> int:
    """`isopod journal compact`."""
    (await claim_existing(world, folder)).close()
    with explained("read the journal in", folder):
        manifest = await read_manifest(world, folder)
    if manifest is None:
        raise JournalDamaged(f"{folder}/journal.json", 0, "the manifest is missing")
    kept = _number(parsed, "keep", JournalSettings().archive_n_max)
    segment_bytes = await _segment_bytes(world, folder)
    settings = JournalSettings(segment_bytes=segment_bytes, archive_n_max=kept, compress=not parsed.flag("no-compress"))
    journal = await Journal.open(world, folder, format=manifest.name, settings=settings, on_fatal=lambda _: None)
    try:
        snapshot = await journal.load_snapshot()
        if snapshot is None:
            raise WrongState("journal", folder, "without a snapshot", "compact it", hint="only what a snapshot covers can go")
        before = journal.first_lsn
        await journal.compact(snapshot[0])
        await journal.rotate()
        await journal.tidy()
        found = journal.statistics()
    finally:
        await journal.close()
    gone = max(0, journal.first_lsn - before)
    say(f"{folder}: {_count(gone, 'record')} compacted, {journal.last_lsn - journal.first_lsn + 1} left, ")
    say(f"{_count(found.n_archived, 'segment')} in the archive ({found.archived_bytes} bytes)\n")
    return 0


async def _segment_bytes(world: World, folder: str) -> int:
    """Return how large the journal's segments are, as its owner set it."""
    path = f"{folder}/{CURRENT}"
    if await world.disk.stat(path) is None:
        return JournalSettings().segment_bytes
    source = await open_source(world, path, is_packed=False)
    try:
        return (await read_header(source)).segment_bytes
    finally:
        source.close()


async def repair_(world: World, folder: str, parsed: Parsed) -> int:
    """`isopod journal repair`."""
    is_told = parsed.flag("yes")
    made = await (repair(world, folder) if is_told else plan(world, folder))
    if parsed.value("format", "table") == "json":
        say(_json(_plain(made._asdict() | {"n_lost": made.n_lost, "is_done": is_told})))
    else:
        say(_plan(made, is_told=is_told))
    if is_told or made.way == "nothing":
        return 0
    note("nothing was changed; --yes does it\n")
    return EXIT_REFUSED


VERBS: Final[dict[str, Verb]] = {
    "journal verify": verify_,
    "journal dump": dump,
    "journal compact": compact,
    "journal repair": repair_,
}


def main(parsed: Parsed) -> int:
    """Carry out `isopod journal ...`; returns the exit code."""
    assert parsed.command is not None
    verb = VERBS[parsed.command.name]
    world = make_host_world()
    # The runner turns a Ctrl-C into a cancellation: what is open is closed in order.
    with asyncio.Runner(loop_factory=lambda: new_loop("asyncio")) as runner:
        try:
            return runner.run(verb(world, console.absolute(parsed.words[0]), parsed))
        finally:
            world.close()


def _report(report: IntegrityReport) -> str:
    lines = [
        f"journal    {report.name or 'unknown'} ({report.journal_id or 'no manifest'})",
        f"records    {report.n_records} in {_count(report.n_batches, 'batch')}, lsn {report.first_lsn} to {report.last_lsn}",
        f"compacted  up to lsn {report.floor_lsn}",
        f"segments   {len(report.segments)}",
        f"snapshots  {', '.join(str(each.lsn) + (' (damaged)' if each.why else '') for each in report.snapshots) or 'none'}",
        f"end        {'closed in order' if report.was_closed else _torn(report.torn_bytes)}",
        f"errors     {report.error_count}, success rate {report.success_rate:.4f}",
    ]
    for each in report.problems[:PROBLEMS_SHOWN]:
        place = f"record {each.record_index}, lsn {each.lsn}" if each.lsn else "no record"
        lines.append(f"  {each.path} at byte {each.offset} ({place}): {each.why}")
    if report.error_count > PROBLEMS_SHOWN:
        lines.append(f"  and {report.error_count - PROBLEMS_SHOWN} more")
    return "\n".join(lines) + "\n"


def _torn(n_bytes: int) -> str:
    return f"a write was cut off: {n_bytes} bytes, of which nothing was acknowledged" if n_bytes else "not closed in order, and whole"


def _plan(made: RepairPlan, *, is_told: bool) -> str:
    if made.way == "nothing":
        return f"{made.folder}: nothing to repair; what a crash leaves is mended when the journal is opened\n"
    lines = [f"{each.path} at byte {each.offset}: {each.why}" for each in made.problems[:PROBLEMS_SHOWN]]
    if made.way == "snapshot":
        lines.append(f"recovery begins with the snapshot of lsn {made.base_lsn}")
    first, last = made.base_lsn + 1, made.last_lsn
    lines.append(f"kept: lsn {first} to {last}" if last >= first else "kept: no records")
    if made.lost_lsns is None:
        lines.append("lost: no record that is known")
    else:
        lines.append(f"lost: lsn {made.lost_lsns[0]} to {made.lost_lsns[1]} ({_count(made.n_lost, 'record')}), and what may have followed")
        lines.append("acknowledged records are forgotten: a Raft member must then join again under a new id")
    lines.append(f"{'copied into a folder beside' if is_told else 'would be copied aside'}: {', '.join(made.moved) or 'nothing'}")
    return "\n".join(lines) + "\n"


def _record_line(record: Record) -> str:
    text = record.payload.decode("utf-8", "replace")
    shown = text if text.isprintable() and "\ufffd" not in text else record.payload.hex()
    cut = shown[:PREVIEW_CHARS] + ("..." if len(shown) > PREVIEW_CHARS else "")
    return f"{record.lsn}  kind {record.kind}  {len(record.payload)} bytes  {cut}\n"


def _record_json(record: Record) -> str:
    facts: dict[str, object] = {"lsn": record.lsn, "kind": record.kind, "n_bytes": len(record.payload)}
    try:
        facts["text"] = record.payload.decode("utf-8")
    except UnicodeDecodeError:
        facts["base64"] = base64.b64encode(record.payload).decode()
    return msgspec.json.encode(facts).decode() + "\n"


def _plain(value: object) -> object:
    """Return named tuples as objects, at any depth."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def _json(facts: object) -> str:
    return msgspec.json.format(msgspec.json.encode(facts), indent=2).decode() + "\n"


def _count(n: int, what: str) -> str:
    many = what + ("es" if what.endswith("ch") else "s")
    return f"{n} {what if n == 1 else many}"


def _number(parsed: Parsed, name: str, default: int) -> int:
    text = parsed.value(name)
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise invalid(f"--{name}", text, "want a number from 0 on")
    return int(text)
