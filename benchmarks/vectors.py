"""Models and updates as vectors, all tensors one after the other: for benchmarks that train in one process."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import torch
from torch import Tensor, nn

from examples.mnist.workload import Examples
from fed_core.codecs.base import Encoding
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.writer import Written, write_payload
from fed_core.specs import TensorSpec
from fed_core.tensors import load_tensors, model_specs, model_tensors
from fedstream.v1 import common_pb2

Vector = Tensor


def flat(model: nn.Module) -> Vector:
    """A model's tensors, copied."""
    return torch.cat([tensor.reshape(-1) for tensor in model_tensors(model).values()])


def parts(specs: Sequence[TensorSpec], values: Vector) -> dict[str, Tensor]:
    """The tensors by name, which share the vector's memory."""
    split = values.split([spec.num_elements for spec in specs])
    return {spec.name: part.view(spec.shape) for spec, part in zip(specs, split, strict=True)}


def load_flat(model: nn.Module, values: Vector) -> None:
    """The inverse of `flat`."""
    load_tensors(model, parts(model_specs(model), values))


def accuracy(model: nn.Module, test: Examples) -> float:
    """Of a classifier, which it leaves in evaluation mode."""
    images, labels = test
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def send(specs: Sequence[TensorSpec], values: Vector, encoding: Encoding, seed: int) -> tuple[Vector, Written]:
    """What arrives of an update, and what was written of it."""
    arrived = torch.empty_like(values)
    places = {name: part.view(-1) for name, part in parts(specs, arrived).items()}

    def keep(spec: TensorSpec, codec: str, first: int, decoded: Tensor) -> None:
        places[spec.name][first : first + len(decoded)] = decoded

    written = write_payload(
        BytesIO(),
        kind=common_pb2.PAYLOAD_KIND_UPDATE,
        run_id="training",
        round=1,
        model_version=0,
        base_digest=bytes(32),
        update=UpdateInfo("a", num_examples=1),
        tensors=list(zip(specs, parts(specs, values).values(), strict=True)),
        encoding=encoding,
        seed=seed,
        on_decoded=keep,
    )
    return arrived, written
