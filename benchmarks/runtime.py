"""`make bench-runtime`: the runtime and its servers beside their peers, on this machine, now.

Each area has a module of its own (`runtime_http`, `runtime_rpc`, ...) that yields rows; here they run one after the other, and go to
build/bench/runtime.json. A server under test is a process of its own, and what is compared is the CPU time the kernel charges it for one
operation, which other work on the machine disturbs far less than it disturbs a rate; rates stand beside it. Peers are installed into
virtual environments under build/peers by the modules themselves.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Final

from benchmarks._harness import PROJECT, Row, measure, write_results

AREAS: Final = ("sched", "metrics", "files", "shards", "net", "http", "ws", "rpc", "node")


def main(argv: Sequence[str]) -> int:
    """Measure all areas, or those named; return 1 if something of isopod's own could not be measured."""
    parser = argparse.ArgumentParser(prog="bench-runtime", description="isopod's runtime beside its peers")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs: to see that it works")
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"which of: {', '.join(AREAS)}")
    arguments = parser.parse_args(argv)
    unknown = [area for area in arguments.areas if area not in AREAS]
    if unknown:
        parser.error(f"unknown area: {', '.join(unknown)}; known are: {', '.join(AREAS)}")
    areas = arguments.areas or AREAS
    results = measure(_rows(areas, quick=arguments.quick))
    target = "runtime" if not arguments.areas else f"runtime-{'-'.join(areas)}"
    print(f"wrote {write_results(target, results).relative_to(PROJECT)}")
    return 1 if not results or any(result.ours is None for result in results) else 0


def _rows(areas: Sequence[str], *, quick: bool) -> Iterator[Row]:
    for area in areas:
        yield from importlib.import_module(f"benchmarks.runtime_{area}").rows(quick=quick)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
