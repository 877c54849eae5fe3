"""The name files of a container."""

from isopod.engine.network.resolve import hostname_text, hosts_text, resolv_text


def test_hosts_names_the_container_by_its_address() -> None:
    assert hosts_text("web", "10.88.0.2").splitlines()[-1] == "10.88.0.2\tweb"
    assert "127.0.0.1\tlocalhost\n" in hosts_text("web", "10.88.0.2")


def test_hosts_without_an_address_names_loopback() -> None:
    assert hosts_text("web", None).splitlines()[-1] == "127.0.0.1\tweb"


def test_hostname_ends_in_a_newline() -> None:
    assert hostname_text("web") == "web\n"


def test_resolv_keeps_what_a_container_can_use() -> None:
    host = (
        "# made by hand\n; old\nnameserver  192.0.2.1\nsearch example.org  example.net\noptions ndots:2 # two\n\nnameserver 2001:db8::1\n"
    )
    kept = "nameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch example.org example.net\noptions ndots:2 # two\n"
    assert resolv_text(host) == kept


def test_the_network_s_own_server_comes_first() -> None:
    host = "nameserver 192.0.2.1\nnameserver 192.0.2.2\nnameserver 192.0.2.3\nsearch example.org\n"
    assert resolv_text(host, "10.88.0.1").splitlines() == [
        "nameserver 10.88.0.1",
        "nameserver 192.0.2.1",
        "nameserver 192.0.2.2",
        "search example.org",
        "options ndots:0",
    ]
    assert "ndots:0" not in resolv_text("options ndots:2 rotate\n", "10.88.0.1")


def test_with_a_server_of_the_network_no_public_one_stands_in() -> None:
    text = resolv_text("nameserver 127.0.0.53\n", "10.88.0.1")
    assert [line for line in text.splitlines() if line.startswith("nameserver")] == ["nameserver 10.88.0.1"]


def test_resolv_drops_loopback_servers_with_a_note() -> None:
    text = resolv_text("nameserver 127.0.0.53\nnameserver ::1\nnameserver 192.0.2.1\n")
    assert text == "# isopod: 2 of the host's name servers cannot be reached from a container\nnameserver 192.0.2.1\n"


def test_resolv_without_a_usable_server_gets_public_ones() -> None:
    for host in ("", "nameserver 127.0.0.1\n", "search example.org\n", "nameserver\n", "nameserver localhost\n"):
        lines = resolv_text(host).splitlines()
        assert [line for line in lines if line.startswith("nameserver")] == ["nameserver 8.8.8.8", "nameserver 8.8.4.4"]
    assert "search example.org" in resolv_text("search example.org\n")
