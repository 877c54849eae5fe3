"""`isopod cluster recover` on the host: a loop of its own around `isopod.cluster.members.recover`, without any node."""

from isopod.cluster.members.recover import RecoveryReport, recover
from isopod.runtime.logger import Logger
from isopod.runtime.metrics import Registry
from isopod.world.host import daemon
from isopod.world.host.loop import new_loop
from isopod.world.host.world import make_host_world


def recover_folder(folder: str, *, do_it: bool) -> RecoveryReport:
    """Recover a cluster from the folder of a stopped node.

    Args:
        folder: What --data-dir said, absolute.
        do_it: False only looks.

    Raises:
        IsopodError: See `isopod.cluster.members.recover.recover`.
    """
    world = make_host_world()
    report: list[RecoveryReport] = []

    async def run() -> int:
        logger = Logger(lambda _: None, world.clock, level="error")
        report.append(await recover(world, folder, do_it=do_it, logger=logger, metrics=Registry()))
        return 0

    try:
        daemon.run(new_loop("asyncio"), run())
    finally:
        world.close()
    return report[0]
