"""The client of a machine's shim against peers that behave, refuse, fall silent and lie."""

import json

import pytest

from isopod.engine.vm.channel import FRAMES_MAX
from isopod.engine.vm.machine import Plan, PlannedFile, Vsock
from isopod.engine.vm.shim import Process, ShimClient, Shims, ShimSpec, shim_json
from isopod.wire.agent import WINDOW_BYTES, Frame, Kind, encode
from isopod.world.errors import CommandNotRunnable, InvalidArgument, NotFound, RuntimeFailed, Unsupported
from isopod.world.processes import ProcessIdentity
from isopod.world.world import World
from tests.engine.vm.peers import ShimPeer, answering, shim

LS = Process(command=("ls", "-l"), env={"A": "b"}, cwd="/", user="", terminal=True, stdin=True, size=(24, 80))


def client(world: World, folder: str) -> ShimClient:
    return ShimClient(world, f"{folder}/shim.sock", "box")


def ok(peer: ShimPeer, frame: Frame) -> None:
    peer.ok(frame.stream)


@pytest.mark.row("V3")
async def test_a_command_with_its_stdio(world: World, folder: str) -> None:
    def run(peer: ShimPeer, frame: Frame) -> None:
        peer.ok(frame.stream, pid=7)
        peer.send(Kind.STDOUT, frame.stream, b"out")
        peer.send(Kind.STDERR, frame.stream, b"err")

    def script(peer: ShimPeer, frame: Frame) -> None:
        answering({"exec": run})(peer, frame)
        if frame.kind is Kind.STDIN_END:
            peer.say(Kind.EXIT, frame.stream, {"code": 3, "signal": None, "out_of_memory": False})

    async with shim(world, f"{folder}/shim.sock", script) as peers:
        command = await client(world, folder).exec(LS)
        assert await command.attached.write(b"in")
        await command.attached.resize(10, 20)
        await command.signal(15)
        command.attached.end_input()
        heard = [(output.is_stderr, output.data) async for output in command.attached.outputs()]
        assert heard == [(False, b"out"), (True, b"err")]
        assert await command.wait() == 3
        command.close()
        await peers[0].is_closed.wait()
        kinds = [frame.kind for frame in peers[0].frames]
        assert kinds == [Kind.REQUEST, Kind.STDIN, Kind.RESIZE, Kind.SIGNAL, Kind.STDIN_END]
        assert peers[0].frames[0].json() == {
            "op": "exec",
            "argv": ["ls", "-l"],
            "env": {"A": "b"},
            "cwd": "/",
            "user": "",
            "terminal": True,
            "stdin": True,
            "rows": 24,
            "columns": 80,
        }
        assert peers[0].received(Kind.RESIZE)[0].payload == b"\x0a\0\x14\0"


async def test_a_size_told_before_the_command_begins_is_only_noted(world: World, folder: str) -> None:
    async with shim(world, f"{folder}/shim.sock", answering({"attach": ok})) as peers:
        attached = await client(world, folder).attach(stdin=False)
        attached.is_held = True
        await attached.resize(10, 20)
        assert attached.size == (10, 20)
        attached.close()
        await peers[0].is_closed.wait()
        assert not peers[0].received(Kind.RESIZE)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("failed", RuntimeFailed),
        ("busy", RuntimeFailed),
        ("invalid", InvalidArgument),
        ("unsupported", Unsupported),
        ("not_found", NotFound),
    ],
)
async def test_refusals(world: World, folder: str, code: str, error: type[Exception]) -> None:
    async with shim(world, f"{folder}/shim.sock", lambda peer, frame: peer.refuse(frame.stream, code, "because\nof it")):
        with pytest.raises(error, match="because of it"):
            await client(world, folder).request("sync")


@pytest.mark.parametrize(("code", "exit_code"), [("not_found", 127), ("not_executable", 126)])
async def test_a_command_that_is_not_there(world: World, folder: str, code: str, exit_code: int) -> None:
    async with shim(world, f"{folder}/shim.sock", lambda peer, frame: peer.refuse(frame.stream, code, "no")):
        for starting in (client(world, folder).start(LS), client(world, folder).exec(LS)):
            with pytest.raises(CommandNotRunnable) as caught:
                await starting
            assert caught.value.exit_code == exit_code


async def test_nobody_listens(world: World, folder: str) -> None:
    with pytest.raises(RuntimeFailed, match="reach the shim of box"):
        await client(world, folder).status()


@pytest.mark.row("V8")
@pytest.mark.virtual_time
async def test_a_shim_that_says_nothing(world: World, folder: str) -> None:
    async with shim(world, f"{folder}/shim.sock", lambda *_: None):
        with pytest.raises(RuntimeFailed, match="no answer within 3 s"):
            await client(world, folder).request("sync", deadline_s=3)


