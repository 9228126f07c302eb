"""The one place that assembles the coordinator: settings, store, workers, runs, services, server."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from fed_core.errors import ConfigError
from fed_core.grpc_options import server_options
from fed_server.clock import Clock, SystemClock
from fed_server.rounds.coordinator import Coordinator
from fed_server.rounds.membership import Membership
from fed_server.rounds.surroundings import Facilities
from fed_server.rounds.workers import Workers
from fed_server.services.identity import Authenticator, hash_secret, new_secret
from fed_server.services.interceptor import Gate
from fed_server.services.participation import ParticipationService
from fed_server.services.runs import RunsService
from fed_server.services.transfer import TransferService
from fed_server.settings import ServerSettings
from fed_server.store.blobs import DataDirectory
from fed_server.store.sql import SqlStore
from fed_server.telemetry import Telemetry
from fedstream.v1 import participation_pb2_grpc, runs_pb2_grpc

logger = logging.getLogger(__name__)

SERVICES = ("fedstream.v1.Participation", "fedstream.v1.Transfer", "fedstream.v1.Runs")
SOCKET_NAME = "fed-server.sock"
# sockaddr_un holds 108 bytes, the last of them zero.
_MAX_SOCKET_PATH = 107


@dataclass(frozen=True)
class Tokens:
    """The two secrets of a federation, kept 0600 in the data directory and made at the first start."""

    join: str
    operator: str

    @classmethod
    def load(cls, data_dir: Path) -> Self:
        """Reads them, or makes them."""
        return cls(_token(data_dir / "join-token"), _token(data_dir / "operator-token"))


def _token(path: Path) -> str:
    if not path.exists():
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(new_secret() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    return path.read_text().strip()


class App:
    """A running coordinator. `async with App(settings) as app:` serves until the block ends, then drains and stops.

    Raises ConfigError or ConflictError at the start: port in use, data directory in use or of another version.
    """

    def __init__(self, settings: ServerSettings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.address = ""
        self.metrics_address = ""
        self.socket_path = settings.data_dir.resolve() / SOCKET_NAME
        self.tokens = Tokens("", "")
        self._clock = clock or SystemClock()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        settings = self.settings
        # One thread per operation: updates are folded side by side, and sums do not depend on a thread count.
        torch.set_num_threads(1)
        files = DataDirectory(settings.data_dir)
        self._stack.callback(files.close)
        self.tokens = Tokens.load(files.root)
        store = SqlStore(f"sqlite:///{files.database_path}")
        workers = Workers(store, num_disk_threads=settings.max_concurrent_transfers + 2, num_compute_threads=2)
        self._stack.callback(workers.close)
        evaluators = {}
        if settings.workloads:
            from fed_server.evaluation.evaluator import Evaluator
        for source in settings.workloads:
            evaluator = Evaluator(source, settings.evaluation_data, files.root / "evaluator.log")
            self._stack.callback(evaluator.close)
            name = await asyncio.to_thread(evaluator.describe)
            evaluators[name] = evaluator
        membership = Membership(settings.lease_seconds, self._clock.monotonic())
        facilities = Facilities(
            workers=workers,
            files=files,
            clock=self._clock,
            membership=membership,
            evaluators=evaluators,
            new_id=lambda: uuid.uuid4().hex,
        )
        coordinator = Coordinator(facilities)
        self._stack.push_async_callback(coordinator.stop)
        await coordinator.start()

        telemetry = Telemetry()
        if settings.metrics_listen is not None:
            self.metrics_address = self._stack.enter_context(telemetry.served(settings.metrics_listen))
            watching = asyncio.create_task(telemetry.watch_event_loop())
            self._stack.callback(watching.cancel)

        authenticator = Authenticator(coordinator.client, hash_secret(self.tokens.operator))
        server = grpc.aio.server(interceptors=[Gate(authenticator)], options=server_options())
        participation_pb2_grpc.add_ParticipationServicer_to_server(
            ParticipationService(
                coordinator, workers, self._clock, hash_secret(self.tokens.join), settings.lease_seconds
            ),
            server,
        )
        runs_pb2_grpc.add_RunsServicer_to_server(RunsService(coordinator, workers, files, membership), server)
        transfer = TransferService(coordinator, workers, files, telemetry, settings.max_concurrent_transfers)
        server.add_generic_rpc_handlers((transfer.handler(),))
        health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        reflection.enable_server_reflection(
            (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name), server
        )

        self._listen(server)
        await server.start()
        self.socket_path.chmod(0o600)

        async def drain() -> None:
            for name in ("", *SERVICES):
                await health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
            await coordinator.drain()
            await server.stop(settings.drain_seconds)
            self.socket_path.unlink(missing_ok=True)

        self._stack.push_async_callback(drain)
        for name in ("", *SERVICES):
            await health.set(name, health_pb2.HealthCheckResponse.SERVING)
        logger.info(
            "serving", extra={"address": self.address, "socket": str(self.socket_path), "metrics": self.metrics_address}
        )

    def _listen(self, server: grpc.aio.Server) -> None:
        settings = self.settings
        if len(os.fsencode(self.socket_path)) > _MAX_SOCKET_PATH:
            raise ConfigError(
                f"--data-dir: the operator's socket would be {self.socket_path}, longer than the {_MAX_SOCKET_PATH} bytes that a "
                f"socket path may have; use a shorter directory (a symbolic link will do)"
            )
        self.socket_path.unlink(missing_ok=True)
        server.add_insecure_port(f"unix:{self.socket_path}")
        try:
            if settings.tls_cert is not None and settings.tls_key is not None:
                port = server.add_secure_port(settings.listen, _credentials(settings))
            else:
                port = server.add_insecure_port(settings.listen)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigError(
                f"--listen {settings.listen}: cannot listen there; the port is in use, or the address is not this machine's"
            )
        host = settings.listen.rpartition(":")[0]
        self.address = f"{host}:{port}"


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials:
    assert settings.tls_cert is not None and settings.tls_key is not None
    # Tried by the standard library first: gRPC says of a bad certificate only that it cannot listen.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        key, certificate = settings.tls_key.read_bytes(), settings.tls_cert.read_bytes()
        client_ca = settings.tls_ca.read_bytes() if settings.tls_ca is not None else None
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"--tls-cert {settings.tls_cert} with --tls-key {settings.tls_key}: {error.reason or 'not PEM'}; expected a "
            f"certificate chain and the private key of its first certificate, both PEM, the key not encrypted"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"TLS file {error.filename}: {error.strerror}; the server's user must be able to read it"
        ) from None
    try:
        if settings.tls_ca is not None:
            context.load_verify_locations(settings.tls_ca)
    except ssl.SSLError as error:
        raise ConfigError(
            f"--tls-ca {settings.tls_ca}: {error.reason or 'not PEM'}; expected CA certificates, PEM"
        ) from None
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )
