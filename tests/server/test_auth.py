"""Who may do what: credentials, the operator's socket and token, TLS, and the files that hold secrets."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from benchmarks.light_client import LightClient
from benchmarks.light_operator import Operator
from fed_core.errors import (
    ConfigError,
    FedstreamError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from fed_core.rpc_status import from_rpc_error
from fed_server.app import App
from fed_server.settings import ServerSettings, load_settings
from fedstream.v1 import participation_pb2, participation_pb2_grpc, runs_pb2, transfer_pb2
from tests.server.conftest import House, config, off_loop
from tests.server.houses import back_in, open_house


def call(channel: grpc.Channel, method: str, request: Any, credential: str = "", scheme: str = "Bearer") -> bytes:
    """One call by name, whatever it answers; our errors."""
    metadata = (("authorization", f"{scheme} {credential}"),) if credential else ()
    method_of: Callable[..., Any] = channel.unary_unary
    if method.rpartition("/")[2] in ("Download", "WatchRun", "DownloadModel"):
        method_of = channel.unary_stream
    try:
        answer = method_of(method, lambda message: message.SerializeToString(), None)(
            request, metadata=metadata, timeout=20
        )
        return answer if isinstance(answer, bytes) else b"".join(answer)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


CLIENT_CALLS = [
    ("/fedstream.v1.Participation/PollAssignment", participation_pb2.PollAssignmentRequest()),
    ("/fedstream.v1.Participation/ReportProgress", participation_pb2.ReportProgressRequest()),
    ("/fedstream.v1.Participation/ReportFailure", participation_pb2.ReportFailureRequest(kind=1)),
    ("/fedstream.v1.Participation/ReportEvaluation", participation_pb2.ReportEvaluationRequest()),
    ("/fedstream.v1.Transfer/Download", transfer_pb2.DownloadRequest()),
    ("/fedstream.v1.Transfer/GetUpload", transfer_pb2.GetUploadRequest()),
    ("/fedstream.v1.Transfer/Upload", transfer_pb2.UploadRequest()),
]
OPERATOR_CALLS = [
    ("/fedstream.v1.Runs/ListRuns", runs_pb2.ListRunsRequest()),
    ("/fedstream.v1.Runs/ListClients", runs_pb2.ListClientsRequest()),
    ("/fedstream.v1.Runs/GetRun", runs_pb2.GetRunRequest(run="test")),
    ("/fedstream.v1.Runs/GetReport", runs_pb2.GetReportRequest(run="test")),
    ("/fedstream.v1.Runs/ListModels", runs_pb2.ListModelsRequest(run="test")),
    ("/fedstream.v1.Runs/GetPrivacy", runs_pb2.GetPrivacyRequest(run="test")),
    ("/fedstream.v1.Runs/CancelRun", runs_pb2.CancelRunRequest(run="test")),
    ("/fedstream.v1.Runs/CreateRun", runs_pb2.CreateRunRequest()),
    ("/fedstream.v1.Runs/WatchRun", runs_pb2.WatchRunRequest(run="test")),
    ("/fedstream.v1.Runs/DownloadModel", runs_pb2.DownloadModelRequest(run="test", newest=True)),
]


@contextmanager
def channel_to(house: House) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(house.app.address) as channel:
        yield channel


def test_every_call_of_the_contract_is_tried_here() -> None:
    tried = {method for method, _ in CLIENT_CALLS + OPERATOR_CALLS} | {"/fedstream.v1.Participation/Enroll"}
    services = [
        file.DESCRIPTOR.services_by_name[name]
        for file, name in ((participation_pb2, "Participation"), (transfer_pb2, "Transfer"), (runs_pb2, "Runs"))
    ]
    assert tried == {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}


async def test_no_call_is_answered_without_a_credential(house: House) -> None:
    with channel_to(house) as channel:
        for method, request in CLIENT_CALLS + OPERATOR_CALLS:
            with pytest.raises(UnauthenticatedError):
                await off_loop(call, channel, method, request)


async def test_no_call_is_answered_with_a_wrong_credential(house: House) -> None:
    client = await off_loop(house.client, "site")
    wrong = (f"{client.client_id}.wrong", f"{client.client_id}.", client.client_id, f".{house.app.tokens.join}", "x")
    with channel_to(house) as channel:
        for method, request in CLIENT_CALLS:
            for credential in (*wrong, house.app.tokens.join, house.app.tokens.operator):
                with pytest.raises(UnauthenticatedError):
                    await off_loop(call, channel, method, request, credential)


async def test_a_good_secret_under_another_scheme_or_another_id_is_refused(house: House) -> None:
    client = LightClient(house.app.address)
    credential = await off_loop(client.enroll, house.app.tokens.join, "site")
    other = await off_loop(house.client, "other")
    method, request = CLIENT_CALLS[0]
    with channel_to(house) as channel:
        await off_loop(call, channel, method, request, credential)
        with pytest.raises(UnauthenticatedError):
            await off_loop(call, channel, method, request, credential, "Basic")
        with pytest.raises(UnauthenticatedError):
            await off_loop(call, channel, method, request, f"{other.client_id}.{credential.partition('.')[2]}")


async def test_a_client_may_not_do_what_operators_do(house: House) -> None:
    client = LightClient(house.app.address)
    credential = await off_loop(client.enroll, house.app.tokens.join, "site")
    with channel_to(house) as channel:
        for method, request in OPERATOR_CALLS:
            with pytest.raises(PermissionDeniedError, match="operator's service"):
                await off_loop(call, channel, method, request, credential)


async def test_an_operator_needs_the_token_over_tcp_and_nothing_on_the_socket(house: House) -> None:
    assert len((await off_loop(house.operator.call, "ListRuns", runs_pb2.ListRunsRequest())).runs) == 0
    for token, refused in (
        (house.app.tokens.operator, False),
        ("", True),
        ("wrong", True),
        (house.app.tokens.join, True),
    ):
        operator = Operator(house.app.address, token)
        if refused:
            with pytest.raises(UnauthenticatedError, match=r"operator.token"):
                await off_loop(operator.call, "ListRuns", runs_pb2.ListRunsRequest())
        else:
            await off_loop(operator.call, "ListRuns", runs_pb2.ListRunsRequest())
        operator.channel.close()


async def test_the_operators_socket_does_not_make_a_client(house: House) -> None:
    with grpc.insecure_channel(f"unix:{house.app.socket_path}") as channel:
        for method, request in CLIENT_CALLS:
            with pytest.raises(UnauthenticatedError):
                await off_loop(call, channel, method, request)


async def test_a_site_sees_only_what_is_its_own(house: House) -> None:
    await off_loop(house.operator.submit, config(size=1))
    client, other = await off_loop(house.client, "site"), await off_loop(house.client, "other")
    mine = await off_loop(client.next_assignment)
    with pytest.raises(NotFoundError, match="not one of yours"):
        await off_loop(other.model, mine)
    with pytest.raises(NotFoundError, match="not one of yours"):
        await off_loop(other.get_upload, mine.assignment_id, bytes(32))
    with pytest.raises(NotFoundError):
        await off_loop(other.report_failure, mine.assignment_id, kind=1)
    with pytest.raises(NotFoundError):
        await off_loop(other.report_evaluation, mine.assignment_id, 1)
    assert not (await off_loop(other.poll, wait_seconds=0)).assignments


async def test_health_and_reflection_answer_without_a_credential(house: House) -> None:
    with channel_to(house) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "fedstream.v1.Participation", "fedstream.v1.Transfer", "fedstream.v1.Runs"):
            answer = await off_loop(health.Check, health_pb2.HealthCheckRequest(service=service), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed = await off_loop(lambda: next(iter(stub.ServerReflectionInfo(iter([asked]), timeout=20))))
        names = {service.name for service in listed.list_services_response.service}
        assert {"fedstream.v1.Participation", "fedstream.v1.Transfer", "fedstream.v1.Runs"} <= names


async def test_answers_repeat_the_request_id_or_make_one(house: House) -> None:
    with channel_to(house) as channel:
        stub = participation_pb2_grpc.ParticipationStub(channel)

        def ask(*metadata: tuple[str, str]) -> str:
            with pytest.raises(grpc.RpcError) as caught:
                stub.PollAssignment(participation_pb2.PollAssignmentRequest(), metadata=metadata, timeout=20)
            return dict(caught.value.trailing_metadata())["x-request-id"]

        assert await off_loop(ask, ("x-request-id", "my-own-id-7")) == "my-own-id-7"
        assert len(await off_loop(ask)) == 32
        assert await off_loop(ask, ("x-request-id", "no spaces in it")) != "no spaces in it"


async def test_an_internal_error_tells_an_id_and_no_more(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the password is swordfish")

    client = await off_loop(house.client, "site")
    monkeypatch.setattr("fed_server.rounds.coordinator.Coordinator.poll", fail)
    with pytest.raises(FedstreamError, match=r"internal error [0-9a-f]{32}; the coordinator's log") as caught:
        await off_loop(client.poll, wait_seconds=0)
    assert "swordfish" not in str(caught.value)


# Files


async def test_secrets_and_the_socket_are_for_their_owner_only(house: House) -> None:
    root = house.app.settings.data_dir
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    for name in ("join-token", "operator-token", "fed-server.sock"):
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o600, name


async def test_no_secret_of_a_site_is_stored(house: House) -> None:
    client = LightClient(house.app.address)
    credential = await off_loop(client.enroll, house.app.tokens.join, "site")
    await off_loop(client.poll, wait_seconds=0)
    secret = credential.partition(".")[2].encode()
    for path in house.app.settings.data_dir.rglob("*"):
        if path.is_file():
            assert secret not in path.read_bytes(), path


async def test_tokens_and_identities_outlive_a_restart(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data") as house:
        before = house.app.tokens
        credential = await off_loop(LightClient(house.app.address).enroll, before.join, "site")
    async with open_house(tmp_path / "data") as house:
        assert house.app.tokens == before
        await off_loop(back_in(house, credential).poll, wait_seconds=0)


# TLS


@dataclass(frozen=True)
class Certificates:
    """Files as an administrator has them."""

    ca: Path
    cert: Path
    key: Path
    client: trustme.LeafCert


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    server = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    server.private_key_pem.write_to_path(folder / "key.pem")
    for blob in server.cert_chain_pems:
        blob.write_to_path(folder / "cert.pem", append=True)
    return Certificates(folder / "ca.pem", folder / "cert.pem", folder / "key.pem", authority.issue_cert("site"))


def check_health(address: str, credentials: grpc.ChannelCredentials | None) -> int:
    channel = grpc.insecure_channel(address) if credentials is None else grpc.secure_channel(address, credentials)
    with channel:
        try:
            return health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3).status
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None


def trusting(ca: Path, leaf: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
    if leaf is None:
        return grpc.ssl_channel_credentials(ca.read_bytes())
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    return grpc.ssl_channel_credentials(ca.read_bytes(), leaf.private_key_pem.bytes(), chain)


async def test_tls_serves_those_who_trust_the_authority_and_nobody_in_the_clear(
    tmp_path: Path, certificates: Certificates
) -> None:
    async with open_house(tmp_path / "data", tls_cert=certificates.cert, tls_key=certificates.key) as house:
        serving = health_pb2.HealthCheckResponse.SERVING
        assert await off_loop(check_health, house.app.address, trusting(certificates.ca)) == serving
        with pytest.raises(FedstreamError):
            await off_loop(check_health, house.app.address, None)
        stranger = tmp_path / "stranger.pem"
        trustme.CA().cert_pem.write_to_path(stranger)
        with pytest.raises(FedstreamError):
            await off_loop(check_health, house.app.address, trusting(stranger))
        # TLS is no credential.
        channel = grpc.secure_channel(house.app.address, trusting(certificates.ca))
        with channel, pytest.raises(UnauthenticatedError):
            await off_loop(call, channel, *CLIENT_CALLS[0])


async def test_with_an_authority_for_clients_only_their_certificates_get_in(
    tmp_path: Path, certificates: Certificates
) -> None:
    settings = {"tls_cert": certificates.cert, "tls_key": certificates.key, "tls_ca": certificates.ca}
    async with open_house(tmp_path / "data", **settings) as house:
        serving = health_pb2.HealthCheckResponse.SERVING
        mine = trusting(certificates.ca, certificates.client)
        assert await off_loop(check_health, house.app.address, mine) == serving
        with pytest.raises(FedstreamError):
            await off_loop(check_health, house.app.address, trusting(certificates.ca))
        foreign = trusting(certificates.ca, trustme.CA().issue_cert("site"))
        with pytest.raises(FedstreamError):
            await off_loop(check_health, house.app.address, foreign)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:8443", "fed.example.org:8443"])
def test_nothing_listens_off_the_loopback_without_tls_unless_told(
    tmp_path: Path, certificates: Certificates, listen: str
) -> None:
    with pytest.raises(ConfigError, match=r"without TLS .* give --tls-cert and --tls-key, or --insecure"):
        load_settings(None, data_dir=tmp_path, listen=listen)
    assert load_settings(None, data_dir=tmp_path, listen=listen, insecure=True).insecure
    load_settings(None, data_dir=tmp_path, listen=listen, tls_cert=certificates.cert, tls_key=certificates.key)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:8443", "[::1]:0", "127.8.8.8:1"])
def test_the_loopback_needs_no_tls(tmp_path: Path, listen: str) -> None:
    assert load_settings(None, data_dir=tmp_path, listen=listen).is_loopback


@pytest.mark.parametrize("given", [{"tls_cert": "x"}, {"tls_key": "x"}, {"tls_ca": "x"}])
def test_half_of_tls_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"tls_cert and tls_key|tls_ca"):
        load_settings(None, **given)


async def test_insecure_off_the_loopback_never_drops_authentication(tmp_path: Path) -> None:
    async with open_house(tmp_path / "data", listen="0.0.0.0:0", insecure=True) as house:
        with grpc.insecure_channel("127.0.0.1:" + house.app.address.rpartition(":")[2]) as channel:
            for method, request in CLIENT_CALLS + OPERATOR_CALLS:
                with pytest.raises(UnauthenticatedError):
                    await off_loop(call, channel, method, request)


async def test_tls_files_that_are_missing_or_no_certificates_are_named(
    tmp_path: Path, certificates: Certificates
) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("not a certificate")
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(other)
    good = {"tls_cert": certificates.cert, "tls_key": certificates.key}
    for bad, says in (
        ({"tls_cert": tmp_path / "missing.pem"}, "missing.pem: No such file"),
        ({"tls_cert": garbage}, "garbage.pem"),
        ({"tls_key": other}, "other.pem: KEY_VALUES_MISMATCH"),
        ({"tls_ca": garbage}, "--tls-ca .*garbage.pem"),
    ):
        settings = ServerSettings(data_dir=tmp_path / "data", listen="127.0.0.1:0", **good | bad)
        with pytest.raises(ConfigError, match=says):
            async with App(settings):
                pass
