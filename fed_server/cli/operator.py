"""`fedctl`: the operator's tool. Data goes to stdout, talk to stderr; every error is a line and its cure.

Commands are thin: they read their arguments, make one call and hand the answer to `render`. Imports are lazy, so that --help and
completion stay fast; torch is loaded only where `run submit` builds a model.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import typer

from fed_core.errors import ConfigError, FedstreamError, NotFoundError
from fed_server.cli.codec import codec_app
from fed_server.cli.console import stderr as _stderr
from fed_server.cli.console import stdout as _stdout
from fed_server.cli.exit_codes import (
    EXIT_CODES,
    EXIT_FILE,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_RUN_FAILED,
    judge,
)
from fed_server.cli.privacy import privacy_app

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.console import RenderableType

    from fed_server.cli.connection import Connection
    from fed_server.config import RunConfig

# One paragraph: typer sets lines apart by blank ones.
_EPILOG = (
    "[bold]Exit codes:[/] " + "; ".join(f"[bold]{code}[/] {meaning}" for code, meaning in EXIT_CODES.items()) + "."
)

app = typer.Typer(
    name="fedctl",
    help="Submit, watch and report federated training runs.\n\n"
    "Begin with [bold]fedctl config example > run.toml[/], then [bold]fedctl run submit run.toml --workload digits --watch[/].",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
run_app = typer.Typer(no_args_is_help=True, help="Runs: submit, list, show, watch, cancel, report.")
client_app = typer.Typer(no_args_is_help=True, help="Clients: who has enrolled, who is alive.")
model_app = typer.Typer(no_args_is_help=True, help="Model versions: list, download, the best one.")
config_app = typer.Typer(
    no_args_is_help=True, help="Run configs: an example, the schema, a check. Needs no coordinator."
)
app.add_typer(run_app, name="run")
app.add_typer(client_app, name="client")
app.add_typer(model_app, name="model")
app.add_typer(config_app, name="config")
app.add_typer(codec_app, name="codec")
app.add_typer(privacy_app, name="privacy")

Run = Annotated[str, typer.Argument(metavar="RUN", help="Name or id of the run.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON, with the field names of the contract.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Follow the run until it has ended.")]


# Connection options. They may stand before the command or after it, and the one after it counts.

_PANEL = "Connection"
Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="unix:PATH|HOST:PORT",
        help="Where the coordinator listens.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Data directory of a coordinator on this machine: its socket lies there. "
        "Default: $FEDSTREAM_DATA_DIR, else fedstream-data.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
OperatorToken = Annotated[
    str | None,
    typer.Option(
        "--operator-token",
        metavar="TOKEN",
        help="Operator token, for HOST:PORT. Other users of this machine can read it; better use $FEDCTL_OPERATOR_TOKEN or a file.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
OperatorTokenFile = Annotated[
    Path | None,
    typer.Option(
        "--operator-token-file",
        metavar="FILE",
        help="File that holds the operator token.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        metavar="FILE",
        help="PEM file of the authority that signed the coordinator's certificate. Default: the system's authorities.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="No TLS off the loopback either; the token is still required, and readable on the way.",
        rich_help_panel=_PANEL,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_PANEL)]

_CONNECTION_OPTIONS: dict[str, Any] = {
    "server": Server,
    "data_dir": DataDir,
    "operator_token": OperatorToken,
    "operator_token_file": OperatorTokenFile,
    "tls_ca": TlsCa,
    "insecure": Insecure,
    "debug": Debug,
}


def _connected(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the connection options; it gets the `Connection` that they make as its first argument."""
    # The connection's own type is not needed to build an option, and its module loads gRPC.
    hints = get_type_hints(command, localns={"Connection": object}, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name]) for name, parameter in inspect.signature(command).parameters.items()
    ][1:]

    def wrapper(ctx: typer.Context, **arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in _CONNECTION_OPTIONS}
        command(_connection(given).over(_connection(ctx.find_root().params)), **arguments)

    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(
            name, keyword, default=False if name in ("insecure", "debug") else None, annotation=annotation
        )
        for name, annotation in _CONNECTION_OPTIONS.items()
    ]
    context = inspect.Parameter("ctx", keyword, annotation=typer.Context)
    parameters = [context, *(parameter.replace(kind=keyword) for parameter in own), *shared]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    return wrapper


def _connection(options: dict[str, Any]) -> Connection:
    from fed_server.cli.connection import Connection

    return Connection(**{field.name: options[field.name] for field in fields(Connection)})


