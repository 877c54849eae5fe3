"""What runtimes say, and what users are told of it."""

import pytest

from isopod.engine.supervisor import classify
from isopod.world.errors import CommandNotRunnable, RuntimeFailed


@pytest.mark.parametrize(
    ("text", "exit_code"),
    [
        ("executable file `nope` not found in $PATH: No such file or directory\n", 127),
        ('exec: "nope": executable file not found in $PATH: unknown', 127),
        ('exec: "/bin/nope": stat /bin/nope: no such file or directory: unknown', 127),
        ("open executable: Operation not permitted\n", 126),
        ("open executable: Permission denied", 126),
        ('exec: "/etc/passwd": permission denied: unknown', 126),
        ('exec: "/etc": is a directory: unknown', 126),
    ],
)
def test_a_command_that_cannot_run(text: str, exit_code: int) -> None:
    error = classify("create", "box", text, ("nope",))
    assert isinstance(error, CommandNotRunnable)
    assert error.exit_code == exit_code
    assert "nope" in error.message


def test_anything_else_is_the_runtimes_failure_in_its_own_words() -> None:
    error = classify("create", "box", "mount `proc` to `/proc`:\n Permission denied", ("sh",))
    assert isinstance(error, RuntimeFailed)
    assert "mount `proc` to `/proc`: Permission denied" in error.message
