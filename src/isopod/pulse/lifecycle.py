"""Lifecycle: PUT or POST /-/reload, as Prometheus has it: everything that lies in files is read again at once.

What is read: the policy, the files for TLS, the token, the users. Each for itself: what makes no sense leaves what held before, and is
told; the others hold from then on. All of them are followed anyway; this is for those who want to know now, and whether it worked.

It changes what holds, so it is off unless it was asked for, and a page of another site cannot make a browser ask for it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import msgspec

from isopod.net.http.messages import HttpError, Request, Response
from isopod.pulse.pages import as_json, choose, plain, printable
from isopod.pulse.security import check_origin
from isopod.world.errors import DeadlineExceeded, IsopodError, UsageError

RELOAD: Final = "/-/reload"
RELOAD_METHODS: Final = ("PUT", "POST")
READ_S: Final = 10.0
"""How long reading one thing may take: a path may lead to another machine."""

Read = Callable[[], Awaitable[None]]
"""Reads something again and takes it over; raises IsopodError if that cannot be."""


class ReadRow(msgspec.Struct, frozen=True):
    """What became of one thing. `error` is "" if what it says now holds."""

    what: str
    file: str
    error: str


class Lifecycle:
    """Answers /-/reload.

    Args:
        parts: What is read again, by what it is and its file.
        is_enabled: Whether anybody may.
    """

    def __init__(self, parts: Callable[[], Mapping[tuple[str, str], Read]], *, is_enabled: bool) -> None:
        self._parts = parts
        self._is_enabled = is_enabled
        self._lock = asyncio.Lock()

    async def answer(self, request: Request) -> Response:
        """Read everything again.

        Returns:
            200 if all of it holds now; 400 if something makes no sense; 500 if something cannot be read.

        Raises:
            HttpError: 403 if it is off or another site's page asks, 405 for another method.
        """
        if request.method not in RELOAD_METHODS:
            raise HttpError(
                405, f"{request.method} is not answered here", "PUT and POST are", headers=(("allow", ", ".join(RELOAD_METHODS)),)
            )
        if not self._is_enabled:
            raise HttpError(403, "reading files again over HTTP is off", "start the agent with --enable-lifecycle, or send it SIGHUP")
        check_origin(request)
        kind = choose("", request.headers.combined("accept"))
        async with self._lock:
            rows, status = [], 200
            for (what, file), read in self._parts().items():
                error = await _error_of(what, read)
                if error is not None:
                    status = max(status, 400 if isinstance(error, UsageError) else 500)
                rows.append(ReadRow(what, file, "" if error is None else error.message))
        made = as_json({"read": rows}) if kind == "json" else plain(_text(rows))
        return Response(status, made.headers, made.body)


async def _error_of(what: str, read: Read) -> IsopodError | None:
    try:
        async with asyncio.timeout(READ_S):
            await read()
    except TimeoutError:
        return DeadlineExceeded(f"reading the {what}", READ_S)
    except IsopodError as error:
        return error
    return None


def _text(rows: list[ReadRow]) -> str:
    if not rows:
        return "nothing to read: there is no policy file, no TLS, no token and no file of users\n"
    return "".join(
        f"{row.what} {printable(row.file)}: " + (f"refused, what held before holds: {printable(row.error)}\n" if row.error else "read\n")
        for row in rows
    )
