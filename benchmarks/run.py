"""`make bench-run`: everyday commands beside podman, docker and bare crun, on this machine, now.

Each engine runs in its best configuration, with the same one-layer image and the same options, inside the arena (see `_arena`), so
that nothing is left behind. A measurement is a whole command as a user types it, from its start to its end.

Rows: the command line's own start-up; `run --rm true` without a network, on a bridge with prepared namespaces (so many in a row that
refilling the pool is part of the time), on a bridge without any prepared; `exec true`; `ps` with 1 and with 50 running; 20 `run -d` at
once.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks import _arena
from benchmarks._harness import OURS, PROJECT, CommandFailed, Contender, Row, measure, parallel_rate, timed_ms, write_results
from benchmarks._peers import Crun, Engine, docker, install, isopod, podman, quiet, trixie

FOLDER: Final = PROJECT / "build" / "bench" / "work"
N_BURST: Final = 16
"""Twice the default pool of prepared network namespaces."""
N_RUNNING: Final = 50
N_PARALLEL: Final = 20
MODULE: Final = "benchmarks.run"


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; return 1 if isopod itself could not be measured."""
    parser = argparse.ArgumentParser(prog="bench-run", description="isopod beside podman, docker and crun")
    parser.add_argument("--quick", action="store_true", help="a fifth of the runs: to see that it works")
    parser.add_argument("--peers-only", action="store_true", help="measure the peers without isopod")
    arguments = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("not root: engines need root here", file=sys.stderr)
        return 1
    if _arena.INSIDE not in os.environ:
        problems = install()
        for problem in problems:
            print(f"not measured because it could not be installed: {problem}", file=sys.stderr)
        return _arena.run_inside(MODULE, argv, FOLDER)
    return _inside(Path(os.environ[_arena.INSIDE]), quick=arguments.quick, peers_only=arguments.peers_only)


def _inside(folder: Path, *, quick: bool, peers_only: bool) -> int:
    _arena.prepare()
    rootfs, archive = _make_image(folder)
    peers = [podman(folder / "podman"), trixie(folder / "trixie"), docker(folder / "docker")]
    engines = peers if peers_only else [isopod(folder / "isopod"), *peers]
    started = [engine for engine in engines if _starts(engine, rootfs, archive)]
    crun = Crun(folder / "crun")
    has_crun = _starts(crun, rootfs, archive)
    cold = isopod(
        folder / "cold", {"ISOPOD_POOL_SIZE": "0", "ISOPOD_DEFAULT_SUBNET": "10.99.0.0/24", "ISOPOD_PREFIX": f"{_arena.CGROUP_WORD}c"}
    )
    has_cold = not peers_only and _starts(cold, rootfs, archive)
    rows = _rows(started, crun if has_crun else None, cold if has_cold else None, scale=5 if quick else 1)
    results = measure(rows)
    print(f"wrote {write_results('run', results).relative_to(PROJECT)}")
    return 0 if peers_only or any(engine.name == OURS for engine in started) else 1


def _rows(engines: Sequence[Engine], crun: Crun | None, cold: Engine | None, *, scale: int) -> Iterator[Row]:
    """Yield the rows, preparing what each needs; `scale` divides the runs."""
    floor = [] if crun is None else [Contender(crun.name, _timed(crun, crun.run(network="none")))]
    start_up = [Contender(engine.name, _timed(engine, engine.version())) for engine in engines]
    yield Row("command line start-up (--version)", "ms", start_up, 25 // scale)
    yield Row("run --rm true, no network", "ms", [*_runs(engines, "none"), *floor], 20 // scale)
    yield Row(f"run --rm true, bridge, {N_BURST} in a row", "ms", _runs(engines, "bridge", repeat=N_BURST), max(1, 5 // scale))
    peers = [engine for engine in engines if engine.name != OURS]
    yield Row("run --rm true, bridge, nothing prepared", "ms", _runs([*([cold] if cold else []), *peers], "bridge"), 15 // scale)

    for engine in engines:
        quiet(engine.run(network="none", detach="p0"), engine.environment)
    yield Row("exec true", "ms", [Contender(engine.name, _timed(engine, engine.execute("p0"))) for engine in engines], 20 // scale)
    listings = [Contender(engine.name, _timed(engine, engine.listing())) for engine in engines]
    yield Row("ps, 1 running", "ms", listings, 20 // scale)
    for number in range(1, N_RUNNING):
        for engine in engines:
            quiet(engine.run(network="none", detach=f"p{number}"), engine.environment)
    yield Row(f"ps, {N_RUNNING} running", "ms", listings, 20 // scale)
    for engine in engines:
        quiet(engine.remove([f"p{number}" for number in range(N_RUNNING)]), engine.environment)

    yield Row(
        f"run -d, {N_PARALLEL} at once, bridge",
        "1/s",
        [Contender(engine.name, _parallel(engine)) for engine in engines],
        max(1, 5 // scale),
    )


def _runs(engines: Sequence[Engine], network: str, *, repeat: int = 1) -> list[Contender]:
    return [Contender(engine.name, _timed(engine, engine.run(network=network), repeat=repeat)) for engine in engines]


def _timed(engine: Engine | Crun, argv: Sequence[str], *, repeat: int = 1) -> Callable[[], float]:
    return lambda: timed_ms(argv, engine.environment, repeat=repeat)


def _parallel(engine: Engine) -> Callable[[], float]:
    names = [f"d{number}" for number in range(N_PARALLEL)]
    commands = [engine.run(network="bridge", detach=name) for name in names]

    def sample() -> float:
        rate = parallel_rate(commands, engine.environment)
        quiet(engine.remove(names), engine.environment)
        return rate

    return sample


def _starts(engine: Engine | Crun, rootfs: Path, archive: Path) -> bool:
    """Bring an engine up; if that fails, say why and go on without it."""
    try:
        engine.start(rootfs, archive)
    except (CommandFailed, OSError) as error:
        print(f"{engine.name}: not measured because {error}", file=sys.stderr)
        return False
    return True


def _make_image(folder: Path) -> tuple[Path, Path]:
    """Build the starter image's root file system and its tar; every engine gets the same."""
    rootfs, archive = folder / "rootfs", folder / "rootfs.tar"
    rootfs.mkdir(parents=True)
    subprocess.run([str(PROJECT / "scripts/starter_image.sh"), str(rootfs)], check=True)
    subprocess.run(["tar", "--numeric-owner", "-C", str(rootfs), "-cf", str(archive), "."], check=True)
    return rootfs, archive


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
