"""The operator's channel to a coordinator: where it is, who asks, deadlines, and errors of our own tree.

On the coordinator's machine the Unix socket in its data directory is enough: whoever may open it is the operator. From elsewhere
it takes an address and the operator token. Unary calls have deadlines; streams have none, since a model may take an hour on
a slow line, but a watchdog breaks one off on which nothing moves.
"""

from __future__ import annotations

import ipaddress
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from fed_core.errors import FedstreamError, UnauthenticatedError, UnavailableError
from fed_core.grpc_options import client_options
from fed_core.rpc_status import from_rpc_error
from fed_server.cli.exit_codes import SettingError
from fedstream.v1 import runs_pb2, runs_pb2_grpc

# The first that is set counts; the second is fed-server's own, which a container or a unit file sets.
DATA_DIR_VARIABLES = ("FEDSTREAM_DATA_DIR", "FED_SERVER_DATA_DIR")
TOKEN_VARIABLE = "FEDCTL_OPERATOR_TOKEN"
DEFAULT_DATA_DIR = Path("fedstream-data")
SOCKET_NAME = "fed-server.sock"

UNARY_SECONDS = 30.0
STALL_SECONDS = 60.0
# The coordinator verifies, copies and flushes version 0 before it answers; the slowest disk that we wait for writes this fast.
_FLUSH_BYTES_PER_SECOND = 10 * 2**20
# The kernel's limit on the path of a Unix socket.
_MAX_SOCKET_PATH_BYTES = 107
_CREATE_ATTEMPTS = 5


@dataclass(frozen=True)
class Connection:
    """What the command line, then the environment, says of the way to the coordinator."""

    server: str | None = None
    data_dir: Path | None = None
    operator_token: str | None = None
    operator_token_file: Path | None = None
    tls_ca: Path | None = None
    insecure: bool = False

    def over(self, outer: Connection) -> Connection:
        """These settings where they are given, the outer ones where not."""
        given = {name: value for name, value in vars(self).items() if value}
        return replace(outer, **given)

    @property
    def directory(self) -> Path:
        """The coordinator's data directory, on this machine."""
        named = (os.environ.get(variable) for variable in DATA_DIR_VARIABLES)
        return self.data_dir or Path(next(filter(None, named), DEFAULT_DATA_DIR))

    @property
    def socket(self) -> Path | None:
        """The Unix socket to use; None for TCP."""
        if self.server is None:
            return self.directory / SOCKET_NAME
        return Path(self.server.removeprefix("unix:")) if self.server.startswith("unix:") else None

    @property
    def where(self) -> str:
        """The coordinator, for messages."""
        return f"on data directory {self.directory}" if self.server is None else f"at {self.server}"

    @property
    def cure(self) -> str:
        """What to do when nobody answers."""
        if self.server is None:
            start = f"start one with `fed-server run --data-dir {self.directory}`"
            return f"{start}, or say where it is with --data-dir DIR or --server ADDRESS"
        if self.socket is not None:
            return "start fed-server, or correct the path given to --server"
        return "check that fed-server listens on that address, and that --tls-ca or --insecure fits what it was started with"

    def token(self) -> str | None:
        """The operator token, if any. Raises SettingError where its file cannot be read."""
        if self.operator_token:
            return self.operator_token
        if self.operator_token_file is not None:
            token = _read(self.operator_token_file, "--operator-token-file").decode("utf-8", "replace").strip()
            if not token:
                raise SettingError(
                    f"--operator-token-file: {self.operator_token_file} is empty",
                    cure="put the token in it that `fed-server operator-token` prints",
                )
            return token
        return os.environ.get(TOKEN_VARIABLE) or None

    def open_channel(self) -> grpc.Channel:
        """Opens a channel; the first call connects. Raises UnavailableError where the socket does not exist."""
        socket = self.socket
        if socket is not None:
            if not socket.exists():
                missing = "" if self.server else f" (there is no {socket})"
                raise UnavailableError(f"no coordinator runs {self.where}{missing}", cure=self.cure)
            return grpc.insecure_channel(f"unix:{_short(socket)}", options=client_options())
        address = self.server or ""
        host = _host(address)
        if self.token() is None:
            raise UnauthenticatedError(
                f"{address} wants an operator token",
                cure=f"`fed-server operator-token` prints it there; give it with --operator-token-file FILE or in {TOKEN_VARIABLE}",
            )
        if self.insecure and self.tls_ca is not None:
            raise SettingError("--insecure drops TLS, and --tls-ca asks for it", cure="take one of them out")
        if self.insecure or (self.tls_ca is None and _is_loopback(host)):
            return grpc.insecure_channel(address, options=client_options())
        roots = _read(self.tls_ca, "--tls-ca") if self.tls_ca is not None else None
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots), options=client_options())


