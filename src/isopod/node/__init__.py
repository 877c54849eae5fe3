"""One node process: the engine wired to a World and served over RPC."""
