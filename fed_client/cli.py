"""fed-client: the command line of a site."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

# gRPC's core reads it when it is imported, and by default prints notes of its own on stderr.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import typer
from rich.console import Console
from rich.table import Table

from fed_client.exit_codes import ExitCode, exit_code_of
from fed_client.logs import configure_logging
from fed_client.settings import Settings, default_state_dir, load_settings, parse_pairs
from fed_client.state import StateDirectory, StateDirectoryLockedError
from fed_core.errors import ConfigError, FedstreamError

app = typer.Typer(
    name="fed-client",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Trains models on this site's data, which stays here, and sends updates to a coordinator.

    A first start:

    [bold]fed-client doctor[/] --server fed.example.org:8443 --tls-ca ca.pem --workload hospital.py --data /data

    [bold]fed-client run[/]    ... the same ... --join-token-file token

    Every option can also be set as FED_CLIENT_NAME_OF_OPTION, or in the TOML file of --config; the first of the three that
    says something is heard.""",
    epilog="Exit codes: 0 done or stopped, 1 doctor found something, 2 wrong option, 69 coordinator not reachable, "
    "75 try again later, 77 not accepted by the coordinator, 78 wrong setting.",
)

_COORDINATOR, _SITE, _WORK, _OVERRIDES = "Coordinator", "Site", "Work", "Instead of the plan, where the run allows it"


def _option(description: str, panel: str, *names: str, **extra: Any) -> Any:
    return typer.Option(*names, help=description, rich_help_panel=panel, show_default=False, **extra)