class Coordinator:
    """The operator's calls. Every failure is an error of `fed_core.errors`; one that a cure is known for carries it in its
    `details`. Not thread-safe."""

    def __init__(self, connection: Connection, *, stall_seconds: float = STALL_SECONDS) -> None:
        self._connection = connection
        self._stall_seconds = stall_seconds
        self._token = connection.token() if connection.socket is None else None
        self._channel = connection.open_channel()
        self._stub = runs_pb2_grpc.RunsStub(self._channel)

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Ctrl-C may strike within gRPC, and closing then waits for ever for a call that is half begun; the process ends anyway.
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self._channel.close()

    def get_run(self, run: str) -> runs_pb2.GetRunResponse:
        """A run and its newest round."""
        response: runs_pb2.GetRunResponse = self._ask(self._stub.GetRun, runs_pb2.GetRunRequest(run=run))
        return response

    def list_runs(self) -> runs_pb2.ListRunsResponse:
        """All runs, the newest first."""
        response: runs_pb2.ListRunsResponse = self._ask(self._stub.ListRuns, runs_pb2.ListRunsRequest())
        return response

    def cancel_run(self, run: str) -> runs_pb2.CancelRunResponse:
        """Ends a run."""
        response: runs_pb2.CancelRunResponse = self._ask(self._stub.CancelRun, runs_pb2.CancelRunRequest(run=run))
        return response

    def get_report(self, run: str) -> runs_pb2.GetReportResponse:
        """Everything measured in a run."""
        response: runs_pb2.GetReportResponse = self._ask(self._stub.GetReport, runs_pb2.GetReportRequest(run=run))
        return response

    def list_clients(self) -> runs_pb2.ListClientsResponse:
        """The enrolled clients."""
        response: runs_pb2.ListClientsResponse = self._ask(self._stub.ListClients, runs_pb2.ListClientsRequest())
        return response

    def list_models(self, run: str) -> runs_pb2.ListModelsResponse:
        """A run's model versions, the oldest first."""
        response: runs_pb2.ListModelsResponse = self._ask(self._stub.ListModels, runs_pb2.ListModelsRequest(run=run))
        return response

    def get_privacy(self, run: str) -> runs_pb2.GetPrivacyResponse:
        """What a private run has spent."""
        request = runs_pb2.GetPrivacyRequest(run=run)
        response: runs_pb2.GetPrivacyResponse = self._ask(self._stub.GetPrivacy, request)
        return response

    def watch_run(self, run: str) -> Iterator[runs_pb2.WatchRunResponse]:
        """A run's state after every change. Ends when the run is finished, or when the coordinator drains."""
        return self._stream(self._stub.WatchRun, runs_pb2.WatchRunRequest(run=run))

    def download_model(self, request: runs_pb2.DownloadModelRequest) -> Iterator[runs_pb2.DownloadModelResponse]:
        """A version's safetensors file: one header, then chunks."""
        return self._stream(self._stub.DownloadModel, request)

    def create_run(
        self, requests: Callable[[], Iterator[runs_pb2.CreateRunRequest]], total_bytes: int
    ) -> runs_pb2.CreateRunResponse:
        """Submits a run. `requests` begins the stream anew; a broken connection is retried with back-off, which the request id in
        the header makes harmless."""
        for attempt in range(1, _CREATE_ATTEMPTS + 1):
            try:
                return self._create_run_once(requests(), total_bytes)
            except UnavailableError:
                if attempt == _CREATE_ATTEMPTS:
                    raise
                time.sleep(backoff_seconds(attempt))
        raise AssertionError("unreachable")

    def _create_run_once(
        self, requests: Iterator[runs_pb2.CreateRunRequest], total_bytes: int
    ) -> runs_pb2.CreateRunResponse:
        watchdog = _Watchdog(self._stall_seconds)

        def watched() -> Iterator[runs_pb2.CreateRunRequest]:
            for request in requests:
                watchdog.touch()
                yield request
            watchdog.touch(grace=total_bytes / _FLUSH_BYTES_PER_SECOND)

        with self._named_errors(watchdog):
            call = self._stub.CreateRun.future(watched(), metadata=tuple(self._metadata()))
            with watchdog.over(call):
                response: runs_pb2.CreateRunResponse = call.result()
                return response

    def _ask(self, method: Any, request: Any) -> Any:
        with self._named_errors():
            return method(request, timeout=UNARY_SECONDS, metadata=self._metadata())

    def _stream(self, method: Any, request: Any) -> Iterator[Any]:
        watchdog = _Watchdog(self._stall_seconds)
        with self._named_errors(watchdog):
            call = method(request, metadata=self._metadata())
            try:
                with watchdog.over(call):
                    for message in call:
                        watchdog.touch()
                        yield message
            finally:
                call.cancel()

    def _metadata(self) -> list[tuple[str, str]]:
        metadata = [("x-request-id", uuid.uuid4().hex)]
        if self._token is not None:
            metadata.append(("authorization", f"Bearer {self._token}"))
        return metadata

    @contextmanager
    def _named_errors(self, watchdog: _Watchdog | None = None) -> Iterator[None]:
        connection = self._connection
        try:
            yield
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            if watchdog is not None and watchdog.has_fired:
                error = UnavailableError(
                    f"nothing moved for {self._stall_seconds:.0f} s on the connection to the coordinator {connection.where}",
                    cure="check the network, then run the command again",
                )
            elif isinstance(error, UnavailableError) and "status" in error.details:  # gRPC spoke, not the coordinator
                error = _unreachable(connection, error)
            raise error from rpc_error


