"""Rest: the HTTP and JSON interface that a VMM serves on a Unix socket.

Not an HTTP client (that is `isopod.net.http`): this says what its answers and failures mean when a VMM is at the other end.

Rules: every call has a deadline and takes at most 4 MiB. Each goes over a connection of its own, so that no request is ever sent twice: to
a VMM a second "start" is an error, whatever HTTP says of PUT. A refusal is `RuntimeFailed` with the VMM's own words; a VMM that is gone
or silent is `UnavailableError`.
Source: Firecracker's and Cloud Hypervisor's OpenAPI documents, which both answer errors as JSON.
"""

import asyncio
from typing import Any, Final, NamedTuple

import msgspec

from isopod.net.http.client import ClientLimits, HttpClient
from isopod.world.errors import BadRecord, DeadlineExceeded, Disconnected, Exhausted, ProtocolViolation, RuntimeFailed, UnavailableError
from isopod.world.network import UnixAddress
from isopod.world.world import World

CALL_TIMEOUT_S: Final = 10.0
READY_TIMEOUT_S: Final = 10.0
BODY_BYTES_MAX: Final = 4 << 20
WORDS_MAX: Final = 600
"""How much of a VMM's explanation is passed on."""
SOCKET_PATH_BYTES_MAX: Final = 107
"""sun_path of unix(7), less its NUL."""
_CONNECT_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.005
_LONGEST_PAUSE_S: Final = 0.1

Json = dict[str, Any]
"""Bodies are the VMMs' own shapes: written here, checked by them."""


class Answer(NamedTuple):
    """What a VMM answered. `value` is the JSON value, or None if there was no body."""

    status: int
    value: Any


class Rest:
    """One VMM's interface.

    Args:
        world: Whose network.
        socket: Path of its Unix socket.
        vmm: What it is, for errors: "firecracker".
        name: The machine's name, for errors.
        prefix: Before every path.
    """

    def __init__(self, world: World, socket: str, *, vmm: str, name: str, prefix: str = "") -> None:
        self._world = world
        self._address = UnixAddress(socket)
        self._vmm = vmm
        self._name = name
        self._prefix = prefix

    async def ask(self, method: str, path: str, body: Json | None = None, *, timeout_s: float = CALL_TIMEOUT_S) -> Answer:
        """Send one request and return its answer, whatever its status.

        Args:
            method: GET, PUT or PATCH.
            path: Behind the prefix.
            body: What to send as JSON.
            timeout_s: For everything.

        Raises:
            UnavailableError: The VMM is gone, or too slow.
            RuntimeFailed: What it says is no HTTP, no JSON, or too much.
        """
        limits = ClientLimits(
            connections_max=1,
            connections_per_host_max=1,
            connect_s=min(_CONNECT_S, timeout_s),
            first_byte_s=timeout_s,
            total_s=timeout_s,
            body_bytes_max=BODY_BYTES_MAX,
        )
        client = HttpClient(self._world, limits=limits, decompresses=False)
        try:
            answer = await client.request(
                method,
                f"http://localhost{self._prefix}{path}",
                json=msgspec.UNSET if body is None else body,
                address=self._address,
                follows_redirects=False,
            )
            data = await answer.read()
        except Disconnected as error:
            raise UnavailableError(f"{self._vmm} of {self._name} is gone: {error.message}", "see the machine's console log") from error
        except DeadlineExceeded as error:
            raise UnavailableError(f"{self._vmm} of {self._name} did not answer {method} {path} within {timeout_s:g} s") from error
        except (ProtocolViolation, Exhausted, BadRecord) as error:
            raise RuntimeFailed(f"{method} {path} of", self._name, f"{self._vmm}'s answer makes no sense: {error.message}") from error
        finally:
            await client.close()
        return Answer(answer.status, self._decoded(data, f"{method} {path} of", is_refusal=answer.status >= 400))

    async def call(self, action: str, method: str, path: str, body: Json | None = None, *, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Send one request and return the value of its answer.

        Args:
            action: What it is for, for the error: "pause".
            method: As for `ask`.
            path: As for `ask`.
            body: As for `ask`.
            timeout_s: As for `ask`.

        Raises:
            RuntimeFailed: The VMM refused; its words are in the message. Others as `ask`.
        """
        answer = await self.ask(method, path, body, timeout_s=timeout_s)
        if not 200 <= answer.status < 300:
            raise RuntimeFailed(action, self._name, f"{self._vmm} refused {method} {path}: {words(answer.value) or answer.status}")
        return answer.value

    async def wait_ready(self, path: str, *, timeout_s: float = READY_TIMEOUT_S) -> Answer:
        """Ask until there is an answer: a VMM that was just started takes a moment to listen.

        Raises:
            UnavailableError: There was none in time.
        """
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + timeout_s
        pause_s = _FIRST_PAUSE_S
        while True:
            left_s = ends_at - loop.time()
            try:
                return await self.ask("GET", path, timeout_s=max(left_s, _FIRST_PAUSE_S))
            except UnavailableError as error:
                if isinstance(error, RuntimeFailed):
                    raise
                if loop.time() + pause_s >= ends_at:
                    raise UnavailableError(
                        f"{self._vmm} of {self._name} did not answer within {timeout_s:g} s", "see the machine's console log"
                    ) from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _decoded(self, data: bytes, action: str, *, is_refusal: bool) -> Any:
        if not data.strip():
            return None
        try:
            return msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if is_refusal:
                return data.decode("utf-8", "replace")
            raise RuntimeFailed(action, self._name, f"{self._vmm}'s answer is no JSON: {error}") from error


def words(value: Any) -> str:
    """Return what a VMM gave as its reason, on one line.

    Args:
        value: Firecracker's {"fault_message": ...}, Cloud Hypervisor's list of causes, or text.
    """
    if isinstance(value, dict):
        value = value.get("fault_message") or value.get("error") or value.get("message") or ""
    if isinstance(value, list):
        value = ": ".join(str(each) for each in value)
    line = " ".join(("" if value is None else str(value)).split())
    return line if len(line) <= WORDS_MAX else line[: WORDS_MAX - 3] + "..."
