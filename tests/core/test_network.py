"""Links, addresses, routes and network namespaces, each test in namespaces of its own. iproute2 is the oracle."""

from pathlib import Path

import pytest

from tests.core.layers import in_namespaces

pytestmark = pytest.mark.host

TOOLS = """
import subprocess
where = sys.argv[1]
def ip(*arguments, inside=None):
    prefix = ["nsenter", "--net=" + inside] if inside else []
    return json.loads(subprocess.run([*prefix, "ip", "-j", "-d", *arguments], check=True, capture_output=True, text=True).stdout or "[]")
def fails(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return error.errno
def addresses(name, inside=None):
    return [f"{a['local']}/{a['prefixlen']}" for a in ip("address", "show", name, inside=inside)[0]["addr_info"] if a["family"] == "inet"]
"""


def test_a_namespace_is_pinned_with_loopback_up(tmp_path: Path) -> None:
    script = (
        TOOLS
        + """
before = os.readlink("/proc/self/ns/net")
_core.create_network_namespace(where + "/ns")
links = ip("link", inside=where + "/ns")
found = [[link["ifname"], "UP" in link["flags"]] for link in links]
print(json.dumps([
    found,
    os.readlink("/proc/self/ns/net") == before,
    os.stat(where + "/ns").st_ino == os.stat("/proc/self/ns/net").st_ino,
    fails(_core.create_network_namespace, where + "/ns"),
    fails(_core.create_network_namespace, where + "/no/ns"),
    len(os.listdir("/proc/self/task")),
]))
"""
    )
    assert in_namespaces(script, str(tmp_path)) == [[["lo", True]], True, False, 17, 2, 1]


def test_a_namespace_that_cannot_be_pinned_leaves_no_file(tmp_path: Path) -> None:
    script = (
        TOOLS
        + """
# Without the right to mount, pinning fails after the namespace was made.
os.mkdir(where + "/folder")
command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c",
           "import sys; from isopod import _core; _core.create_network_namespace(sys.argv[1])", where + "/folder/ns"]
done = subprocess.run(command, capture_output=True, text=True)
print(json.dumps(["PermissionError" in done.stderr, os.listdir(where + "/folder")]))
"""
    )
    assert in_namespaces(script, str(tmp_path)) == [True, []]


def test_a_bridge_is_up_and_kept(tmp_path: Path) -> None:
    script = (
        TOOLS
        + """
for address in ("10.99.0.1/24", "10.99.0.1/24", "10.98.0.1/16"):
    _core.create_bridge("br-test", address)
first = ip("link", "show", "br-test")[0]
subprocess.run(["ip", "link", "set", "br-test", "down"], check=True)
_core.create_bridge("br-test", "10.99.0.1/24")
data = first["linkinfo"]["info_data"]
print(json.dumps([
    addresses("br-test"), data["forward_delay"], data["stp_state"], first["address"],
    [link[1:] for link in _core.list_links() if link[1] == "br-test"],
    ip("link", "show", "br-test")[0]["ifindex"] == first["ifindex"],
]))
"""
    )
    found = in_namespaces(script, str(tmp_path))
    assert found == [["10.99.0.1/24", "10.98.0.1/16"], 0, 0, "02:1b:0a:63:00:01", [["br-test", "bridge", True, 0]], True]


def test_a_pair_connects_a_namespace(tmp_path: Path) -> None:
    script = (
        TOOLS
        + """
ns = where + "/ns"
_core.create_network_namespace(ns)
_core.create_bridge("br-test", "10.99.0.1/24")
_core.create_veth("host0", "br-test", ns, "eth0")
bare = addresses("eth0", inside=ns)
mac = _core.configure_link(ns, "eth0", "10.99.0.2/24", "10.99.0.1")
again = _core.configure_link(ns, "eth0", "10.99.0.2/24", "10.99.0.1")
inner = ip("link", "show", "eth0", inside=ns)[0]
routes = [(r["dst"], r.get("gateway"), r["dev"]) for r in ip("route", inside=ns)]
pinged = subprocess.run(["nsenter", "--net=" + ns, "busybox", "ping", "-c1", "-W5", "10.99.0.1"], capture_output=True).returncode
bridge = next(link[0] for link in _core.list_links() if link[1] == "br-test")
host = [link[1:] for link in _core.list_links() if link[1] == "host0"]
print(json.dumps([
    bare, addresses("eth0", inside=ns), routes, mac == again == inner["address"], "UP" in inner["flags"], pinged,
    host == [["host0", "veth", True, bridge]] or host == [("host0", "veth", True, bridge)], _core.list_routes(),
    [_core.delete_link("host0"), _core.delete_link("host0")], [link["ifname"] for link in ip("link", inside=ns)],
]))
"""
    )
    assert in_namespaces(script, str(tmp_path)) == [
        [],
        ["10.99.0.2/24"],
        [["default", "10.99.0.1", "eth0"], ["10.99.0.0/24", None, "eth0"]],
        True,
        True,
        0,
        True,
        ["10.99.0.0/24"],
        [True, False],
        ["lo"],
    ]


