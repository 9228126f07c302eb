"""Runs the coordinator until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

from rich.console import Console

from fed_server.app import App
from fed_server.logs import configure_logs
from fed_server.memory import limit_arenas
from fed_server.settings import ServerSettings


def serve_until_told(settings: ServerSettings) -> None:
    """Blocks until SIGTERM or SIGINT; a second one ends the draining too."""
    limit_arenas()
    configure_logs(settings.log_level, settings.log_format)
    asyncio.run(_serve(settings))


async def _serve(settings: ServerSettings) -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell() -> None:
        if told.is_set():
            # Everything acknowledged is durable: leaving at once loses only the last segments on their way.
            sys.exit(130)
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, tell)
    async with App(settings) as app:
        _greet(app)
        await told.wait()


def _greet(app: App) -> None:
    """What one needs next, on stdout: the address, the join token, the first commands."""
    # Nobody can dial a wildcard address.
    host, _, port = app.address.rpartition(":")
    reachable = f"{socket.getfqdn()}:{port}" if host in ("0.0.0.0", "[::]", "") else app.address
    console = Console(highlight=False, soft_wrap=True)
    security = "TLS" if app.settings.tls_cert else "no TLS" + ("" if app.settings.is_loopback else " (--insecure)")
    console.print(f"fed-server is serving on {app.address} ({security})", markup=False)
    console.print(f"  data       {app.settings.data_dir.resolve()}", markup=False)
    if app.metrics_address:
        console.print(f"  metrics    http://{app.metrics_address}/metrics", markup=False)
    console.print(
        f"  operators  fedctl --data-dir {app.settings.data_dir} run submit RUN.toml --workload FILE.py", markup=False
    )
    console.print(
        f"  sites      fed-client run --server {reachable} --workload FILE.py --join-token {app.tokens.join}",
        markup=False,
    )