Config = Annotated[
    Path | None,
    typer.Option(envvar="FED_CLIENT_CONFIG", help="TOML file with settings: the options' names, with underscores."),
]
Server = Annotated[str | None, _option("Address of the coordinator, HOST:PORT.", _COORDINATOR)]
TlsCa = Annotated[
    Path | None,
    _option("PEM file of the authority that signed its certificate; public ones are known.", _COORDINATOR),
]
TlsCert = Annotated[
    Path | None, _option("PEM certificate of this site, if the coordinator asks for one.", _COORDINATOR)
]
TlsKey = Annotated[Path | None, _option("Key of --tls-cert.", _COORDINATOR)]
TlsServerName = Annotated[str | None, _option("Name in its certificate, where that is not the address.", _COORDINATOR)]
Insecure = Annotated[
    bool, _option("No TLS (the loopback needs none). Everything can be read on the way.", _COORDINATOR, "--insecure")
]
StateDir = Annotated[
    Path | None, _option("Folder for identity, cache and spool; ~/.local/state/fed-client unless given.", _SITE)
]
Name = Annotated[
    str | None, _option("Name of this site, unique in the federation; the host's name unless given.", _SITE)
]
JoinToken = Annotated[str | None, _option("Join token that fed-server printed; needed once.", _SITE)]
JoinTokenFile = Annotated[Path | None, _option("File that holds the join token.", _SITE)]
Label = Annotated[list[str] | None, _option("key=value that runs may select sites by; repeat.", _SITE)]
Workload = Annotated[
    list[str] | None,
    _option("Workload to offer: an installed name, or path/to/file.py[:Class]; repeat.", _WORK),
]
Data = Annotated[Path | None, _option("Where this site's data lies; the workload reads it.", _WORK)]
WorkloadOption = Annotated[list[str] | None, _option("key=value for the workload; repeat.", _WORK)]
DeviceOption = Annotated[
    str | None, _option("cpu, cuda, mps, or auto: the first of cuda, mps, cpu that is there.", _WORK)
]
BatchSize = Annotated[int | None, _option("Examples per step.", _OVERRIDES)]
LearningRate = Annotated[float | None, _option("Step size.", _OVERRIDES)]
Epochs = Annotated[int | None, _option("Passes over the data.", _OVERRIDES)]
Steps = Annotated[int | None, _option("Optimizer steps.", _OVERRIDES)]
OptimizerOption = Annotated[str | None, _option("sgd, adam or adamw.", _OVERRIDES)]
RequirePrivacy = Annotated[
    bool,
    _option("Take part only in runs that have this site protect its data by itself.", _SITE, "--require-privacy"),
]
MaxEpsilon = Annotated[
    float | None,
    _option("Epsilon that this site may spend, where it protects its data by itself; no limit unless given.", _SITE),
]
MaxDelta = Annotated[float | None, _option("Largest delta at which it does; 0.01 unless given.", _SITE)]
LogFormatOption = Annotated[str | None, _option("pretty, json, or auto: pretty on a terminal.", "Logs")]
LogLevelOption = Annotated[str | None, _option("debug, info, warning or error.", "Logs")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _settings(ctx: typer.Context) -> Settings:
    """Settings from the options that were given, the environment and the file."""
    given = {key: value for key, value in ctx.params.items() if value not in (None, False, (), [])}
    flags = {key: value for key, value in given.items() if key in Settings.model_fields}
    try:
        for option, field in (("option", "options"), ("label", "labels")):
            if option in given:
                flags[field] = parse_pairs(list(given[option]))
    except ValueError as error:
        raise ConfigError(f"--{option}: {error}") from error
    overrides = {
        key: given[key] for key in ("batch_size", "learning_rate", "epochs", "steps", "optimizer") if key in given
    }
    if overrides:
        flags["overrides"] = overrides
    return load_settings(flags, given.get("config"))


@contextmanager
def _exits() -> Iterator[None]:
    """Turns errors into one message on stderr and an exit code."""
    try:
        yield
    except FedstreamError as error:
        typer.echo(f"fed-client: {error}", err=True)
        raise typer.Exit(exit_code_of(error)) from None
    except StateDirectoryLockedError as error:
        typer.echo(f"fed-client: {error}", err=True)
        raise typer.Exit(ExitCode.TEMPORARY) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def run(
    ctx: typer.Context,
    config: Config = None,
    server: Server = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_server_name: TlsServerName = None,
    insecure: Insecure = False,
    state_dir: StateDir = None,
    name: Name = None,
    join_token: JoinToken = None,
    join_token_file: JoinTokenFile = None,
    label: Label = None,
    workload: Workload = None,
    data: Data = None,
    option: WorkloadOption = None,
    device: DeviceOption = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    epochs: Epochs = None,
    steps: Steps = None,
    optimizer: OptimizerOption = None,
    require_privacy: RequirePrivacy = False,
    max_epsilon: MaxEpsilon = None,
    max_delta: MaxDelta = None,
    log_format: LogFormatOption = None,
    log_level: LogLevelOption = None,
) -> None:
    """Enrol if need be, then take part until stopped.

    Ctrl-C or SIGTERM stops within seconds and loses nothing: what was trained lies in the spool, and the next start uploads it.
    """
    with _exits():
        settings = _settings(ctx)
        if not settings.workload:
            raise ConfigError(
                "workload: nothing to offer; give --workload, an installed name or path/to/file.py[:Class]"
            )
        configure_logging(settings.log_format, settings.log_level)
        state = StateDirectory(settings.state_dir)
        state.create()
        state.lock()
        from fed_client.daemon import Daemon

        code = Daemon(settings, state).run()
        sys.stderr.flush()
        # Everything is on disk and every child is dead; unloading gRPC would only take its 2 seconds.
        os._exit(code)


@app.command()
def enroll(
    ctx: typer.Context,
    config: Config = None,
    server: Server = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_server_name: TlsServerName = None,
    insecure: Insecure = False,
    state_dir: StateDir = None,
    name: Name = None,
    join_token: JoinToken = None,
    join_token_file: JoinTokenFile = None,
    wait: Annotated[float, typer.Option(help="Seconds to wait for a coordinator that does not answer.")] = 30.0,
) -> None:
    """Exchange the join token for this site's identity, and store it. `run` does the same on its first start."""
    from fed_client.session import enroll as enroll_site
    from fed_client.stop import Stop

    with _exits():
        settings = _settings(ctx)
        configure_logging(settings.log_format, "warning")
        state = StateDirectory(settings.state_dir)
        state.create()
        state.lock()
        identity = enroll_site(settings, state, Stop(), give_up_after=wait)
        typer.echo(
            f"{identity.name} is enrolled at {identity.server} as {identity.client_id}; identity in {state.root}"
        )


@app.command()
def doctor(
    ctx: typer.Context,
    config: Config = None,
    server: Server = None,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_server_name: TlsServerName = None,
    insecure: Insecure = False,
    state_dir: StateDir = None,
    name: Name = None,
    join_token: JoinToken = None,
    join_token_file: JoinTokenFile = None,
    label: Label = None,
    workload: Workload = None,
    data: Data = None,
    option: WorkloadOption = None,
    device: DeviceOption = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    epochs: Epochs = None,
    steps: Steps = None,
    optimizer: OptimizerOption = None,
    as_json: AsJson = False,
) -> None:
    """Check everything that `run` needs, with the same options: address, TLS, identity, clock, disk, workload, data, device.

    Each line says ok, warn or fail, and the cure. Changes nothing but the state directory, where it tries to write. Exit code 1
    where anything fails.
    """
    from fed_client.doctor import Check, Verdict, examine

    configure_logging("auto", "error")
    checks: list[Check] = []
    console = Console(highlight=False)
    marks = {Verdict.OK: "[green]ok  [/]", Verdict.WARN: "[yellow]warn[/]", Verdict.FAIL: "[red]fail[/]"}
    for check in examine(lambda: _settings(ctx)):
        checks.append(check)
        if not as_json:
            console.print(marks[check.verdict], f"[bold]{check.name:<10}[/]", end=" ")
            console.print(check.text, markup=False, soft_wrap=True)
            if check.cure:
                console.print(" " * 16, check.cure, markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps([check.to_dict() for check in checks], indent=1))
    raise typer.Exit(ExitCode.FAILED if any(check.verdict is Verdict.FAIL for check in checks) else ExitCode.OK)


@app.command()
def status(
    state_dir: Annotated[
        Path | None, typer.Option(envvar="FED_CLIENT_STATE_DIR", help="Folder of the daemon.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what this site's daemon is doing and what lies in its spool. Asks nobody: reads the state directory."""
    with _exits():
        state = StateDirectory(state_dir or default_state_dir())
        if not state.root.is_dir():
            raise ConfigError(f"state_dir: {state.root} does not exist; give the folder of a daemon with --state-dir")
        report = _status(state)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _print_status(report)


def _status(state: StateDirectory) -> dict[str, Any]:
    identity, pid = state.identity(), state.daemon_pid()
    live = (state.read_status() or {}) if pid is not None else {}
    return {
        "state_dir": str(state.root),
        "is_running": pid is not None,
        "pid": pid,
        "name": identity.name if identity else None,
        "client_id": identity.client_id if identity else None,
        "server": live.get("server") or (identity.server if identity else None),
        "workloads": live.get("workloads", []),
        "coordinator": live.get("coordinator", {}),
        "assignments": live.get("assignments", []),
        "spooled": [{"assignment": stem, "bytes": size} for stem, size in _sizes(state.spool, ".update")],
        "cached": [{"model": stem, "bytes": size} for stem, size in _sizes(state.cache, ".payload")],
        "carried": [
            {"run": run.name, "bytes": sum(size for _, size in _sizes(run, ""))} for run in _runs(state.carried)
        ],
        "free_bytes": shutil.disk_usage(state.root).free,
    }


def _sizes(folder: Path, suffix: str) -> Iterator[tuple[str, int]]:
    """Names without the suffix, and lengths, of the files that end so and are still there when they are looked at."""
    for path in sorted(folder.glob(f"*{suffix}")):
        with suppress(FileNotFoundError):
            yield path.stem, path.stat().st_size


def _runs(folder: Path) -> list[Path]:
    """Folders of runs, in the order of their names."""
    return sorted(path for path in folder.glob("*") if path.is_dir())


def _print_status(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(
        f"{report['name'] or 'not enrolled yet'} at {report['server'] or '-'}, state in {report['state_dir']}"
    )
    console.print(f"daemon: {'process ' + str(report['pid']) if report['is_running'] else 'not running'}")
    link = report["coordinator"]
    if "error" in link:
        console.print(f"coordinator: {link['error']}", markup=False)
    elif "polled_time" in link:
        console.print(f"coordinator: answered {time.time() - link['polled_time']:.0f} s ago")
    table = Table("run", "round", "assignment", "phase", "done")
    for each in report["assignments"]:
        share = f"{each['done'] / each['total']:.0%}" if each["total"] else ""
        table.add_row(each["run"], str(each["round"]), each["assignment"], each["phase"], share)
    if report["assignments"]:
        console.print(table)
    elif report["is_running"]:
        console.print(f"idle: {link.get('idle_reason') or 'no work'}", markup=False)
    for each in report["spooled"]:
        console.print(f"in the spool: {each['assignment']}, {each['bytes']:,} bytes", markup=False)
    if report["cached"]:
        cached_bytes = sum(each["bytes"] for each in report["cached"])
        console.print(f"in the cache: models: {len(report['cached'])}, {cached_bytes:,} bytes", markup=False)
    if report["carried"]:
        carried_bytes = sum(each["bytes"] for each in report["carried"])
        console.print(
            f"carried to later updates: runs: {len(report['carried'])}, {carried_bytes:,} bytes", markup=False
        )


@app.command()
def privacy(
    state_dir: Annotated[
        Path | None, typer.Option(envvar="FED_CLIENT_STATE_DIR", help="Folder of the daemon.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what this site gave away of its data, in runs where it protects it by itself. Asks nobody: reads the state directory.

    What was spent adds up by population, which the runs name, and by what is protected: the whole site, with all of its data, or
    single examples.
    """
    from fed_client.privacy import PrivacyLedger, accounts
    from fed_core.privacy.accounting import rounded_up

    with _exits():
        state = StateDirectory(state_dir or default_state_dir())
        if not state.root.is_dir():
            raise ConfigError(f"state_dir: {state.root} does not exist; give the folder of a daemon with --state-dir")
        found = accounts(PrivacyLedger(state.privacy).charges())
    if as_json:
        typer.echo(json.dumps([asdict(account) for account in found], indent=1))
        return
    console = Console(highlight=False)
    if not found:
        console.print("nothing was spent: no run asked this site to protect its data by itself")
        return
    table = Table("population", "protected", "assignments", "epsilon", "delta", "last")
    for each in found:
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.last_time))
        protected = "whole site" if each.unit == "client" else "examples"
        figure = f"{rounded_up(each.epsilon, 4):g}"
        table.add_row(each.population, protected, str(each.num_charged), figure, f"{each.delta:g}", last)
    console.print(table)
    for each in found:
        console.print(f"\n{each.population}: {each.claim}", markup=False, soft_wrap=True)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
