"""resolve_user: names, numbers and groups from an image's own files."""

import pytest

from isopod.engine.users import ID_MAX, ResolvedUser, resolve_user
from isopod.world.errors import InvalidArgument

PASSWD = """root:x:0:0:root:/root:/bin/sh
# a remark
www:x:33:34:web:/var/www:/bin/false
broken:x:thirty:1::/x:/bin/sh
huge:x:99999999999:1::/x:/bin/sh
1000:x:2000:2001:a name of digits:/home/digits:/bin/sh
homeless:x:70:70::relative:/bin/sh
app:x:1001:1001:app:/home/app:/bin/sh
app:x:6:6:second of the name:/six:/bin/sh
"""
GROUP = """root:x:0:
wheel:x:10:root,app
www:x:34:
audio:x:29:www,app
video:x:44:app
app:x:1001:app
nonsense
bad:x:many:app
77:x:78:
"""


@pytest.mark.parametrize(
    "user, expected",
    [
        ("", ResolvedUser(0, 0, (0, 10), "/root")),
        ("root", ResolvedUser(0, 0, (0, 10), "/root")),
        ("0", ResolvedUser(0, 0, (0, 10), "/root")),
        ("www", ResolvedUser(33, 34, (34, 29), "/var/www")),
        ("33", ResolvedUser(33, 34, (34, 29), "/var/www")),
        ("app", ResolvedUser(1001, 1001, (1001, 10, 29, 44), "/home/app")),
        ("app:video", ResolvedUser(1001, 44, (44,), "/home/app")),
        ("app:5", ResolvedUser(1001, 5, (5,), "/home/app")),
        ("app:", ResolvedUser(1001, 1001, (1001, 10, 29, 44), "/home/app")),
        (":video", ResolvedUser(0, 44, (44,), "/root")),
        ("4242", ResolvedUser(4242, 0, (0,), "/")),
        ("4242:4343", ResolvedUser(4242, 4343, (4343,), "/")),
        ("1000", ResolvedUser(2000, 2001, (2001,), "/home/digits")),
        ("0:77", ResolvedUser(0, 78, (78,), "/root")),
        ("homeless", ResolvedUser(70, 70, (70,), "/")),
        (str(ID_MAX), ResolvedUser(ID_MAX, 0, (0,), "/")),
    ],
)
def test_resolves(user: str, expected: ResolvedUser) -> None:
    assert resolve_user(user, PASSWD, GROUP) == expected


def test_an_image_without_the_files_takes_numbers() -> None:
    assert resolve_user("", "", "") == ResolvedUser(0, 0, (0,), "/")
    assert resolve_user("12:13", "", "") == ResolvedUser(12, 13, (13,), "/")


@pytest.mark.parametrize(
    "user, why",
    [
        ("nobody", "no user 'nobody'"),
        ("broken", "no user 'broken'"),
        ("huge", "no user 'huge'"),
        ("-1", "no user '-1'"),
        ("app:nogroup", "no group 'nogroup'"),
        ("app:bad", "no group 'bad'"),
        ("app:5:6", "no group '5:6'"),
        (str(ID_MAX + 1), "ids go from 0"),
        (f"0:{ID_MAX + 1}", "ids go from 0"),
        ("9" * 300, "malformed"),
        ("ro\not", "malformed"),
        ("\u0663", "no user"),
    ],
)
def test_refuses(user: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        resolve_user(user, PASSWD, GROUP)


def test_too_many_groups_are_refused() -> None:
    group = "".join(f"g{i}:x:{i}:app\n" for i in range(65_537))
    with pytest.raises(InvalidArgument, match="more than 65536 groups"):
        resolve_user("app", PASSWD, group)