@app.callback()
def _root(
    server: Server = None,
    data_dir: DataDir = None,
    operator_token: OperatorToken = None,
    operator_token_file: OperatorTokenFile = None,
    tls_ca: TlsCa = None,
    insecure: Insecure = False,
    debug: Debug = False,
) -> None:
    pass  # read by `_connected` from the root context


# Runs


@run_app.command("submit")
@_connected
def run_submit(
    connection: Connection,
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml", help="Run config; - reads it from stdin.", show_default=False)
    ],
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload",
            metavar="SOURCE",
            help="Workload that builds version 0 on this machine, under the run's seed: an installed name, or FILE.py[:CLASS].",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            "--init",
            metavar="FILE",
            help="Begin from a safetensors file instead. With --workload too, the file is checked against the workload's model.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run, instead of the config's.", show_default=False)
    ] = None,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Submit a run: check the config, make version 0 here, send both. Prints the run's id."""
    if workload is None and init is None:
        raise typer.BadParameter(
            "a run needs a model to begin from: --workload SOURCE builds it, --init FILE.safetensors reads it",
            param_hint="--workload / --init",
        )
    text = _read_text(config)
    parsed = _parse(config, text)
    if name is not None:
        from fed_server.config import to_toml

        text = to_toml(parsed.model_copy(update={"name": name}))
        parsed = _parse(config, text)
    _talk_dim("building version 0 ...")
    response = _submit(connection, parsed, text, workload, init)
    run = response.run
    if as_json and not watch:
        _print_json(response)
    elif not as_json:
        _stdout().print(run.run_id, highlight=False)
    _talk(
        f"submitted run {run.name} ({run.num_parameters:,} elements); it begins when {parsed.cohort.min_clients} clients are there"
    )
    for notice in response.notices:
        _talk(f"[yellow]notice:[/] {_escape(notice)}")
    if watch:
        _watch(connection, run.name, as_json)


def _submit(connection: Connection, config: RunConfig, text: str, workload: str | None, init: Path | None) -> Any:
    import tempfile

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from fed_server.cli.connection import Coordinator

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = _stderr()
    # Connected before the model is built: a wrong address should not cost a minute.
    with Coordinator(connection) as coordinator, tempfile.TemporaryDirectory(prefix="fedctl-") as folder:
        coordinator.list_runs()
        from fed_server.cli.submit import create_requests, make_version_0

        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            encoding, sending = progress.add_task("encoding", total=None), progress.add_task("sending", total=None)
            version_0 = make_version_0(
                config,
                workload=workload,
                init=init,
                path=Path(folder) / "version-0.payload",
                on_progress=lambda done, total: progress.update(encoding, completed=done, total=total),
            )
            requests = create_requests(
                text, version_0, lambda done, total: progress.update(sending, completed=done, total=total)
            )
            return coordinator.create_run(requests, version_0.total_bytes)


@run_app.command("list")
@_connected
def run_list(connection: Connection, as_json: Json = False) -> None:
    """List all runs, the newest first."""
    from fed_server.cli import render
    from fed_server.cli.connection import Coordinator

    with Coordinator(connection) as coordinator:
        response = coordinator.list_runs()
    _print(response, as_json, lambda: render.runs_table(response.runs, time.time(), _stdout().width))


@run_app.command("show")
@_connected
def run_show(connection: Connection, run: Run, as_json: Json = False) -> None:
    """Show a run and its newest round."""
    from fed_server.cli import render
    from fed_server.cli.connection import Coordinator

    with Coordinator(connection) as coordinator:
        response = coordinator.get_run(run)
    _print(response, as_json, lambda: render.run_details(response, time.time(), _stdout().width))


@privacy_app.command("show")
@_connected
def privacy_show(connection: Connection, run: Run, as_json: Json = False) -> None:
    """Show what a private run has spent, round by round, and what is left of its budget."""
    from fed_server.cli import privacy_render
    from fed_server.cli.connection import Coordinator

    with Coordinator(connection) as coordinator:
        response = coordinator.get_privacy(run)
    _print(response, as_json, lambda: privacy_render.account(response))