def test_a_network_without_a_way_out(tmp_path: Path) -> None:
    script = (
        TOOLS
        + """
ns = where + "/ns"
_core.create_network_namespace(ns)
_core.create_bridge("br-test", "10.99.0.1/24")
_core.create_veth("host0", "br-test", ns, "eth0")
_core.configure_link(ns, "eth0", "10.99.0.2/24", "")
print(json.dumps([r["dst"] for r in ip("route", inside=ns)]))
"""
    )
    assert in_namespaces(script, str(tmp_path)) == ["10.99.0.0/24"]


def test_a_link_moves(tmp_path: Path) -> None:
    script = (
        TOOLS
        + """
ns = where + "/ns"
_core.create_network_namespace(ns)
subprocess.run(["ip", "link", "add", "mover", "type", "veth", "peer", "name", "stays"], check=True)
_core.move_link("mover", ns)
print(json.dumps([
    [link[1] for link in _core.list_links()], [link["ifname"] for link in ip("link", inside=ns)], fails(_core.move_link, "mover", ns),
]))
"""
    )
    assert in_namespaces(script, str(tmp_path)) == [["lo", "stays"], ["lo", "mover"], 19]


def test_failures_leave_no_links(tmp_path: Path) -> None:
    script = (
        TOOLS
        + """
ns = where + "/ns"
_core.create_network_namespace(ns)
_core.create_bridge("br-test", "10.99.0.1/24")
open(where + "/file", "w").close()
found = [
    fails(_core.create_veth, "host0", "missing", ns, "eth0"),
    fails(_core.create_veth, "host0", "br-test", where + "/missing", "eth0"),
    fails(_core.create_veth, "host0", "br-test", where + "/file", "eth0"),
    fails(_core.create_veth, "host0", "br-test", ns, "lo"),
    fails(_core.create_veth, "br-test", "br-test", ns, "eth0"),
    fails(_core.create_veth, "a-name-that-is-too-long", "br-test", ns, "eth0"),
    fails(_core.create_veth, "host%d", "br-test", ns, "eth0"),
    fails(_core.create_bridge, "lo", "10.97.0.1/24"),
    fails(_core.create_bridge, "br-other", "10.97.0.1"),
    fails(_core.create_bridge, "br-other", "fd00::1/64"),
    fails(_core.configure_link, ns, "eth0", "10.99.0.2/24", "10.99.0.1"),
    fails(_core.configure_link, ns, "lo", "10.99.0.2/24", "nowhere"),
    fails(_core.delete_link, ""),
]
print(json.dumps([found, [link[1] for link in _core.list_links()], [link["ifname"] for link in ip("link", inside=ns)]]))
"""
    )
    expected = [19, 2, 22, 17, 17, 22, 22, 17, 22, 22, 19, 22, 22]
    assert in_namespaces(script, str(tmp_path)) == [expected, ["lo", "br-test"], ["lo"]]


def test_many_links_and_routes_are_all_listed(tmp_path: Path) -> None:
    script = (
        TOOLS
        + """
batch = "".join(f"link add b{n} type bridge\\nlink set b{n} up\\naddr add 10.{n // 250}.{n % 250}.1/24 dev b{n}\\n" for n in range(400))
subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)
subprocess.run(["ip", "route", "add", "default", "via", "10.0.0.2"], check=True)
subprocess.run(["ip", "route", "add", "10.200.0.0/16", "via", "10.0.0.2", "table", "7"], check=True)
print(json.dumps([sorted(link[1] for link in _core.list_links()), _core.list_routes()]))
"""
    )
    links, routes = in_namespaces(script, str(tmp_path))
    assert links == sorted(["lo", *(f"b{number}" for number in range(400))])
    assert set(routes) == {f"10.{number // 250}.{number % 250}.0/24" for number in range(400)}
    assert len(routes) == 400
