"""A site's variate: what its gradients are known to be on its own, carried from round to round and taken off them.

FedDyn (Acar et al. 2021, https://arxiv.org/abs/2111.04263, algorithm 1) calls it the gradient of the local loss at the last local
model, SCAFFOLD (Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378, algorithm 1, option II) a control variate. With h that
variate, d the update as the coordinator decodes it, a the work behind it (objectives.py), s the strength, which FedDyn calls alpha,
and c the common variate, which SCAFFOLD's coordinator sends along:

    FedDyn      the gradient g of the loss becomes  g - h + s (w - w received)      h' = h - s d
    SCAFFOLD                                        g - h + c                       h' = h - c - d / a

What differs here: h' goes by what the coordinator was sent and not by what was trained, so both sides know the same of a round
whatever the encoding loses, and the site need not send its h' beside the update; a counts step sizes that change and momentum,
which the paper's K eta does not; and h' takes the place of h only once the coordinator has counted the update
(fed_client/carried.py).

A site that has lost its variate goes on as one that has not taken part yet: h = 0. It holds what the site's data taught and never
leaves the site but as part of later updates. Parameters of floating types have one, of at least 32 bits; buffers have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fed_client.training.leaving import LeftFile
from fed_core.errors import InvalidError, PayloadError
from fed_core.payload.reader import PayloadReader
from fed_core.safetensors_tiles import SafetensorsReader, tensors_digest
from fed_core.specs import TensorSpec, explain_difference, variate_specs
from fed_core.tensors import torch_dtype
from fedstream.v1 import common_pb2

VARIATE: Final = "variate"
"""Its kind among what a site carries over."""

Corrections = dict[str, Tensor]
"""What is added to the gradients, by the name of the parameter: on the CPU, of the types of `variate_specs`."""


def read_corrections(specs: Sequence[TensorSpec], variate: tuple[str, str] | None) -> tuple[Corrections, str]:
    """What a variate, a path and the digest of its values in hex, adds to the gradients of a model with these tensors: -h.

    The sentence says what kept it from being read, empty where nothing did: a file that is gone, damaged or another model's counts
    as no variate. Memory: the parameters once."""
    corrections = {spec.name: torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in variate_specs(specs)}
    if variate is None:
        return corrections, ""
    problem = ""
    try:
        with SafetensorsReader(Path(variate[0])) as reader:
            if difference := explain_difference(variate_specs(specs), reader.specs):
                problem = f"the variate is another model's: {difference}"
            elif tensors_digest(reader).hex() != variate[1]:
                problem = "the variate on this site's disk is damaged"
            else:
                for name, correction in corrections.items():
                    correction.sub_(reader.tensor(name))
    except (PayloadError, OSError) as error:
        problem = f"the variate cannot be read: {error}"
    if problem:
        for correction in corrections.values():
            correction.zero_()
    return corrections, problem


def add_common(corrections: Corrections, specs: Sequence[TensorSpec], common: PayloadReader) -> None:
    """Adds the common variate of a model with these tensors, in place: c - h. Raises InvalidError where it is another model's,
    CorruptError where it is not what it was when it came. Memory: a tile."""
    problem = explain_difference(variate_specs(specs), common.manifest.specs)
    if problem or common.manifest.kind != common_pb2.PAYLOAD_KIND_VARIATE:
        raise InvalidError(f"the common variate is another model's: {problem or 'it is no variate at all'}")
    for name, correction in corrections.items():
        flat = correction.reshape(-1)
        for first, tile in common.iter_tiles(name, verify=True):
            flat[first : first + len(tile)].add_(tile)


class NextVariate(LeftFile):
    """Writes the next variate as the update is encoded: -corrections - factor * d. Memory: a few tiles."""

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], corrections: Mapping[str, Tensor], factor: float
    ) -> None:
        """`corrections` are what the gradients of this round were corrected by, and stay as they are until `finish`."""
        self._corrections = {name: correction.reshape(-1) for name, correction in corrections.items()}
        self._factor = factor
        super().__init__(VARIATE, path, variate_specs(specs))

    def keep(self, spec: TensorSpec, codec: str, first: int, decoded: Tensor) -> None:
        """Takes what a receiver will decode (`write_payload`, on_decoded)."""
        correction = self._corrections.get(spec.name)
        if correction is None or self.problem:
            return
        tile = decoded.to(correction.dtype).mul(-self._factor).sub_(correction[first : first + len(decoded)])
        values = torch.view_as_real(tile) if tile.is_complex() else tile
        if len(tile) and not all(extreme.isfinite() for extreme in torch.aminmax(values)):
            self.give_up(f"the variate of tensor {spec.name!r} leaves the range of its type")
        self.write_tile(spec.name, first, tile)
