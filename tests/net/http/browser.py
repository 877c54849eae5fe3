"""A real browser for tests: chromium-headless-shell, driven over its DevTools pipe.

    async with open_browser() as page:
        await page.goto("http://127.0.0.1:8080/")
        assert await page.evaluate("document.title") == "Dashboard"

The browser is a session of its own: it and whatever it started are killed by that session's process group, its profile is a temporary
folder, and nothing is left behind, also when the test fails. It reaches loopback only: its own background traffic is switched off.
Source: the DevTools protocol, domains Browser, Target, Page and Runtime; `--remote-debugging-pipe`: NUL-ended JSON on descriptors 3 and 4.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
import pytest

BROWSER: Final = "/usr/bin/chromium-headless-shell"
START_S: Final = 30.0
CALL_S: Final = 20.0
_FLAGS: Final = (
    "--remote-debugging-pipe",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--mute-audio",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)

needs_browser = pytest.mark.skipif(
    not os.path.exists(BROWSER), reason=f"{BROWSER} is not installed (Debian package chromium-headless-shell)"
)


class BrowserError(Exception):
    """The browser ended, a DevTools call failed, or a script of the page threw."""


class Page:
    """One tab. `errors` collects what its scripts threw or wrote with console.error."""

    def __init__(self, pipe: "_Pipe", session: str) -> None:
        self.errors: list[str] = []
        self._pipe = pipe
        self._session = session
        self._loaded = asyncio.Event()

    async def goto(self, url: str) -> None:
        """Load a page and wait until it, with what it names, has been loaded.

        Args:
            url: Of this machine.

        Raises:
            BrowserError: It cannot be loaded.
        """
        self._loaded.clear()
        answer = await self.call("Page.navigate", url=url)
        if answer.get("errorText"):
            raise BrowserError(f"{url}: {answer['errorText']}")
        async with asyncio.timeout(CALL_S):
            await self._loaded.wait()

    async def evaluate(self, script: str) -> Any:  # of whatever type the script's value is
        """Run an expression in the page; a promise is awaited. The value comes back as JSON would carry it.

        Raises:
            BrowserError: It threw.
        """
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details.get("text"))
        return answer["result"].get("value")

    async def wait(self, condition: str, *, timeout_s: float = CALL_S) -> Any:
        """Wait until an expression is true in the page, and return its value; it is looked at in every frame the page draws.

        Raises:
            BrowserError: It did not become true in time, or threw.
        """
        loop = (
            "new Promise((resolve, reject) => { const end = performance.now() + %d; const look = () => { try { const v = (%s); "
            "if (v) resolve(v); else if (performance.now() > end) reject(new Error('not true in time')); else setTimeout(look, 10); } "
            "catch (e) { reject(e); } }; look(); })"
        )
        return await self.evaluate(loop % (timeout_s * 1000, condition))

    async def screenshot(self) -> bytes:
        """Return a picture of what is visible, as PNG."""
        import base64

        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call any DevTools method of the tab. Raises BrowserError."""
        return await self._pipe.call(method, self._session, parameters)

    def on_event(self, method: str, parameters: dict[str, Any]) -> None:
        """Take an event of this tab."""
        if method == "Page.loadEventFired":
            self._loaded.set()
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details.get("text", ""))
        elif method == "Runtime.consoleAPICalled" and parameters.get("type") == "error":
            self.errors.append(" ".join(str(each.get("value", each.get("description", ""))) for each in parameters.get("args", ())))


class _Pipe(asyncio.Protocol):
    """The DevTools connection: calls out, answers and events in."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self._loop = asyncio.get_running_loop()
        self._writer: asyncio.WriteTransport | None = None
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._n_calls = 0
        self._buffer = b""
        self._is_lost = False

    def use(self, writer: asyncio.WriteTransport) -> None:
        """Write there."""
        self._writer = writer

    async def call(self, method: str, session: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Call a method and wait for its answer."""
        if self._is_lost or self._writer is None:
            raise BrowserError("the browser has ended")
        self._n_calls += 1
        number = self._n_calls
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._calls[number] = answer
        self._writer.write(msgspec.json.encode(message) + b"\0")
        try:
            async with asyncio.timeout(START_S):
                return await answer
        finally:
            del self._calls[number]

    def data_received(self, data: bytes) -> None:
        *whole, self._buffer = (self._buffer + data).split(b"\0")
        for text in whole:
            self._on_message(msgspec.json.decode(text))

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(BrowserError("the browser has ended"))

    def _on_message(self, message: dict[str, Any]) -> None:
        if "id" not in message:
            page = self.pages.get(message.get("sessionId", ""))
            if page is not None:
                page.on_event(message["method"], message.get("params", {}))
            return
        answer = self._calls.get(message["id"])
        if answer is None or answer.done():
            return
        if "error" in message:
            answer.set_exception(BrowserError(f"{message['error'].get('message')}"))
        else:
            answer.set_result(message.get("result", {}))


@asynccontextmanager
async def open_browser(*flags: str) -> AsyncIterator[Page]:
    """Start a browser with one empty tab; it is gone when the block is left.

    Args:
        *flags: More command line flags ("--window-size=800,600").
    """
    folder = tempfile.mkdtemp(prefix="isopod-browser-")
    try:
        async with _running(folder, flags) as pipe:
            target = (await pipe.call("Target.createTarget", "", {"url": "about:blank"}))["targetId"]
            session = (await pipe.call("Target.attachToTarget", "", {"targetId": target, "flatten": True}))["sessionId"]
            page = pipe.pages[session] = Page(pipe, session)
            await page.call("Page.enable")
            await page.call("Runtime.enable")
            yield page
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def _running(folder: str, flags: tuple[str, ...]) -> AsyncIterator[_Pipe]:
    """Run the browser, its pipe on descriptors 3 and 4."""
    loop = asyncio.get_running_loop()
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # Python cannot choose the numbers that a child's descriptors get: a shell reopens them (dash cannot copy one of two digits).
    script = f'exec "$0" "$@" 3</proc/self/fd/{theirs_in} 4>/proc/self/fd/{theirs_out}'
    argv = ["/bin/sh", "-c", script, BROWSER, *_FLAGS, f"--user-data-dir={folder}", *flags]
    environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "XDG_RUNTIME_DIR": folder, "LANG": "C.UTF-8"}
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs_in, theirs_out),
            start_new_session=True,
            env=environment,
        )
    except BaseException:
        os.close(ours_out)
        os.close(ours_in)
        raise
    finally:
        os.close(theirs_in)
        os.close(theirs_out)
    pipe = _Pipe()
    reader, _ = await loop.connect_read_pipe(lambda: pipe, os.fdopen(ours_in, "rb", 0))
    writer, _ = await loop.connect_write_pipe(asyncio.Protocol, os.fdopen(ours_out, "wb", 0))
    pipe.use(writer)
    try:
        yield pipe
    finally:
        await _kill(process)
        writer.close()
        reader.close()
        await asyncio.sleep(0.01)  # both loops close pipes in a later turn


async def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill the browser's whole session and wait until its leader is reaped and the others are gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    async with asyncio.timeout(CALL_S):
        while process.poll() is None or _has_group(process.pid):
            await asyncio.sleep(0.01)


def _has_group(pgid: int) -> bool:
    """Whether a process of the group is left; what another has to reap does not count."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                state, _, group = file.read().rpartition(")")[2].split()[:3]
                if int(group) == pgid and state != "Z":
                    return True
    return False
