"""`fed-server`: the coordinator's daemon."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

# The C core prints INFO lines to stderr unless told otherwise before it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import typer

from fed_core.errors import ConfigError, ConflictError, DiskFullError, FedstreamError

EXIT_UNAVAILABLE, EXIT_DISK, EXIT_CONFIG = 69, 74, 78

app = typer.Typer(
    name="fed-server",
    help="The Fedstream coordinator: publishes models, gathers the updates of the sites, aggregates them round by round.",
    epilog="Exit codes: 0 stopped as asked, 2 wrong usage, 69 unavailable (port or data directory in use), 74 disk full, "
    "78 configuration.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DataDir = Annotated[
    Path | None, typer.Option(help="Directory for state, models and the operator's socket. [default: ./fedstream-data]")
]


@app.command()
def run(
    data_dir: DataDir = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT for clients; port 0 picks a free one. [default: 127.0.0.1:8443]")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain of this server, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of that certificate, PEM.")] = None,
    tls_ca: Annotated[Path | None, typer.Option(help="CA whose client certificates are required, PEM.")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen without TLS off the loopback. Authentication stays.")
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="Workload to evaluate with on this machine: entry point name or FILE.py[:Class]. Repeatable."
        ),
    ] = None,
    evaluation_data: Annotated[Path | None, typer.Option(help="Public evaluation data for those workloads.")] = None,
    max_concurrent_transfers: Annotated[
        int | None, typer.Option(help="Bulk streams at once; others wait. [default: 8]")
    ] = None,
    lease_seconds: Annotated[
        float | None, typer.Option(help="Silence after which a client counts as gone. [default: 30]")
    ] = None,
    drain_seconds: Annotated[
        float | None, typer.Option(help="On SIGTERM, how long transfers under way may go on. [default: 10]")
    ] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(help="HOST:PORT where Prometheus finds /metrics, without credentials. [default: nowhere]"),
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error. [default: info]")] = None,
    log_format: Annotated[str | None, typer.Option(help="auto, json or pretty. [default: auto]")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of these settings; flags and FED_SERVER_* come first.")
    ] = None,
) -> None:
    """Serves until SIGTERM or Ctrl-C, then drains. Everything acknowledged is on disk: start it again and it goes on."""
    from fed_server.settings import load_settings

    settings = load_settings(
        config,
        data_dir=data_dir,
        listen=listen,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_ca=tls_ca,
        insecure=insecure,
        workloads=tuple(workload or ()),
        evaluation_data=evaluation_data,
        max_concurrent_transfers=max_concurrent_transfers,
        lease_seconds=lease_seconds,
        drain_seconds=drain_seconds,
        metrics_listen=metrics_listen,
        log_level=log_level,
        log_format=log_format,
    )
    from fed_server.cli.serve import serve_until_told

    serve_until_told(settings)


@app.command("join-token")
def join_token(data_dir: DataDir = None) -> None:
    """Prints the token with which a site enrols."""
    _print_token(data_dir, "join-token")


@app.command("operator-token")
def operator_token(data_dir: DataDir = None) -> None:
    """Prints the token with which fedctl works over TCP; on this machine it uses the socket instead."""
    _print_token(data_dir, "operator-token")


@app.command()
def health(
    server: Annotated[str, typer.Option(help="HOST:PORT or unix:PATH.")] = "127.0.0.1:8443",
    tls_ca: Annotated[Path | None, typer.Option(help="CA to trust, PEM.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS.")] = False,
    timeout_seconds: Annotated[float, typer.Option(help="How long to wait for an answer.")] = 5.0,
) -> None:
    """Asks the standard gRPC health service; exit code 0 where it serves. For container health checks."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from fed_core.grpc_options import client_options

    if tls_ca is not None and not insecure:
        channel = grpc.secure_channel(server, grpc.ssl_channel_credentials(tls_ca.read_bytes()), client_options())
    else:
        channel = grpc.insecure_channel(server, client_options())
    try:
        with channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)
    except grpc.RpcError as error:
        typer.echo(f"{server} does not answer: {error.details()}", err=True)
        raise typer.Exit(EXIT_UNAVAILABLE) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    typer.echo(status.lower().replace("_", " "))
    if status != "SERVING":
        raise typer.Exit(EXIT_UNAVAILABLE)


def _print_token(data_dir: Path | None, name: str) -> None:
    from fed_server.settings import DEFAULT_DATA_DIR

    path = (data_dir or Path(os.environ.get("FED_SERVER_DATA_DIR", DEFAULT_DATA_DIR))) / name
    if not path.is_file():
        raise ConfigError(
            f"{path}: there is no token yet; it is made when fed-server runs on this data directory first"
        )
    typer.echo(path.read_text().strip())


def main() -> None:
    """Entry point of `fed-server`."""
    try:
        app()
    except (ConflictError, DiskFullError, ConfigError) as error:
        typer.echo(f"fed-server: {error}", err=True)
        codes = {ConflictError: EXIT_UNAVAILABLE, DiskFullError: EXIT_DISK, ConfigError: EXIT_CONFIG}
        raise SystemExit(codes[type(error)]) from None
    except FedstreamError as error:
        typer.echo(f"fed-server: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