LIES = {
    "no frame": b"\xff" * 64,
    "an unknown kind": b"\5\0\0\0\x63\1\0\0\0",
    "a response that is no JSON": encode(Kind.RESPONSE, 1, b"{"),
    "a response without a word": encode(Kind.RESPONSE, 1, b"{}"),
    "a response of another shape": encode(Kind.RESPONSE, 1, b"[1]"),
    "something before the response": encode(Kind.STDOUT, 1, b"x"),
    "a stream nobody opened": encode(Kind.STDOUT, 9, b"x"),
    "a credit of three bytes": encode(Kind.CREDIT, 1, b"abc"),
    "frames without end": encode(Kind.EVENT, 1, b"{}") * (FRAMES_MAX + 2),
    "nothing at all, and the end": b"",
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
@pytest.mark.row("V8")
async def test_a_shim_that_lies(world: World, folder: str, lie: bytes) -> None:
    def script(peer: ShimPeer, _: Frame) -> None:
        if lie:
            peer.raw(lie)
        else:
            peer.close()

    async with shim(world, f"{folder}/shim.sock", script) as peers:
        with pytest.raises(RuntimeFailed, match="box"):
            await client(world, folder).request("sync")
        await peers[0].is_closed.wait()


@pytest.mark.row("V8")
async def test_a_flood_beyond_the_credit_ends_the_connection(world: World, folder: str) -> None:
    def flood(peer: ShimPeer, frame: Frame) -> None:
        peer.ok(frame.stream)
        for _ in range(WINDOW_BYTES // 65536 + 1):
            peer.send(Kind.STDOUT, frame.stream, b"x" * 65536)

    async with shim(world, f"{folder}/shim.sock", answering({"exec": flood})) as peers:
        command = await client(world, folder).exec(LS)
        await peers[0].is_closed.wait()
        assert await command.wait() is None
        command.close()


async def test_bytes_are_granted_as_they_are_taken(world: World, folder: str) -> None:
    n_pieces = 2 * WINDOW_BYTES // 65536

    def script(peer: ShimPeer, frame: Frame) -> None:
        if frame.kind is Kind.REQUEST:
            peer.ok(frame.stream)
            for _ in range(WINDOW_BYTES // 65536):
                peer.send(Kind.STDOUT, frame.stream, b"x" * 65536)
        elif frame.kind is Kind.STDIN:  # the reader took all: everything is granted anew
            assert peer.credit[frame.stream] == WINDOW_BYTES
            for _ in range(WINDOW_BYTES // 65536):
                peer.send(Kind.STDOUT, frame.stream, b"y" * 65536)
            peer.say(Kind.EXIT, frame.stream, {"code": 0})

    async with shim(world, f"{folder}/shim.sock", script):
        command = await client(world, folder).exec(LS)
        n_heard = 0
        async for output in command.attached.outputs():
            n_heard += 1
            if n_heard == n_pieces // 2:
                assert await command.attached.write(b"more")
            assert len(output.data) == 65536
        assert n_heard == n_pieces
        assert await command.wait() == 0
        command.close()


async def test_input_waits_for_credit_and_ends_when_nobody_reads(world: World, folder: str) -> None:
    taken = 0

    def script(peer: ShimPeer, frame: Frame) -> None:
        nonlocal taken
        if frame.kind is Kind.REQUEST:
            peer.ok(frame.stream)
        elif frame.kind is Kind.STDIN:
            taken += len(frame.payload)
            if taken == WINDOW_BYTES:
                peer.send(Kind.CREDIT, frame.stream, (1000).to_bytes(4, "little"))
            elif taken == WINDOW_BYTES + 1000:
                peer.send(Kind.CLOSE, frame.stream)

    async with shim(world, f"{folder}/shim.sock", script):
        command = await client(world, folder).exec(LS)
        assert not await command.attached.write(b"z" * (WINDOW_BYTES + 5000))
        assert taken == WINDOW_BYTES + 1000
        command.close()


@pytest.mark.row("V3")
async def test_files_come_and_go(world: World, folder: str) -> None:
    taken: list[bytes] = []

    def give(peer: ShimPeer, frame: Frame) -> None:
        peer.ok(frame.stream, mode=0o644, n_bytes=6, is_folder=False)
        peer.send(Kind.DATA, frame.stream, b"abc")
        peer.send(Kind.DATA, frame.stream, b"def")
        peer.send(Kind.DATA_END, frame.stream)

    def script(peer: ShimPeer, frame: Frame) -> None:
        if frame.kind is Kind.REQUEST and frame.json()["op"] == "archive":
            give(peer, frame)
        elif frame.kind is Kind.DATA:
            taken.append(frame.payload)
        elif frame.kind is Kind.DATA_END:
            peer.ok(frame.stream)

    async with shim(world, f"{folder}/shim.sock", script):
        transfer = await client(world, folder).archive("/etc/passwd")
        assert [piece async for piece in transfer.pieces()] == [b"abc", b"def"]
        transfer.close()
        transfer = await client(world, folder).extract("/tmp/x")
        assert await transfer.write(b"tar")
        await transfer.finish()
        transfer.close()
    assert taken == [b"tar"]


async def test_a_copy_that_breaks_off_is_no_copy(world: World, folder: str) -> None:
    def half(peer: ShimPeer, frame: Frame) -> None:
        peer.ok(frame.stream)
        peer.send(Kind.DATA, frame.stream, b"abc")
        peer.refuse(frame.stream, "failed", "the disk broke")

    def script(peer: ShimPeer, frame: Frame) -> None:
        if frame.kind is Kind.REQUEST and frame.json()["op"] == "archive":
            half(peer, frame)
        elif frame.kind is Kind.REQUEST:
            peer.refuse(frame.stream, "not_found", "no such folder")

    async with shim(world, f"{folder}/shim.sock", script):
        transfer = await client(world, folder).archive("/etc/passwd")
        with pytest.raises(RuntimeFailed, match="the disk broke"):
            _ = [piece async for piece in transfer.pieces()]
        transfer.close()
        transfer = await client(world, folder).extract("/nowhere")
        with pytest.raises(NotFound, match="no such folder"):
            await transfer.finish()
        transfer.close()


async def test_events_until_the_end(world: World, folder: str) -> None:
    def watch(peer: ShimPeer, frame: Frame) -> None:
        peer.ok(frame.stream)
        peer.say(Kind.EVENT, frame.stream, {"event": "silent", "silent_s": 12.5})
        peer.say(Kind.EVENT, frame.stream, {"event": "panic", "message": "Oops"})
        peer.send(Kind.EVENT, frame.stream, b"not JSON")
        peer.close()

    async with shim(world, f"{folder}/shim.sock", answering({"watch": watch})):
        events = [event async for event in client(world, folder).watch()]
    assert [event["event"] for event in events] in ([], ["silent"], ["silent", "panic"])  # what an abort overtook is lost


async def test_a_status_of_the_wrong_shape(world: World, folder: str) -> None:
    async with shim(world, f"{folder}/shim.sock", lambda peer, frame: peer.ok(frame.stream, vmm_pid="x")):
        with pytest.raises(RuntimeFailed, match="makes no sense"):
            await client(world, folder).status()


PLAN = Plan(
    argv=("/usr/bin/vmm", "-x"),
    env={"PATH": "/bin"},
    cwd="/run/b",
    files=(PlannedFile("listen", "/run/b/qmp.sock"), PlannedFile("console"), PlannedFile("agent"), PlannedFile("tap", "t0")),
    console="socket",
    agent="socket",
    own_network=True,
)
SPEC = ShimSpec(
    id="a" * 64,
    name="box",
    folder="/run/b",
    exit_file="/run/exits/a",
    log="/var/a/container.log",
    console_log="/var/a/console.log",
    log_bytes_max=1,
    console_bytes_max=2,
    cgroup_procs=("/sys/fs/cgroup/x/cgroup.procs",),
    monitor_socket="",
    boot_timeout_s=60.0,
    silent_timeout_s=30.0,
    stop_timeout_s=5.0,
    vcpus=1,
    memory_bytes=128 << 20,
    hypervisor="qemu",
)


def test_what_a_shim_is_told() -> None:
    told = shim_json(SPEC, PLAN)
    assert json.loads(json.dumps(told)) == told
    assert told["files"] == [
        {"kind": "listen", "path": "/run/b/qmp.sock"},
        {"kind": "console"},
        {"kind": "agent"},
        {"kind": "tap", "name": "t0"},
    ]
    assert (told["socket"], told["end_file"], told["monitor_socket"]) == ("/run/b/shim.sock", "/run/b/end.json", None)
    assert shim_json(SPEC, PLAN._replace(agent=Vsock("/run/b/v.sock", 1024)))["agent"] == {"vsock": "/run/b/v.sock", "port": 1024}
    assert shim_json(SPEC, PLAN._replace(agent="none", stop_argv=("/bin/stop",)))["stop_argv"] == ["/bin/stop"]


async def test_how_a_machine_ended(world: World, folder: str) -> None:
    shims = Shims(world, "/nowhere/isopod-shim", folder)
    assert await shims.read_end(folder) is None
    await world.disk.write(f"{folder}/end.json", b'{"code":null,"why":"no init","kind":"panic","out_of_memory":true}')
    end = await shims.wait_end(folder)
    assert end is not None
    assert (end.kind, end.code, end.why, end.out_of_memory) == ("panic", None, "no init", True)
    for text in (b'{"kind":"nonsense"}', b"{", b"\xff"):
        await world.disk.write(f"{folder}/end.json", text)
        assert await shims.read_end(folder) is None
    assert shims.strays([ProcessIdentity(1, 1)]) == []
