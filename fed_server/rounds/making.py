"""The files of a run's next version: written beside their names, then published together."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from fed_core.codecs.base import Encoding
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec
from fed_server.aggregation.base import Aggregator
from fed_server.aggregation.variate import WithVariate
from fed_server.config import DeltaDownlinkConfig, LatticeDownlinkConfig, RawDownlinkConfig, RunConfig
from fed_server.optim.average import decay_at
from fed_server.optim.state import open_steps
from fed_server.rounds.cohort import broadcast_seed
from fed_server.rounds.downlink import lattice_for
from fed_server.rounds.policy import population, server_optimizer
from fed_server.rounds.variate import write_variate
from fed_server.rounds.version import (
    ChangeMeter,
    MadeVersion,
    VersionPaths,
    next_tile,
    write_average,
    write_encoded,
    write_whole,
)
from fed_server.store.base import BroadcastRecord, ModelRecord
from fed_server.store.blobs import DataDirectory


def sends_deltas(config: RunConfig) -> bool:
    """Whether versions go down as differences, which needs their master weights."""
    return not isinstance(config.downlink, RawDownlinkConfig)


def is_averaged(config: RunConfig) -> bool:
    """Whether a moving average of the versions is kept."""
    return config.average.decay > 0


class NextVersion:
    """A run's next version while it is made. The `write_` methods block; `written` says what is to be published, and `discard`
    deletes what was not."""

    def __init__(
        self, files: DataDirectory, config: RunConfig, specs: tuple[TensorSpec, ...], base: ModelRecord, version: int
    ) -> None:
        self._files = files
        self._config = config
        self._specs = specs
        self._base = base
        self._run_id = base.run_id
        self.version = version
        self.written: list[tuple[Path, Path]] = []
        """Each file that is made, and the name that it is to get."""
        self._parts: list[Path] = []
        self._model_part = self._part(files.model_path(self._run_id, version))

    def _part(self, final: Path) -> Path:
        self._parts.append(self._files.temporary(final))
        return self._parts[-1]

    def discard(self) -> None:
        """Deletes what was not published."""
        for part in self._parts:
            part.unlink(missing_ok=True)

    def write_version(self, aggregate: Aggregator, round: int, notes: Mapping[str, str]) -> MadeVersion:
        """The version to keep and the payload to send, and what the next version will need of this one: master weights and the
        server optimizer's state. `notes` go into the metadata of the first."""
        files, run_id, base, version = self._files, self._run_id, self._base, self.version
        optimizer = server_optimizer(self._config, round, aggregate.num_updates)
        optimizer_path = files.optimizer_path(run_id, version)
        optimizer_part = self._part(optimizer_path)
        paths = VersionPaths(
            master=self._part(files.master_path(run_id, version)),
            model=self._model_part,
            payload=self._part(files.payload_path(f"{run_id}-{version}")),
        )
        with ExitStack() as opened:
            steps = opened.enter_context(
                open_steps(
                    optimizer,
                    self._specs,
                    files.optimizer_path(run_id, base.version) if base.version > 0 else None,
                    optimizer_part,
                    {"run_id": run_id, "version": str(version)},
                )
            )
            committed = opened.enter_context(SafetensorsReader(files.model_path(run_id, base.version)))
            if sends_deltas(self._config):
                master = opened.enter_context(SafetensorsReader(files.master_path(run_id, base.version)))
                made = write_encoded(
                    self._specs,
                    next_tile(master, aggregate, steps),
                    self._encoding,
                    paths,
                    run_id=run_id,
                    version=version,
                    seed=broadcast_seed(self._config.seed, version),
                    master=master,
                    base=committed,
                    base_digest=bytes.fromhex(base.payload_digest),
                    notes=notes,
                )
                self.written.append((paths.master, files.master_path(run_id, version)))
            else:
                made = write_whole(
                    self._specs,
                    next_tile(committed, aggregate, steps),
                    paths.model,
                    paths.payload,
                    run_id=run_id,
                    version=version,
                    notes=notes,
                )
        self.written += [
            (paths.model, files.model_path(run_id, version)),
            (paths.payload, files.payload_path(made.payload.digest.hex())),
        ]
        if optimizer.initial:
            self.written.append((optimizer_part, optimizer_path))
        return made

    def write_average(self) -> None:
        """The average of the versions up to this one, after `write_version`."""
        files, base = self._files, self._base.version
        path = files.average_path(self._run_id, self.version)
        before = files.average_path(self._run_id, base) if base > 0 else files.model_path(self._run_id, 0)
        part, decay = self._part(path), decay_at(self._config.average.decay, self.version)
        with SafetensorsReader(self._model_part) as model, SafetensorsReader(before) as average:
            write_average(model, average, part, decay=decay)
        self.written.append((part, path))

    def write_variate(self, aggregate: WithVariate, sent: BroadcastRecord | None) -> None:
        """The common variate that goes with the version; `sent` is the one that went with its base."""
        files, base = self._files, self._base.version
        path, limit = files.variate_path(self._run_id, self.version), population(self._config)
        assert limit is not None
        part = self._part(path)
        write_variate(
            aggregate,
            files.variate_path(self._run_id, base) if base > 0 else None,
            files.payload_path(sent.digest) if sent is not None else None,
            part,
            specs=self._specs,
            population=limit,
        )
        self.written.append((part, path))

    def _encoding(self, change: ChangeMeter) -> Encoding:
        downlink = self._config.downlink
        if isinstance(downlink, DeltaDownlinkConfig):
            return downlink.encoding
        assert isinstance(downlink, LatticeDownlinkConfig)
        return lattice_for(downlink, change, seed=self._config.seed)
