"""isopod runs containers and microVMs: an engine on one machine, a cluster on many.

This package is the floor plan; `docs/architecture.md` explains it. Nothing is imported here, so that the
command line starts as fast as a bare interpreter.
"""

__version__ = "0.1.0"
