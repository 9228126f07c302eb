"""From a workload's data to batches on a device, and the evaluation of a model over all of them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from fed_core.errors import ConfigError, InvalidError
from fed_core.workload import Data, Workload

MAX_METRICS: Final = 64
_METRIC_NAME: Final = re.compile(r"[a-z0-9_.]{1,100}")


def num_examples(data: Data) -> int:
    """How many examples there are. Raises InvalidError for data that is neither a map-style dataset nor tensors of one length."""
    if isinstance(data, tuple):
        lengths = {len(tensor) if isinstance(tensor, Tensor) and tensor.dim() else None for tensor in data}
        if len(lengths) != 1 or None in lengths:
            shapes = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in data)
            raise InvalidError(f"data given as a tuple must be tensors with one first dimension; got ({shapes})")
        return len(data[0])
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise InvalidError(
            f"the data is a {type(data).__name__}; expected a tuple of tensors or a Dataset with __len__ and __getitem__"
        )
    return len(data)


def batch_of(workload: Workload, data: Data, indices: Tensor, device: torch.device) -> Any:
    """The batch of these examples (int64 indices), on the device. Memory: the batch."""
    if isinstance(data, tuple):
        batch: Any = tuple(tensor[indices] for tensor in data)
    else:
        batch = workload.collate([data[index] for index in indices.tolist()])
    return to_device(batch, device)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor in it on the device: tensors, sequences, mappings, and whatever has a method `to`."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def evaluate(
    workload: Workload,
    model: nn.Module,
    data: Data,
    batch_size: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[int, dict[str, float]]:
    """Number of examples, and the mean of every metric over them; (0, {}) for no examples.

    The order of the batches is that of the data, so equal models give equal bits. The model is on `device`; it is put in
    evaluation mode and back. Sums are float64. Raises InvalidError for a metric whose name cannot travel.
    """
    return _means(workload.metrics, workload, model, data, batch_size, device, on_progress)


def mean_loss(workload: Workload, model: nn.Module, data: Data, batch_size: int, device: torch.device) -> float:
    """Mean of the workload's loss over all examples, as `evaluate` goes over them. Raises InvalidError for no examples."""
    total, means = _means(
        lambda model, batch: {"loss": workload.loss(model, batch)}, workload, model, data, batch_size, device
    )
    if total == 0:
        raise InvalidError("there are no examples to measure a loss on")
    return means["loss"]


def _means(
    measure: Callable[[nn.Module, Any], Mapping[str, float | Tensor]],
    workload: Workload,
    model: nn.Module,
    data: Data,
    batch_size: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[int, dict[str, float]]:
    total = num_examples(data)
    if total == 0:
        return 0, {}
    sums: dict[str, float] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for indices in torch.split(torch.arange(total), batch_size):
                measured = measure(model, batch_of(workload, data, indices, device))
                check_metric_names(measured)
                if sums and measured.keys() != sums.keys():
                    raise InvalidError(
                        f"metrics() gave {sorted(measured)} for one batch and {sorted(sums)} for another"
                    )
                for name, value in measured.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
                if on_progress is not None:
                    on_progress(int(indices[-1]) + 1, total)
    finally:
        model.train(was_training)
    return total, {name: value / total for name, value in sums.items()}


def check_metric_names(metrics: Mapping[str, Any]) -> None:
    """Raises InvalidError for names that the contract does not carry, or too many of them."""
    for name in metrics:
        if not _METRIC_NAME.fullmatch(name):
            raise InvalidError(f"metric {name!r}: a name is 1 to 100 characters out of a-z, 0-9, _ and dot")
    if len(metrics) > MAX_METRICS:
        raise InvalidError(f"{len(metrics)} metrics; at most {MAX_METRICS} are carried")


def seeds_of(seed: int, num_seeds: int) -> Sequence[int]:
    """Independent seeds out of one, so that two uses of it do not draw the same numbers."""
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(num_seeds, np.uint64)]


@contextmanager
def reproducible(seed: int, num_threads: int) -> Iterator[None]:
    """Within the block, the same code on the same machine gives the same bits: every generator seeded, the number of threads
    fixed, deterministic algorithms where torch has them (it warns where not). Threads and algorithms are put back afterwards.

    On CUDA the environment must say CUBLAS_WORKSPACE_CONFIG=:4096:8 before the first use of the device.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), _warns_only()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])


def choose_device(name: str) -> torch.device:
    """The device of a setting; "auto" takes cuda, then mps, then cpu. Raises ConfigError for one that this machine lacks."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_here in has.items() if is_here))
    if not has.get(name.partition(":")[0], False):
        here = ", ".join(kind for kind, is_here in has.items() if is_here)
        raise ConfigError(
            f"device {name!r} is not available; this machine has {here}: set --device auto or one of these"
        )
    return torch.device(name)


def _warns_only() -> bool:
    return torch.is_deterministic_algorithms_warn_only_enabled()