def backoff_seconds(attempt: int) -> float:
    """Pause before the next attempt, counted from 1: doubling from half a second to ten, with jitter."""
    return random.uniform(0.5, 1.0) * min(10.0, 0.5 * 2.0**attempt)


class _Watchdog:
    """Cancels a call on which nothing has moved for a while."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._done = threading.Event()
        self.has_fired = False

    def touch(self, grace: float = 0.0) -> None:
        """Something moved; the next thing may take `grace` seconds longer."""
        self._deadline = time.monotonic() + self._seconds + grace

    @contextmanager
    def over(self, call: Any) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, args=(call,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()

    def _watch(self, call: Any) -> None:
        while not self._done.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() > self._deadline:
                self.has_fired = True
                call.cancel()
                return


def _unreachable(connection: Connection, error: FedstreamError) -> UnavailableError:
    status = error.details["status"]
    if status == "DEADLINE_EXCEEDED":
        return UnavailableError(
            f"the coordinator {connection.where} did not answer within {UNARY_SECONDS:.0f} s",
            cure="it may be overloaded: look at its log, then run the command again",
        )
    if status == "CANCELLED":
        return UnavailableError(f"the coordinator {connection.where} ended the call", cure="run the command again")
    # gRPC wraps the one useful phrase, such as "Connection refused", in the history of its attempts.
    phrase = str(error).rsplit("last error:", 1)[-1].strip(" ;\n")
    if "Connection refused" in phrase:
        phrase = "connection refused"
    return UnavailableError(f"no coordinator answers {connection.where}: {phrase}", cure=connection.cure)


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingError(
            f"{option}: cannot read {path}: {(error.strerror or 'error').lower()}",
            cure="correct the path or its permissions",
        ) from error


def _host(address: str) -> str:
    host, separator, port = address.rpartition(":")
    if (
        "://" in address
        or not separator
        or not host
        or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536)
    ):
        raise SettingError(
            f"--server: expected unix:PATH or HOST:PORT, got {address!r}",
            cure="write for instance fed.example.org:8443",
        )
    return host.strip("[]")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _short(socket: Path) -> str:
    """The socket's path, from here where the whole one is too long for the kernel."""
    candidates = (str(socket.absolute()), os.path.relpath(socket))
    for candidate in candidates:
        if len(os.fsencode(candidate)) <= _MAX_SOCKET_PATH_BYTES:
            return candidate
    raise SettingError(
        f"the path of the socket {socket} is longer than the {_MAX_SOCKET_PATH_BYTES} bytes that the system allows",
        cure="change into its folder first, or move the data directory",
    )
