"""What /proc says, parsed; files that are missing say nothing."""

from isopod.world.host import figures
from isopod.world.kernel import DiskFigures


def test_the_parsers_of_proc() -> None:
    assert figures.parse_fields("VmRSS:\t  12 kB\nName:\tx y\nThreads:\t3\n\nodd") == {"VmRSS": 12, "Threads": 3}
    assert figures.parse_cpu("cpu  100 0 50 1000 5 0 1 0 0 0\ncpu0 1", 100)["idle"] == 10
    assert figures.parse_cpu("", 100) == {}
    assert figures.parse_table("TcpExt: A\nTcpExt: 1\nIpExt: In Out Odd\nIpExt: 7 8 -1\n", "IpExt") == {"In": 7, "Out": 8}
    assert figures.parse_table("IpExt: In\n", "IpExt") == {}
    text = "Inter-| Receive\n face |bytes\n  eth0: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\nlo:9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n"
    assert [(i.name, i.received_bytes, i.n_receive_drops, i.sent_bytes, i.n_send_drops) for i in figures.parse_interfaces(text)] == [
        ("eth0", 1, 4, 5, 8),
        ("lo", 9, 0, 9, 0),
    ]
    disks = "8 0 sda 10 0 20 0 30 0 40 0 0 500 0\n8 1 sda1 1 0 1 0 1 0 1 0 0 1 0\n7 0 loop0 1 0 1 0 1 0 1 0 0 1 0\nodd\n"
    assert figures.parse_disks(disks) == (DiskFigures("sda", 10, 20 * 512, 30, 40 * 512, 0.5),)
