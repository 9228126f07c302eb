"""Checks everything that a daemon needs, in the order in which it would fail, and says the cure.

The checks are generators over what is known so far: one that fails ends those that build on it, and nothing else.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from fed_client.daemon import make_trainers
from fed_client.session import SKEW_SECONDS, poll_request
from fed_client.settings import Settings, is_loopback
from fed_client.spool import Spool
from fed_client.state import StateDirectory, StateDirectoryLockedError
from fed_client.training.trainer import Trainer, WorkloadError
from fed_client.transport import Transport
from fed_client.work import Held
from fed_core.errors import FedstreamError, InternalError, UnauthenticatedError
from fedstream.v1 import common_pb2

CONNECT_SECONDS = 5.0
LOW_DISK_BYTES = 2 * 2**30
SLOW_FSYNC_SECONDS = 0.5


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, what to do about it."""

    name: str
    verdict: Verdict
    text: str
    cure: str = ""

    def to_dict(self) -> dict[str, str]:
        """For --json."""
        return asdict(self)


def examine(read_settings: Callable[[], Settings]) -> Iterator[Check]:
    """All checks, one by one as they are made."""
    try:
        settings = read_settings()
    except FedstreamError as error:
        yield Check(
            "settings", Verdict.FAIL, str(error), "correct the option, the FED_CLIENT_ variable or the --config file"
        )
        return
    yield _settings_check(settings)
    state = StateDirectory(settings.state_dir)
    state_check = _state_directory(state)
    yield state_check
    is_reachable = False
    for check in (_reach(settings), _tls(settings), _health(settings)):
        result = check()
        yield result
        is_reachable = result.verdict is not Verdict.FAIL
        if not is_reachable:
            break
    versions: dict[str, str] = {}
    workload_checks = list(_workloads(settings, state, versions)) if state_check.verdict is not Verdict.FAIL else []
    if is_reachable and state_check.verdict is not Verdict.FAIL:
        yield from _identity(settings, state, versions)
    yield from workload_checks


def _settings_check(settings: Settings) -> Check:
    security = "TLS" if settings.uses_tls else "plaintext"
    text = f"site {settings.name!r}, coordinator {settings.server} ({security})"
    if settings.insecure and not is_loopback(settings.address[0]):
        return Check(
            "settings",
            Verdict.WARN,
            f"{text}; updates and this site's secret can be read on the way",
            "start fed-server with --tls-cert and --tls-key, and give --tls-ca instead of --insecure",
        )
    return Check("settings", Verdict.OK, text)


def _state_directory(state: StateDirectory) -> Check:
    try:
        state.create()
        began = time.monotonic()
        with tempfile.TemporaryFile(dir=state.root) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.monotonic() - began
    except (FedstreamError, OSError) as error:
        return Check(
            "state",
            Verdict.FAIL,
            f"{state.root}: {error}",
            "give a folder on a local disk that this user may write, with --state-dir",
        )
    free = shutil.disk_usage(state.root).free
    text = f"{state.root}: writable, {free / 2**30:.1f} GiB free, a flush takes {seconds * 1000:.1f} ms"
    if free < LOW_DISK_BYTES:
        return Check(
            "state", Verdict.WARN, text, "two versions of the model and an update of each run must fit: free some space"
        )
    if seconds > SLOW_FSYNC_SECONDS:
        return Check(
            "state", Verdict.WARN, text, "put the state directory on a local disk; every update is flushed to it"
        )
    return Check("state", Verdict.OK, text)


def _reach(settings: Settings) -> Callable[[], Check]:
    def check() -> Check:
        host, port = settings.address
        proxy = next(
            (os.environ[name] for name in ("grpc_proxy", "https_proxy", "http_proxy") if os.environ.get(name)), ""
        )
        aside = f" (gRPC would go through the proxy {proxy}; set no_proxy={host} if it should not)" if proxy else ""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            return Check(
                "address",
                Verdict.FAIL,
                f"the name {host!r} is not known here: {error.strerror}",
                "correct --server, or DNS",
            )
        addresses = ", ".join(dict.fromkeys(str(each[4][0]) for each in found))
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        except ConnectionRefusedError:
            return Check(
                "address",
                Verdict.FAIL,
                f"{addresses} refuses connections on port {port}",
                "start fed-server there, or correct the port of --server; it must listen on more than 127.0.0.1"
                + aside,
            )
        except OSError as error:
            return Check(
                "address",
                Verdict.FAIL,
                f"{addresses} does not answer on port {port}: {error}",
                "let outgoing connections to it through this site's firewall" + aside,
            )
        return Check("address", Verdict.OK, f"{host} is {addresses} and takes connections on port {port}{aside}")

    return check


