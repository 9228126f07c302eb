"""Error feedback: what the encoding of an update loses is added to the next one.

With u the update of this round, e the residual and C what the encoding makes of a tensor and the receiver decodes again:

    x = u + e        C(x) is sent        e' = x - C(x)

Summed over rounds, what was decoded is what was trained less the last residual: nothing is lost, it is late. Seide et al. 2014
(1-bit SGD); Stich, Cordonnier and Jaggi 2018, https://arxiv.org/abs/1809.07599, algorithm 1; Karimireddy et al. 2019,
https://arxiv.org/abs/1901.09847, algorithm 2. What differs here: u is a whole round of local training and not a gradient, so there
is no learning rate in it; a client that is not selected keeps its residual as it is, however old it grows; and e' takes the
place of e only once the coordinator has counted the update (fed_client/carried.py).

The residual holds what the site's data taught and was not sent. It never leaves the site but as part of a later update, so whatever
bounds an update for privacy, a norm or noise, must come after the residual was added, and must see x.

Parameters of a floating type have a residual, in their own type; buffers, integers and complex numbers are sent without loss or are
no sum of updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from fed_client.training.leaving import LeftFile, Update, Write
from fed_core.codecs.floating import is_lossy_parameter
from fed_core.errors import PayloadError
from fed_core.payload.writer import Written
from fed_core.safetensors_tiles import SafetensorsReader, tensors_digest
from fed_core.specs import TensorSpec, explain_difference
from fed_core.tensors import apply_difference, difference

RESIDUAL: Final = "residual"
"""Its kind among what a site carries over."""


def has_residual(spec: TensorSpec) -> bool:
    """Whether what an encoding loses of this tensor is carried over."""
    return is_lossy_parameter(spec)


def add_residual(update: Update, path: Path, digest: str) -> str:
    """Adds the residual to the update, whose tensors are replaced. `digest` is that of the file's values, in hex.

    Returns what kept it from doing so, empty where nothing did. A file that is gone, damaged or another model's leaves the update
    as it is; a tensor that would leave its type's range does without its residual. Memory: two tensors."""
    try:
        with SafetensorsReader(path) as reader:
            problem = explain_difference([spec for spec, _ in update if has_residual(spec)], reader.specs)
            if problem:
                return f"the residual is another model's: {problem}"
            if tensors_digest(reader).hex() != digest:
                return "the residual on this site's disk is damaged"
            for index, (spec, change) in enumerate(update):
                if has_residual(spec):
                    total = apply_difference(change, reader.tensor(spec.name))
                    if not total.isfinite().all():
                        problem = f"with its residual, tensor {spec.name!r} leaves the range of {spec.dtype}"
                    else:
                        update[index] = (spec, total)
            return problem
    except (PayloadError, OSError) as error:
        return f"the residual cannot be read: {error}"


@dataclass(frozen=True, slots=True)
class FedBack:
    """What came of an update that was written with error feedback: the residual's digest by its kind, nothing where there is none
    to carry over; and why the old or the new one was given up."""

    written: Written
    carried: dict[str, str]
    problems: list[str]


def write_with_feedback(
    write: Write,
    update: Update,
    residual: tuple[str, str] | None,
    next_residual: Path,
    protect: Callable[[Update], None] = lambda update: None,
) -> FedBack:
    """Adds the residual, a path and its digest in hex, to the update, which changes; has it protected; writes it; and leaves the
    next one durably at `next_residual`. Whatever is wrong with either file costs what it holds and never the update."""
    problems = [add_residual(update, Path(residual[0]), residual[1])] if residual is not None else []
    protect(update)
    with _NextResidual(next_residual, update) as following:
        written = write(update, following.keep)
        carried = following.finish_unless(written.fidelity.error)
    return FedBack(written, carried, [problem for problem in (*problems, following.problem) if problem])


class _NextResidual(LeftFile):
    """Writes what the encoding of an update loses, as the tiles of it are decoded.

    Memory: a few tiles; a tensor that does not lie in memory in the order of its coordinates is copied.
    """

    def __init__(self, path: Path, update: Sequence[tuple[TensorSpec, Tensor]]) -> None:
        """`update` is what is encoded, and stays as it is until `finish`."""
        self._exact = {spec.name: change.reshape(-1) for spec, change in update if has_residual(spec)}
        super().__init__(RESIDUAL, path, [spec for spec, _ in update if has_residual(spec)])

    def keep(self, spec: TensorSpec, codec: str, first: int, decoded: Tensor) -> None:
        """Takes what a receiver will decode (`write_payload`, on_decoded)."""
        exact = self._exact.get(spec.name)
        if exact is not None and not self.problem:
            self.write_tile(spec.name, first, difference(exact[first : first + len(decoded)], decoded))

    def finish_unless(self, error: float) -> dict[str, str]:
        """`finish`, unless the code did more harm than sending nothing: `error` is |x - x'|^2 / |x|^2 over the update, and at 1 and
        above its residual would grow from round to round."""
        if error >= 1 and not self.problem:
            self.give_up(f"the encoding lost more than all there was, its error is {error:.3g}")
        return self.finish()
