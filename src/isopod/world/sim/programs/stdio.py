"""Stdio of simulated programs: /dev/null where nothing is connected."""

from isopod.world.sim.table import SimProcess


async def write_out(process: SimProcess, data: bytes) -> None:
    """Write to standard output."""
    if process.stdout is not None:
        await process.stdout.write(data)


async def write_error(process: SimProcess, data: bytes) -> None:
    """Write to standard error."""
    if process.stderr is not None:
        await process.stderr.write(data)


async def read_in(process: SimProcess, n_bytes: int = 64 << 10) -> bytes:
    """Read from standard input; b"" at its end."""
    return b"" if process.stdin is None else await process.stdin.read_at_most(n_bytes)
