"""python -m examples.digits.demo [--output DIR] [--rounds N]

A coordinator and three sites, each a process of its own, learn the digits together. Then the same training at each site alone and
on the pooled data shows what that was worth. Everything is left in demo-output/; no process is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.digits.demo.processes import Crew, Daemon, ProcessError
from fed_core.workload import Site, load_workload
from fed_server.config import RunConfig, parse_run_config, to_toml

EXAMPLE: Final = Path(os.path.relpath(Path(__file__).parents[1]))
WORKLOAD: Final = str(EXAMPLE / "workload.py")
CONFIG: Final = EXAMPLE / "demo" / "run.toml"
NUM_SITES: Final = 3
ALPHA: Final = 0.3
START_SECONDS: Final = 60.0
FEDERATED: Final = "federated"
_MARK: Final = ".made-by-the-digits-demo"

console = Console(highlight=False)


@dataclass(frozen=True)
class Output:
    """What lies where."""

    root: Path

    @property
    def coordinator(self) -> Path:
        return self.root / "coordinator"

    @property
    def config(self) -> Path:
        return self.root / "run.toml"

    @property
    def model(self) -> Path:
        return self.root / "model.safetensors"

    @property
    def figure(self) -> Path:
        return self.root / "digits.png"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def make_anew(self) -> None:
        """Empties what an earlier demo left. Raises SystemExit for a folder that holds anything else."""
        mark = self.root / _MARK
        if self.root.exists() and any(self.root.iterdir()) and not mark.exists():
            raise SystemExit(f"{self.root} holds something that this demo did not make; choose another --output")
        shutil.rmtree(self.root, ignore_errors=True)
        self.log("").parent.mkdir(parents=True)
        mark.touch()


def main() -> None:
    """Runs the demo; exits with 0, 1 for a failure, 130 for Ctrl-C."""
    arguments = _arguments()
    output = Output(arguments.output)
    output.make_anew()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        _demonstrate(output, _config(arguments.rounds))
    except KeyboardInterrupt:
        console.print(f"\nstopped; every process has ended, logs and state are kept in {output.root}/", style="yellow")
        raise SystemExit(130) from None
    except ProcessError as error:
        console.print(f"\n{error}", style="bold red", markup=False)
        console.print(error.tail, style="dim", markup=False)
        console.print(f"every process has ended, logs and state are kept in {output.root}/", style="yellow")
        raise SystemExit(1) from None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.digits.demo", description=__doc__.partition("\n\n")[2])
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder for results (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, help="rounds, instead of the 15 of run.toml")
    return parser.parse_args()


def _config(num_rounds: int | None) -> RunConfig:
    config = parse_run_config(CONFIG.read_text())
    if num_rounds is None:
        return config
    return config.model_copy(update={"schedule": config.schedule.model_copy(update={"max_rounds": num_rounds})})


def _demonstrate(output: Output, config: RunConfig) -> None:
    begin = time.monotonic()
    sites = _sites()
    output.config.write_text(to_toml(config))
    with Crew(console.print) as crew:
        report = _train_together(crew, output, config, sites)
    training_seconds = time.monotonic() - begin
    results = _compare(output, config, sites, report)
    output.results.write_text(json.dumps(results, indent=2) + "\n")
    _draw(output, results)
    _conclude(output, report, results, training_seconds, time.monotonic() - begin)


def _sites() -> dict[str, Site]:
    shared = {"num_sites": str(NUM_SITES), "alpha": str(ALPHA)}
    return {
        f"site-{index}": Site(f"site-{index}", options={"site": str(index), **shared}) for index in range(NUM_SITES)
    }


def _train_together(crew: Crew, output: Output, config: RunConfig, sites: Mapping[str, Site]) -> dict[str, Any]:
    """Starts everything, waits for the end of the run, and fetches the report and the best model."""
    data_dir = ["--data-dir", str(output.coordinator)]
    serve = ["fed-server", "run", *data_dir, "--listen", "127.0.0.1:0", "--workload", WORKLOAD]
    coordinator = _start(crew, output, "coordinator", serve)
    address = _address(crew, coordinator)
    # Should it be killed, its sites look for it where it was.
    coordinator.command[coordinator.command.index("127.0.0.1:0")] = address
    for name, site in sites.items():
        join = ["fed-client", "run", "--server", address, "--join-token-file", str(output.coordinator / "join-token")]
        own = ["--name", name, "--state-dir", str(output.root / name), "--workload", WORKLOAD]
        options = [part for key, value in site.options.items() for part in ("--option", f"{key}={value}")]
        _start(crew, output, name, [*join, *own, *options])
    submit = ["fedctl", "run", "submit", str(output.config), "--workload", WORKLOAD, *data_dir]
    _announce(submit)
    crew.run(_installed(submit), output.log("fedctl"))
    processes = ", ".join(f"{daemon.name} {daemon.process.pid}" for daemon in crew.daemons)
    console.print(f"Kill any of them while they work, with kill -9: {processes}. Nothing is lost.\n", style="dim")
    watch = ["fedctl", "run", "watch", config.name, *data_dir]
    _announce(watch)
    if crew.show(_installed(watch), output.log("fedctl")) != 0:
        raise ProcessError("the run did not finish; the end of the coordinator's log:", coordinator.tail())
    report: dict[str, Any] = json.loads(
        crew.run(_installed(["fedctl", "run", "report", config.name, "--json", *data_dir]), output.log("fedctl"))
    )
    download = ["fedctl", "model", "download", config.name, str(output.model), *data_dir]
    _announce(download)
    crew.run(_installed(download), output.log("fedctl"))
    return report


def _start(crew: Crew, output: Output, name: str, command: list[str]) -> Daemon:
    _announce(command)
    return crew.start(name, _installed(command), output.log(name))


def _announce(command: list[str]) -> None:
    console.print(f"$ {' '.join(command)}", style="cyan", markup=False, soft_wrap=True)


def _installed(command: list[str]) -> list[str]:
    """The command out of the environment that runs the demo."""
    program = Path(sys.executable).with_name(command[0])
    if not program.exists():
        raise SystemExit(
            f"{program} is missing; install Fedstream with `make setup`, or pip install '.[server,examples]'"
        )
    return [str(program), *command[1:]]


def _address(crew: Crew, coordinator: Daemon) -> str:
    """Where the coordinator listens: it says so in its first line."""
    said = "serving on "
    crew.wait_until(lambda: said in coordinator.log.read_text(), "the coordinator's start", START_SECONDS)
    return coordinator.log.read_text().partition(said)[2].split()[0]


def _compare(output: Output, config: RunConfig, sites: Mapping[str, Site], report: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy on the public test set by round, of the federation and of everyone's own training; and who has which digits."""
    # torch takes seconds to load: not before it is needed.
    from examples.digits.demo import baselines

    workload = load_workload(WORKLOAD)
    num_rounds = config.schedule.max_rounds
    metric = config.evaluation.metric
    accuracy: dict[str, list[float]] = {FEDERATED: []}
    console.print("\nThe same training without federation: each site alone, and all data in one place")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=(len(sites) + 1) * (num_rounds + 1))
        for measured in baselines.baselines(workload, config, sites):
            accuracy.setdefault(measured.name, []).append(measured.accuracy)
            progress.update(task, advance=1, description=f"{measured.name}, round {measured.round}")
    rounds = [{m["name"]: m["value"] for m in each["metrics"]} for each in report["rounds"]]
    # Everyone begins with version 0.
    accuracy[FEDERATED] = [accuracy[baselines.POOLED][0], *(each[metric] for each in rounds)]
    return {
        "accuracy": accuracy,
        "class_counts": baselines.class_counts(workload, sites, num_classes=10),
        "downloaded_model_accuracy": baselines.file_accuracy(workload, config, output.model),
    }


