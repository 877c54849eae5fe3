"""Certificates: what the face shows by TLS, read from its files again and again, so that a renewed certificate needs no restart.

Files that cannot be read, or do not fit each other just now, leave what was shown before.
"""

import asyncio
from typing import Any, Final

import grpc

from isopod.faces.grpc.settings import FaceSettings
from isopod.runtime.logger import Logger
from isopod.world.disk import Disk
from isopod.world.errors import InvalidArgument, UnavailableError, from_os_error
from isopod.world.tls import ServerTls, TlsMaterial

REREAD_S: Final = 5.0
FILE_BYTES_MAX: Final = 1 << 20


class Certificates:
    """The files' contents.

    Args:
        settings: Names them.
        disk: Where they lie.
        logger: Told of new ones, and of what cannot be read.
    """

    def __init__(self, settings: FaceSettings, disk: Disk, logger: Logger) -> None:
        self._paths = (settings.key_file, settings.cert_file, settings.ca_file)
        self._disk = disk
        self._logger = logger
        self._shown: tuple[bytes, ...] = ()
        self._fresh: grpc.ServerCertificateConfiguration | None = None
        """What grpcio has not been given yet."""

    async def open(self) -> grpc.ServerCredentials:
        """Return credentials for a server: it shows its certificate, and so must whoever connects.

        Raises:
            UnavailableError: A file cannot be read.
            InvalidArgument: They are no certificate, its key and an authority.
        """
        self._shown = await self._read()
        fetch: Any = self._fetch  # the stubs do not know that None stands for nothing new
        return grpc.dynamic_ssl_server_credentials(_configuration(self._shown), fetch, require_client_authentication=True)

    async def follow(self) -> None:
        """Read the files again until cancelled."""
        said = ""
        while True:
            await asyncio.sleep(REREAD_S)
            try:
                found = await self._read()
            except (UnavailableError, InvalidArgument) as error:
                if error.message != said:
                    self._logger.warning("grpc.certificates_not_read", why=error.message)
                said = error.message
                continue
            said = ""
            if found != self._shown:
                self._shown, self._fresh = found, _configuration(found)
                self._logger.info("grpc.certificates_read", files=list(self._paths))

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return what is new, None for nothing. Called by a thread of grpcio's for each connection."""
        fresh, self._fresh = self._fresh, None
        return fresh

    async def _read(self) -> tuple[bytes, ...]:
        contents: list[bytes] = []
        for path in self._paths:
            try:
                contents.append(await self._disk.read(path, n_bytes_max=FILE_BYTES_MAX))
            except OSError as error:
                raise from_os_error(error, "read", path) from error
        key, certificate, authorities = contents
        # grpcio would not say what is wrong with them.
        ServerTls(TlsMaterial(certificate, key, authorities, client_auth="required"))
        return tuple(contents)


def _configuration(contents: tuple[bytes, ...]) -> grpc.ServerCertificateConfiguration:
    key, certificate, authorities = contents
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authorities)
