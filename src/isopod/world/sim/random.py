"""SimRandom: chance that follows from one seed.

Each stream is a generator of its own, seeded by SHA-256 over the world's seed and the stream's name: a draw in one changes nothing in
another, and Python's hash seed plays no part. Not for secrets: identifiers are as predictable as everything else here.
"""

import hashlib
import random


class SimRandom:
    """The Random port of the simulation.

    Args:
        seed: The world's seed.
        host: The machine it belongs to where there are several: each has streams of its own.
    """

    def __init__(self, seed: int, host: str = "") -> None:
        self._seed = f"{seed}\0{host}" if host else str(seed)
        self._streams: dict[str, random.Random] = {}

    def stream(self, name: str) -> random.Random:
        """Return the generator of that name: the same object for the same name."""
        found = self._streams.get(name)
        if found is None:
            digest = hashlib.sha256(f"{self._seed}\0{name}".encode()).digest()
            found = self._streams[name] = random.Random(int.from_bytes(digest, "big"))
        return found

    def token_hex(self, n_bytes: int) -> str:
        """Return `2 * n_bytes` hexadecimal digits."""
        return self.stream("token_hex").randbytes(n_bytes).hex()