@privacy_app.command("audit")
def privacy_audit(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.toml", help="Run config with central privacy; - reads it from stdin.", show_default=False
        ),
    ],
    canaries: Annotated[
        int,
        typer.Option("--canaries", metavar="M", min=1, help="Clients that are made up; more see larger epsilons."),
    ] = 1000,
    dimension: Annotated[
        int, typer.Option("--dimension", metavar="D", min=1, help="Values of an update; at least as many as canaries.")
    ] = 20_000,
    rounds: Annotated[
        int | None,
        typer.Option(
            "--rounds", metavar="T", min=1, help="Rounds to audit. Default: those of the config.", show_default=False
        ),
    ] = None,
    delta: Annotated[
        float | None,
        typer.Option(
            "--delta", metavar="X", help="Delta at which to audit. Default: that of the config.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            help="Makes the canaries: who is in, and their directions. Default: a new one, which is shown. Noise has no seed.",
            show_default=False,
        ),
    ] = None,
    confidence: Annotated[
        float, typer.Option("--confidence", metavar="P", help="How sure to be before a claim is contradicted.")
    ] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything found as JSON.")] = False,
) -> None:
    """Try to catch the mechanism of a run config leaking more than it claims. Needs no coordinator.

    Made-up clients send updates through the clipping, noise and release of this build, and from what is released the audit guesses
    which of them took part. Too many right guesses contradict the claim (exit code 1); few do not confirm it.
    """
    import json
    import secrets

    parsed = _parse(config, _read_text(config))
    from fed_server.cli.privacy_audit import as_json as to_json
    from fed_server.cli.privacy_audit import audit, report

    found = audit(
        parsed,
        num_canaries=canaries,
        dimension=dimension,
        num_rounds=rounds,
        delta=delta,
        seed=secrets.randbits(32) if seed is None else seed,
        confidence=confidence,
    )
    if as_json:
        sys.stdout.write(json.dumps(to_json(found), indent=2) + "\n")
    else:
        _stdout().print(report(found))
    if found.is_contradicted:
        raise SystemExit(EXIT_RUN_FAILED)


@run_app.command("watch")
@_connected
def run_watch(connection: Connection, run: Run, as_json: Json = False) -> None:
    """Follow a run live until it has ended. Ctrl-C ends the watching, not the run."""
    _watch(connection, run, as_json)


def _watch(connection: Connection, run: str, as_json: bool) -> None:
    from fed_server.cli.watch import watch

    try:
        has_finished = watch(
            connection, run, console=_stdout(), talk=lambda text: _talk(_escape(text)), as_json=as_json
        )
    except KeyboardInterrupt:
        _talk(
            f"stopped watching; the run goes on. Watch it again: fedctl run watch {run}. End it: fedctl run cancel {run}"
        )
        sys.stdout.flush()
        sys.stderr.flush()
        # A thread is still within gRPC, and an interpreter that ends around it may wait for ever.
        os._exit(EXIT_INTERRUPTED)
    if not has_finished:
        raise SystemExit(EXIT_RUN_FAILED)


