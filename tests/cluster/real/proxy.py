"""A proxy for TCP that holds what passes back for a random while, each way, in order: a long and uneven line.

    python -m tests.cluster.real.proxy LISTEN_HOST:PORT=TARGET_HOST:PORT ...

Lines on its standard input change what it does, at once and for all connections: `delay LEAST_MS MOST_MS`; `stall` lets nothing pass, with
all connections open, until the next `delay`; `cut` resets all connections. It answers each with a line, and ends with its input.
"""

import asyncio
import random
import sys
from typing import Final

CHUNK: Final = 64 << 10
LINE_MAX: Final = 256
"""Chunks under way each way of one connection."""


class Proxy:
    """What all connections share."""

    def __init__(self) -> None:
        self.least_s = self.most_s = 0.0
        self.flows = asyncio.Event()
        self.flows.set()
        self.writers: dict[int, asyncio.StreamWriter] = {}
        self.n_writers = 0

    def command(self, line: str) -> None:
        """Do what a line says."""
        match line.split():
            case ["delay", least, most]:
                self.least_s, self.most_s = int(least) / 1e3, int(most) / 1e3
                self.flows.set()
            case ["stall"]:
                self.flows.clear()
            case ["cut"]:
                for writer in self.writers.values():
                    writer.transport.abort()
            case _:
                raise ValueError(line)

    async def serve(self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection, until either end closes it."""
        number = self.n_writers
        self.n_writers += 2
        self.writers[number] = writer
        try:
            host, _, port = target.rpartition(":")
            reader_2, writer_2 = await asyncio.open_connection(host, int(port))
            self.writers[number + 1] = writer_2
            ways = [asyncio.ensure_future(self.carry(reader, writer_2)), asyncio.ensure_future(self.carry(reader_2, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            writer.transport.abort()  # nobody listens there: as a router that says so
        finally:
            for each in (self.writers.pop(number, None), self.writers.pop(number + 1, None)):
                if each is not None:
                    each.close()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one way."""
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(LINE_MAX)
        deliver = asyncio.ensure_future(self.deliver(line, writer))
        loop = asyncio.get_running_loop()
        try:
            while chunk := await reader.read(CHUNK):
                await line.put((loop.time() + random.uniform(self.least_s, self.most_s), chunk))
            await line.put((0.0, b""))
            await deliver
        finally:
            deliver.cancel()
            await asyncio.gather(deliver, return_exceptions=True)

    async def deliver(self, line: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        """Hand out what has been under way for long enough."""
        while True:
            due_s, chunk = await line.get()
            if not chunk:
                return
            await asyncio.sleep(max(0.0, due_s - asyncio.get_running_loop().time()))
            await self.flows.wait()
            writer.write(chunk)
            await writer.drain()


def say(word: str) -> None:
    """Tell whoever started this."""
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


async def main(routes: list[str]) -> None:
    """Serve until standard input ends."""
    proxy = Proxy()
    for route in routes:
        here, _, target = route.partition("=")
        host, _, port = here.rpartition(":")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: str = target) -> None:
            await proxy.serve(target, reader, writer)

        await asyncio.start_server(serve, host, int(port))
    loop = asyncio.get_running_loop()
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    say("ready")
    while line := await commands.readline():
        proxy.command(line.decode())
        say("done")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