def _draw(output: Output, results: Mapping[str, Any]) -> None:
    from examples.digits.demo.figure import draw

    draw(output.figure, results["accuracy"], results["class_counts"])


def _conclude(
    output: Output, report: Mapping[str, Any], results: Mapping[str, Any], training_seconds: float, seconds: float
) -> None:
    """The table, and where everything lies."""
    from examples.digits.demo.baselines import POOLED

    accuracy = results["accuracy"]
    alone = [name for name in accuracy if name not in (FEDERATED, POOLED)]
    columns = [FEDERATED, *alone, POOLED]
    best = int(report["run"]["best_version"])
    table = Table(title="Accuracy on 397 images that no site has", title_justify="left")
    for name in ("round", FEDERATED, *(f"{name} alone" for name in alone), POOLED):
        table.add_column(name, justify="right", style="bold" if name == FEDERATED else None)
    for round in range(len(accuracy[FEDERATED])):
        mark = " ★" if round == best else "  "
        cells = [f"{accuracy[name][round]:.1%}" + (mark if name == FEDERATED else "") for name in columns]
        table.add_row(str(round), *cells)
    console.print(table)
    gain = accuracy[FEDERATED][best] - max(accuracy[name][-1] for name in alone)
    console.print(
        f"Together: {accuracy[FEDERATED][best]:.1%} with version {best} (★), {100 * gain:.1f} points over the best site alone. "
        f"The file gives {results['downloaded_model_accuracy']:.1%} when loaded here."
    )
    console.print(f"{training_seconds:.0f} s for the federation, {seconds:.0f} s in all; every process has ended.\n")
    places = Table.grid(padding=(0, 2))
    for what, path in (
        ("plot", output.figure),
        ("best model", output.model),
        ("figures", output.results),
        ("logs", output.log("").parent),
        ("the coordinator's state", output.coordinator),
        ("the sites' state", f"{output.root}/{'|'.join(alone)}"),
    ):
        places.add_row(what, f"{path}")
    console.print(places)


if __name__ == "__main__":
    main()
