"""A container runtime's face for `benchmarks.pulse`: tells the agent whose the fake shims' sandboxes are.

    python -m benchmarks._pulse_cri SOCKET PODS_JSON

Answers Version, ListPodSandbox and ListContainers of the CRI's v1 with what the file says, read anew at each call. Not a test double: it
never fails and is never slow.
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec

from isopod.pulse.cri_client import FILE, Messages


class Pod(msgspec.Struct, frozen=True):
    """One line of the shims' list."""

    id: str
    uid: str
    name: str
    namespace: str
    runtime_handler: str = ""


async def serve(path: str, pods_file: Path, messages: Messages) -> None:
    """Serve on a Unix socket until killed."""

    def pods() -> dict[str, object]:
        return {"items": [_item(pod) for pod in msgspec.json.decode(pods_file.read_bytes(), type=list[Pod])]}

    answers: dict[str, Callable[[], dict[str, object]]] = {
        "Version": lambda: {"runtime_name": b"bench", "runtime_version": b"1"},
        "ListPodSandbox": pods,
        "ListContainers": lambda: {"containers": []},
    }

    def handler(method: str) -> Any:  # grpcio's own type has no name
        async def answer(_request: bytes, _context: object) -> bytes:
            _, reply = messages.of(method)
            data: bytes = reply(**answers[method]()).SerializeToString()
            return data

        return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    table = {method: handler(method) for method in answers}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("runtime.v1.RuntimeService", table),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


def _item(pod: Pod) -> dict[str, object]:
    metadata = {"name": pod.name.encode(), "uid": pod.uid.encode(), "namespace": pod.namespace.encode()}
    return {"id": pod.id.encode(), "metadata": metadata, "created_at": 1, "runtime_handler": pod.runtime_handler.encode()}


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2]), Messages(Path(FILE).read_bytes())))
