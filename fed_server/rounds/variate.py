"""SCAFFOLD's common variate c (Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378, algorithm 1, option II): the mean, over
the whole population, of what the sites' gradients are known to be.

It is kept with the version, in a file beside the master weights, and begins as zero. What sites are sent is that file, encoded
once, when it is first asked for; both sides then go by what they decode. The encoding's error is nowhere added up: c itself is what
it is, and is encoded anew for every version.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import torch

from fed_core.codecs.uniform import UniformConfig
from fed_core.errors import NotFiniteError
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import Written, write_payload
from fed_core.safetensors_tiles import SafetensorsReader, SafetensorsWriter
from fed_core.specs import TensorSpec, variate_specs
from fed_core.tensors import torch_dtype
from fed_server.aggregation.exact import TILE
from fed_server.aggregation.mean import as_reals
from fed_server.aggregation.variate import WithVariate
from fed_server.rounds.version import file_sources, payload_tile
from fedstream.v1 import common_pb2

ENCODING: Final = UniformConfig(bits=8)
"""How c is sent: it is added to gradients, which are noisier than that."""


def encode_variate(path: Path, variate: Path, *, run_id: str, version: int) -> Written:
    """Writes the payload that a version's sites are sent. The same file gives the same bytes. Memory: a few tiles."""
    with SafetensorsReader(variate) as reader, path.open("wb+") as file:
        return write_payload(
            file,
            kind=common_pb2.PAYLOAD_KIND_VARIATE,
            run_id=run_id,
            round=0,
            model_version=version,
            base_digest=b"",
            update=None,
            tensors=file_sources(reader),
            encoding=ENCODING,
        )


def write_variate(
    aggregate: WithVariate,
    before: Path | None,
    sent: Path | None,
    after: Path,
    *,
    specs: Sequence[TensorSpec],
    population: int,
) -> None:
    """Writes the next c, to `after`: with n the updates of the round, N the population, and c^ what the sites decoded,

        c' = c + sum over the updates of (-c^ - update / work) / N

    `before` is the file of c and `sent` the payload that the sites got of it, both None while c is zero; `specs` are the model's.
    Memory: a few tiles. Raises NotFiniteError where c leaves its type's range."""
    with ExitStack() as opened:
        kept = opened.enter_context(SafetensorsReader(before)) if before is not None else None
        decoded = payload_tile(opened.enter_context(PayloadReader(sent))) if sent is not None else None
        writer = SafetensorsWriter(opened.enter_context(after.open("wb+")), variate_specs(specs))
        for spec in variate_specs(specs):
            dtype, num_reals = torch_dtype(spec.dtype), spec.reals_per_element
            for first in range(0, spec.num_elements, TILE):
                count = min(TILE, spec.num_elements - first)
                change = aggregate.report_quotients(spec.name, first * num_reals, count * num_reals)
                if decoded is not None:
                    change.add_(as_reals(decoded(spec, first, count)).to(torch.float64).mul_(aggregate.num_updates))
                moved = change.div_(-population)
                if kept is not None:
                    moved.add_(as_reals(kept.read_tile(spec.name, first, count)))
                tile = moved.to(dtype.to_real() if dtype.is_complex else dtype)
                if not all(extreme.isfinite() for extreme in torch.aminmax(tile)):
                    raise NotFiniteError(f"the common variate of tensor {spec.name!r} leaves the range of {spec.dtype}")
                writer.write_tile(
                    spec.name, first, torch.view_as_complex(tile.reshape(-1, 2)) if dtype.is_complex else tile
                )
        writer.finish()