@run_app.command("cancel")
@_connected
def run_cancel(
    connection: Connection,
    run: Run,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """End a run for good. Its committed versions stay."""
    from fed_server.cli.connection import Coordinator

    with Coordinator(connection) as coordinator:
        name = coordinator.get_run(run).run.name
        if not yes and sys.stdin.isatty() and not typer.confirm(f"End run {name} for good?", err=True):
            _talk("nothing was changed")
            return
        response = coordinator.cancel_run(run)
    if as_json:
        _print_json(response)
    _talk(f"run {response.run.name} is cancelled; its versions up to {response.run.model_version} stay")


@run_app.command("report")
@_connected
def run_report(connection: Connection, run: Run, as_json: Json = False) -> None:
    """Everything measured in a run: metrics, bytes and seconds by round, and what each client did."""
    from fed_server.cli import render
    from fed_server.cli.connection import Coordinator

    with Coordinator(connection) as coordinator:
        response = coordinator.get_report(run)
    _print(response, as_json, lambda: render.report(response, _stdout().width))


# Clients and models


@client_app.command("list")
@_connected
def client_list(connection: Connection, as_json: Json = False) -> None:
    """List the enrolled clients."""
    from fed_server.cli import render
    from fed_server.cli.connection import Coordinator

    with Coordinator(connection) as coordinator:
        response = coordinator.list_clients()
    _print(response, as_json, lambda: render.clients_table(response.clients, time.time(), _stdout().width))


@model_app.command("list")
@_connected
def model_list(connection: Connection, run: Run, as_json: Json = False) -> None:
    """List a run's model versions, the oldest first. A star marks the best."""
    from fed_server.cli import render
    from fed_server.cli.connection import Coordinator

    with Coordinator(connection) as coordinator:
        response = coordinator.list_models(run)
    _print(response, as_json, lambda: render.models_table(response.models, time.time(), _stdout().width))


@model_app.command("best")
@_connected
def model_best(connection: Connection, run: Run, as_json: Json = False) -> None:
    """Show the best version by the watched metric; the newest where nothing was measured."""
    from fed_server.cli import render
    from fed_server.cli.connection import Coordinator

    with Coordinator(connection) as coordinator:
        models = coordinator.list_models(run).models
    best = next((model for model in models if model.is_best), models[-1] if models else None)
    if best is None:
        raise NotFoundError(f"run {run} has no version yet")
    _print(best, as_json, lambda: render.model_summary(best))


@model_app.command("download")
@_connected
def model_download(
    connection: Connection,
    run: Run,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="Where to write it. Default: RUN-vVERSION.safetensors, here.", show_default=False
        ),
    ] = None,
    version: Annotated[str, typer.Option("--version", help="Number of the version, or best, or newest.")] = "best",
    average: Annotated[
        bool,
        typer.Option(
            "--average", help="The moving average of the versions up to this one ([average] in the run config)."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Download a model version as a safetensors file. Prints its path."""
    from fed_server.cli.connection import Coordinator
    from fed_server.cli.download import download, model_request

    request = model_request(run, version, average=average)
    with Coordinator(connection) as coordinator:
        path = download(coordinator, request, file, force=force, console=_stderr())
    _stdout().print(str(path), highlight=False, soft_wrap=True, markup=False)


# Configs


@config_app.command("example")
def config_example() -> None:
    """Print a complete run config with every option explained."""
    from fed_server.config import example_config

    sys.stdout.write(example_config())


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a run config, for editors and validators."""
    import json

    from fed_server.config import config_schema as schema

    sys.stdout.write(json.dumps(schema(), indent=2) + "\n")


@config_app.command("check")
def config_check(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.toml", help="Run config; - reads it from stdin.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Check a run config. Prints it with every default written out."""
    from fed_server.config import to_toml

    parsed = _parse(config, _read_text(config))
    sys.stdout.write(parsed.model_dump_json(indent=2) + "\n" if as_json else to_toml(parsed))
    _talk(f"{config} is a valid run config")


def _read_text(path: Path) -> str:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}",
            cure="correct the path; `fedctl config example` prints one to begin with",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})", cure="save it as UTF-8") from error


def _parse(path: Path, text: str) -> RunConfig:
    from fed_server.config import parse_run_config

    try:
        return parse_run_config(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", cure="`fedctl config example` explains every option") from None


# Printing


def _print(response: Message, as_json: bool, renderable: Callable[[], RenderableType]) -> None:
    if as_json:
        _print_json(response)
    else:
        _stdout().print(renderable())


def _print_json(response: Message) -> None:
    import json

    from fed_server.cli.render import as_json

    sys.stdout.write(json.dumps(as_json(response), indent=2) + "\n")


def _talk(markup: str) -> None:
    _stderr().print(markup, soft_wrap=True)


def _talk_dim(text: str) -> None:
    console = _stderr()
    if console.is_terminal:
        console.print(text, style="dim")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


# The edge: every error becomes a line, its cure, and an exit code.


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs fedctl and exits with one of `exit_codes.EXIT_CODES`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Read by hand, because it must also hold for an error in the options themselves.
    debug = "--debug" in arguments
    try:
        app(args=arguments, prog_name="fedctl")
    except FedstreamError as error:
        code, cure = judge(error)
        _fail(error, debug, code, str(error), cure)
    except BrokenPipeError as error:
        # `fedctl run report x | head`: the reader has gone, and that is no error. The interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(error, debug, EXIT_OK, "", "")
    except OSError as error:
        _fail(
            error, debug, EXIT_FILE, f"{error.strerror}: {error.filename or ''}", "make room, or choose another place"
        )
    except KeyboardInterrupt as error:
        _fail(error, debug, EXIT_INTERRUPTED, "interrupted", "")
    except Exception as error:  # the edge of the process
        _fail(
            error,
            debug,
            EXIT_INTERNAL,
            f"a defect in fedctl: {type(error).__name__}: {error}",
            "run it with --debug and report it",
        )
    raise SystemExit(EXIT_OK)


def _fail(error: BaseException, debug: bool, code: int, what: str, cure: str) -> NoReturn:
    if debug:
        traceback.print_exception(error)
    if what:
        _talk(f"[bold red]fedctl:[/] {_escape(what)}")
    if cure:
        _talk(f"  {_escape(cure)}")
    raise SystemExit(code)
