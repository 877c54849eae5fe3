"""The World: the only way to time, chance, network, disk, processes and the kernel's objects.

`World` is a frozen bundle of ports, given to everything at construction. `isopod.world.host` is the kernel, `isopod.world.sim`
is one thread of virtual time. Coroutines, tasks, events and queues are plain asyncio on either event loop.
"""
