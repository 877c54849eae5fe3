"""Debian's Prometheus for tests: on loopback, with its files in the test's folder, and gone with the test."""

import asyncio
import json
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import yaml

from isopod.net.http.client import HttpClient
from isopod.world.errors import IsopodError
from isopod.world.network import TcpAddress
from isopod.world.world import World

START_S: Final = 60.0
SCRAPE_S: Final = 1


class Prometheus:
    """Use it in an `async with`.

    Args:
        world: The host's.
        folder: Where its files go.
        jobs: What it scrapes every second: by job, address and path.
        rules: A file of rules that it evaluates every second, "" for none.
        receives: Whether it takes remote writes.
    """

    def __init__(
        self, world: World, folder: str, jobs: dict[str, tuple[TcpAddress, str]], rules: str = "", *, receives: bool = False
    ) -> None:
        self._more = ["--web.enable-remote-write-receiver"] if receives else []
        self._folder = Path(folder)
        self._client = HttpClient(world)
        self._address = TcpAddress("127.0.0.1", _free_port())
        scrapes = [
            {"job_name": job, "metrics_path": path, "static_configs": [{"targets": [f"{to.host}:{to.port}"]}]}
            for job, (to, path) in jobs.items()
        ]
        config = {
            "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
            "rule_files": [rules] if rules else [],
            "scrape_configs": scrapes,
        }
        (self._folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        self._log = self._folder / "prometheus.log"

    async def __aenter__(self) -> Self:
        listen = f"{self._address.host}:{self._address.port}"
        argv = [
            "prometheus",
            f"--config.file={self._folder}/prometheus.yml",
            f"--storage.tsdb.path={self._folder}/tsdb",
            f"--web.listen-address={listen}",
            "--web.enable-lifecycle",
            *self._more,
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={"GOMAXPROCS": "1", "PATH": "/usr/bin:/bin"}
            )
        try:
            await self._wait_ready()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    @property
    def write_url(self) -> str:
        """Where it takes remote writes."""
        return f"http://{self._address.host}:{self._address.port}/api/v1/write"

    async def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return an expression's series and figures now; AssertionError with its words if it is no expression."""
        answer = await self._ask(f"/api/v1/query?query={quote(expression)}")
        assert answer["status"] == "success", f"{answer.get('error')}: {expression}"
        kind, result = answer["data"]["resultType"], answer["data"]["result"]
        assert kind == "vector", f"{kind}: {expression}"
        return [(each["metric"], float(each["value"][1])) for each in result]

    async def label_values(self, label: str, selector: str) -> list[str]:
        """Return the values a label has in the series that a selector finds."""
        answer = await self._ask(f"/api/v1/label/{label}/values?match[]={quote(selector)}")
        values: list[str] = answer["data"]
        return values

    async def targets(self) -> list[dict[str, Any]]:
        """Return what is scraped, with `health` and `lastError`."""
        found: list[dict[str, Any]] = (await self._ask("/api/v1/targets"))["data"]["activeTargets"]
        return found

    async def metadata(self) -> dict[str, list[dict[str, str]]]:
        """Return type and help of all families, by name."""
        found: dict[str, list[dict[str, str]]] = (await self._ask("/api/v1/metadata"))["data"]
        return found

    async def rules(self) -> list[dict[str, Any]]:
        """Return all rules, with `health` and `lastError`."""
        groups = (await self._ask("/api/v1/rules"))["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    async def _ask(self, path: str) -> Any:  # JSON of many shapes
        to = self._address
        answer = await self._client.request("GET", f"http://{to.host}:{to.port}{path}", address=to)
        return json.loads(await answer.read())

    async def _wait_ready(self) -> None:
        async with asyncio.timeout(START_S):
            while True:
                assert self._process.poll() is None, self._log.read_text(encoding="utf-8")
                with suppress(IsopodError):  # it does not listen yet
                    answer = await self._client.request("GET", f"http://127.0.0.1:{self._address.port}/-/ready", address=self._address)
                    await answer.read()
                    if answer.status == 200:
                        return
                await asyncio.sleep(0.05)

    async def _end(self) -> None:
        await self._client.close()
        if self._process.poll() is None:
            self._process.kill()  # its files are the test's: there is nothing to be saved
        self._process.wait(START_S)


def missing() -> str:
    """Return which program is not installed, "" if none is missing."""
    return ", ".join(name for name in ("prometheus", "promtool") if shutil.which(name) is None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