def _tls(settings: Settings) -> Callable[[], Check]:
    def check() -> Check:
        if settings.uses_tls:
            return explain_tls(settings)
        if _speaks_tls(settings):
            return Check(
                "tls",
                Verdict.FAIL,
                "the coordinator speaks TLS, and this site is set to plaintext",
                "give --tls-ca with the PEM file of its authority"
                + (", and drop --insecure" if settings.insecure else ""),
            )
        reason = "told so by --insecure" if settings.insecure else "the loopback needs none"
        return Check("tls", Verdict.OK, f"none: {reason}")

    return check


def explain_tls(settings: Settings) -> Check:
    """Makes the handshake that gRPC would make and says what is wrong with it: gRPC itself only says "unavailable"."""
    host, port = settings.address
    name = settings.tls_server_name or host
    context = ssl.create_default_context(cafile=settings.tls_ca)
    context.set_alpn_protocols(["h2"])
    try:
        if settings.tls_cert is not None and settings.tls_key is not None:
            context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (ssl.SSLError, OSError) as error:
        return Check(
            "tls",
            Verdict.FAIL,
            f"--tls-cert and --tls-key do not fit together: {error}",
            "give the key of that certificate",
        )
    try:
        with (
            socket.create_connection((host, port), timeout=CONNECT_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=name) as secured,
        ):
            version, protocol = secured.version(), secured.selected_alpn_protocol()
            # In TLS 1.3 a server that wants a certificate turns away one that has none after the handshake; any other gRPC
            # server speaks first.
            is_welcome = bool(secured.recv(1))
    except ssl.SSLCertVerificationError as error:
        return _explain_certificate(error, settings, name)
    except ssl.SSLError as error:
        return _explain_handshake(error, settings)
    except OSError as error:
        return Check(
            "tls",
            Verdict.FAIL,
            f"the handshake broke off: {error}",
            "see that no proxy stands between, and the log of fed-server",
        )
    if not is_welcome:
        return _turned_away(settings)
    if protocol != "h2":
        return Check(
            "tls",
            Verdict.FAIL,
            f"what answers does not speak HTTP/2 ({version})",
            "correct the port of --server, or let the proxy in between pass HTTP/2",
        )
    return Check("tls", Verdict.OK, f"{version}, certificate is good for {name!r}")


# OpenSSL's X509_V_ERR_*.
_EXPIRED, _NOT_YET_VALID, _UNKNOWN_AUTHORITY, _WRONG_NAME = {10}, {9}, {18, 19, 20, 21}, {62, 64}


def _explain_certificate(error: ssl.SSLCertVerificationError, settings: Settings, name: str) -> Check:
    code = error.verify_code
    if code in _UNKNOWN_AUTHORITY:
        text = f"the coordinator's certificate is signed by an authority that {settings.tls_ca or 'this machine'} does not hold"
        return Check(
            "tls",
            Verdict.FAIL,
            text,
            "give --tls-ca with the PEM file of the authority that signed it (ask its operator)",
        )
    if code in _WRONG_NAME:
        return Check(
            "tls",
            Verdict.FAIL,
            f"the coordinator's certificate is not made out for {name!r}: {error.verify_message}",
            "give --server the name that is in the certificate, or that name with --tls-server-name",
        )
    if code in _EXPIRED | _NOT_YET_VALID:
        text = f"the coordinator's certificate is not valid now ({error.verify_message})"
        return Check("tls", Verdict.FAIL, text, "its operator must renew it; or this site's clock is wrong")
    return Check("tls", Verdict.FAIL, f"certificate refused: {error.verify_message}", "ask the coordinator's operator")


def _explain_handshake(error: ssl.SSLError, settings: Settings) -> Check:
    reason = error.reason or str(error)
    if reason in ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        return Check(
            "tls",
            Verdict.FAIL,
            "the coordinator speaks plaintext, and this site is set to TLS",
            "start fed-server with --tls-cert and --tls-key; or, on a network that you trust wholly, give --insecure here",
        )
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        return _turned_away(settings)
    if "UNKNOWN_CA" in reason:
        text = "the coordinator does not know the authority of this site's certificate"
        return Check("tls", Verdict.FAIL, text, "have --tls-cert signed by the authority that its operator names")
    return Check("tls", Verdict.FAIL, f"the handshake failed: {reason}", "see the log of fed-server")


def _turned_away(settings: Settings) -> Check:
    if settings.tls_cert is None:
        text = "the coordinator asks for a certificate of this site, and none is given"
        return Check("tls", Verdict.FAIL, text, "give --tls-cert and --tls-key")
    text = "the coordinator does not accept this site's certificate"
    return Check("tls", Verdict.FAIL, text, "have --tls-cert signed by the authority that its operator names")


def _speaks_tls(settings: Settings) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection(settings.address, timeout=CONNECT_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=settings.address[0]),
        ):
            return True
    except OSError:  # ssl.SSLError is one
        return False


