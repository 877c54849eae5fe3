"""The World of the real machine: uvloop (or asyncio) and the kernel."""