def _health(settings: Settings) -> Callable[[], Check]:
    def check() -> Check:
        transport = Transport(settings)
        try:
            if transport.is_serving():
                return Check("health", Verdict.OK, "the coordinator is serving")
            return Check(
                "health", Verdict.WARN, "the coordinator answers but is not serving", "it is draining or starting: wait"
            )
        except InternalError as error:
            if error.details.get("status") == "UNIMPLEMENTED":
                return Check("health", Verdict.FAIL, "what answers is no fed-server", "correct --server")
            return Check("health", Verdict.FAIL, str(error), "see the log of fed-server")
        except FedstreamError as error:
            return Check(
                "health", Verdict.FAIL, str(error), "see that no proxy stands between that does not pass HTTP/2"
            )
        finally:
            transport.close()

    return check


def _identity(settings: Settings, state: StateDirectory, versions: dict[str, str]) -> Iterator[Check]:
    """Identity and clock, by one poll that waits for nothing. A lost poll answer is harmless, so this one may be."""
    try:
        identity = state.identity()
        if identity is None:
            if settings.read_join_token() is None:
                cure = "give --join-token or --join-token-file with the token that fed-server printed"
                yield Check("identity", Verdict.FAIL, "this site is not enrolled, and there is no join token", cure)
            else:
                yield Check(
                    "identity", Verdict.WARN, "this site is not enrolled yet", "fed-client enroll, or run, will do that"
                )
            return
        try:
            state.lock()
        except StateDirectoryLockedError:
            yield from _running_daemon(state)
            return
        transport = Transport(settings, identity)
        try:
            held = [Held(each.assignment, common_pb2.WORK_PHASE_SPOOLED, each) for each in Spool(state.spool).scan()]
            began = time.time()
            answer = transport.poll(poll_request(held, 0, versions, settings.labels))
            middle = (began + time.time()) / 2
        finally:
            transport.close()
            state.unlock()
    except UnauthenticatedError as error:
        cure = f"restore {state.root}/identity.json, or delete it and enrol anew under another name"
        yield Check("identity", Verdict.FAIL, f"the coordinator does not know this site: {error}", cure)
        return
    except FedstreamError as error:
        yield Check("identity", Verdict.FAIL, str(error), "see the log of fed-server")
        return
    yield Check("identity", Verdict.OK, f"enrolled as {identity.name!r} ({identity.client_id})")
    if answer.HasField("server_time"):
        yield _clock(middle - answer.server_time.ToMicroseconds() / 1e6)


def _running_daemon(state: StateDirectory) -> Iterator[Check]:
    link: dict[str, Any] = (state.read_status() or {}).get("coordinator", {})
    pid = state.daemon_pid()
    if "error" in link:
        yield Check(
            "identity",
            Verdict.WARN,
            f"the daemon (process {pid}) cannot reach it: {link['error']}",
            "see the lines above",
        )
    else:
        yield Check("identity", Verdict.OK, f"a daemon (process {pid}) is at work with it")
    if "clock_skew_seconds" in link:
        yield _clock(float(link["clock_skew_seconds"]))


def _clock(skew_seconds: float) -> Check:
    side = "ahead of" if skew_seconds > 0 else "behind"
    text = f"{abs(skew_seconds):.1f} s {side} the coordinator's"
    if abs(skew_seconds) > SKEW_SECONDS:
        return Check("clock", Verdict.WARN, text, "set the clocks by NTP: certificates and logs depend on them")
    return Check("clock", Verdict.OK, text)


def _workloads(settings: Settings, state: StateDirectory, versions: dict[str, str]) -> Iterator[Check]:
    """Loads each workload and its data in the trainer process; fills `versions` with what is good."""
    if not settings.workload:
        yield Check(
            "workload", Verdict.FAIL, "none given", "give --workload, an installed name or path/to/file.py[:Class]"
        )
        return
    for trainer, source in zip(make_trainers(settings, state), settings.workload, strict=True):
        with trainer:
            try:
                description = trainer.describe()
            except WorkloadError as error:
                cure = "correct --workload, or have its author correct the code"
                yield Check("workload", Verdict.FAIL, f"{source} does not load: {error}", cure)
                continue
            versions[description.name] = description.version
            size = f"{description.num_parameters:,} parameters in {description.num_tensors} tensors"
            yield Check("workload", Verdict.OK, f"{description.name} {description.version} from {source}: {size}")
            yield from _data(trainer)


def _data(trainer: Trainer) -> Iterator[Check]:
    try:
        description = trainer.describe(reads_data=True)
    except WorkloadError as error:
        yield Check(
            "data",
            Verdict.FAIL,
            str(error),
            "see the message; --data and --option tell the workload where its data lies",
        )
        return
    num_examples, num_evaluation = description.num_examples or 0, description.num_evaluation_examples or 0
    if num_examples == 0:
        yield Check("data", Verdict.FAIL, "the workload finds no training examples here", "correct --data or --option")
    else:
        yield Check("data", Verdict.OK, f"{num_examples:,} training examples, {num_evaluation:,} for evaluation")
    yield Check("device", Verdict.OK, f"trains on {description.device}")
