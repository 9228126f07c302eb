"""What the codecs cost and lose, on synthetic vectors and on updates of real clients (`benchmarks.updates` makes them).

    python -m benchmarks.codecs [--quick] [--only gaussian cnn-shards-middle ...] [--data DIR]

Bits per parameter are those of the whole payload file: preamble, manifest, digests, heads and bodies. vNMSE is |x - x'|^2 / |x|^2
and the gain <x, x'> / |x|^2, where x' is what is read back from that file; of the cohort, x is the mean of n exact updates and x'
that of the decoded ones. Speeds are million coordinates per second of processor time on one thread: to encode is to plan and to
make all bodies, to fold is to decode them and to add them to the coordinator's exact sum. Rows at a target vNMSE have settings that
were searched until the first client's update has it.

The clients of a synthetic cohort share half their coordinates, drawn anew by each, with one common vector.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.updates import SCENARIOS, STAGES, MissingDataError, Updates, default_data, updates_of
from fed_core.codecs.auto import AutoConfig
from fed_core.codecs.base import Encoding
from fed_core.codecs.cast import CastConfig
from fed_core.codecs.ectcq import EctcqConfig
from fed_core.codecs.eden import EdenConfig
from fed_core.codecs.fsq import FsqConfig
from fed_core.codecs.lrq import LrqConfig
from fed_core.codecs.mask import MaskConfig
from fed_core.codecs.nested import FsqValues, UniformValues
from fed_core.codecs.powersgd import PowersgdConfig
from fed_core.codecs.randomk import RandomkConfig
from fed_core.codecs.raw import RawConfig
from fed_core.codecs.registry import EncodingConfig, codec_named
from fed_core.codecs.sign import SignConfig
from fed_core.codecs.ternary import TernaryConfig
from fed_core.codecs.topk import TopkConfig
from fed_core.codecs.uniform import UniformConfig
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import write_payload
from fed_core.specs import PARAMETER, TensorSpec
from fed_server.aggregation.exact import ExactSum
from fedstream.v1 import common_pb2

RESULTS: Final = Path(__file__).parent / "results" / "codecs.json"
PLOT: Final = Path(__file__).parents[1] / "docs" / "images" / "codecs.png"
TARGET: Final = 0.1
# What is left of an update at the same step, and so about the same bits, when its gain is matched.
MATCHED_TARGET: Final = TARGET / (1 - TARGET)
COHORTS: Final = (1, 10, 100)
SIDE: Final = 1024
# Rates and errors of a source do not depend on its length: a cohort of 100 is measured on shorter vectors.
COHORT_SIDE: Final = 128
_SHANNON_BITS: Final = (1.0, 2.0, 3.0, 4.0)
_TRELLIS_BITS: Final = (0.6, *_SHANNON_BITS)
# Of 1, 2, 3 and 4 bits, without bias and with the least error: Vargaftik et al. 2022 and Max 1960.
_EDEN_ERRORS: Final = ((0.5708, 0.3634), (0.1331, 0.11748), (0.03578, 0.03455), (0.009592, 0.009501))
_ANY_ERROR: Final = 0.99
_MAX_SEARCH: Final = 8
_CLOSE: Final = 0.005

Tensors = Sequence[tuple[TensorSpec, Tensor]]
FlatPair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """What is encoded: one update for rates, errors and speeds, and a cohort of updates for the error of their mean."""

    name: str
    first: Tensors
    num_clients: int
    client: Callable[[int], Tensors]

    @property
    def num_coordinates(self) -> int:
        return sum(spec.num_elements for spec, _ in self.first)


@dataclass
class Quality:
    """How near the decoded is to the exact."""

    vnmse: float
    gain: float


@dataclass
class Row:
    """One encoding of one source. `cohort` is by number of clients; None is not run."""

    source: str
    encoding: str
    config: dict[str, Any] = field(default_factory=dict)
    bits: float | None = None
    vnmse: float | None = None
    gain: float | None = None
    cohort: dict[int, Quality | None] = field(default_factory=dict)
    encode_speed: float | None = None
    fold_speed: float | None = None
    add_speed: float | None = None
    codecs: dict[str, int] = field(default_factory=dict)
    not_run: str = ""


# What a row is called, and the encoding that it stands for. Those in *_TOO are measured on DETAILED sources only.
FIXED: Final[dict[str, EncodingConfig]] = {
    "uniform 4": UniformConfig(bits=4, block=128),
    "auto": AutoConfig(),
    "auto in a cohort of 100": AutoConfig().for_cohort(100),
}
FIXED_TOO: Final[dict[str, EncodingConfig]] = {
    "raw": RawConfig(),
    "mask": MaskConfig(),
    "cast bfloat16": CastConfig(),
    "cast float16": CastConfig(to="float16"),
    "uniform 8": UniformConfig(),
    "uniform 6": UniformConfig(bits=6, block=256),
    "uniform 4 stochastic": UniformConfig(bits=4, block=128, rounding="stochastic"),
    "uniform 3": UniformConfig(bits=3, block=64),
    "uniform 2": UniformConfig(bits=2, block=32),
    "sign": SignConfig(),
    "ternary 1 %": TernaryConfig(fraction=0.01),
    "ternary 5 %": TernaryConfig(),
    "topk 1 %": TopkConfig(fraction=0.01),
    "topk 5 %": TopkConfig(),
    "topk 5 % fsq": TopkConfig(values=FsqValues()),
    "topk 1 % raw": TopkConfig(fraction=0.01, values=RawConfig()),
    "randomk 25 %": RandomkConfig(),
    "randomk 25 % short": RandomkConfig(unbiased=False, values=UniformValues()),
    **{f"eden {bits}": EdenConfig(bits=bits) for bits in (1, 2, 3, 4)},
    **{f"eden {bits} biased": EdenConfig(bits=bits, unbiased=False) for bits in (1, 2, 3, 4)},
    "powersgd 4": PowersgdConfig(),
    "powersgd 4 half": PowersgdConfig(values="float16"),
}
LOSSY: Final[dict[str, Callable[[float], EncodingConfig]]] = {
    "fsq": lambda error: FsqConfig(target_error=error),
    "lrq": lambda error: LrqConfig(target_error=error),
}
LOSSY_TOO: Final[dict[str, Callable[[float], EncodingConfig]]] = {
    "fsq without contexts": lambda error: FsqConfig(target_error=error, contexts=False),
    "fsq packed": lambda error: FsqConfig(target_error=error, coder="packed"),
    "auto": lambda error: AutoConfig(target_error=error),
    "lrq without residual": lambda error: LrqConfig(target_error=error, residual=False),
    "ectcq": lambda error: EctcqConfig(target_error=error, max_tensor_error=_ANY_ERROR),
    "ectcq of 8 states": lambda error: EctcqConfig(target_error=error, max_tensor_error=_ANY_ERROR, states=8),
}
CURVES: Final = ("fsq", "fsq without contexts", "lrq", "auto", "ectcq")
# At 1, 2, 3 and 4 bits of an ideal entropy-coded uniform quantizer of a Gaussian, and beyond.
CURVE_ERRORS: Final = (0.6, 0.3483, 0.2, 0.08893, 0.05, 0.02224, 0.00556)
DETAILED: Final = ("gaussian", "laplace", "cnn-shards-middle")
CURVED: Final = ("gaussian", "cnn-shards-middle")
QUICK: Final = ("gaussian", "cnn-shards-middle")

# The wires of others: bits from their formats, vNMSE of a Gaussian vector. A rotated update is one, whatever it was before.
PEERS: Final = (
    ("float32 (the default of all)", 32.0, 0.0, "computed"),
    ("NVFlare float16", 16.0, 4.3e-8, "format; error of a laboratory prototype"),
    ("NVFlare int8, absmax of 4096", 8 + 32 / 4096, 7.5e-5, "format; error of a laboratory prototype"),
    ("NVFlare nf4, absmax of 64", 4 + 32 / 64, 8.48e-3, "format; error of a laboratory prototype"),
    ("OpenFL EDEN, 1 bit", 1.0, 0.3634, "published: Lloyd-Max on a rotated vector; padding to a power of two left out"),
    (
        "OpenFL EDEN, 2 bits",
        2.0,
        0.11748,
        "published: Lloyd-Max on a rotated vector; padding to a power of two left out",
    ),
    (
        "OpenFL EDEN, 4 bits",
        4.0,
        9.501e-3,
        "published: Lloyd-Max on a rotated vector; padding to a power of two left out",
    ),
    ("OpenFL STC, top 1 %", 0.091, 0.916, "ideal entropy and error of a laboratory prototype"),
)


def synthetic(name: str, draw: Callable[[int, int], Tensor]) -> Source:
    """A source of 1024 x 1024 coordinates, and of cohorts that have half their coordinates in common with one vector.

    `draw` makes so many coordinates from a seed. A coordinate is common or the client's own by a toss, so that every client's
    vector has the distribution of the first.
    """

    def as_tensors(flat: Tensor, side: int) -> Tensors:
        return [(TensorSpec("w", (side, side), "float32", PARAMETER), flat.view(side, side))]

    def client(index: int) -> Tensors:
        length = COHORT_SIDE**2
        generator = torch.Generator().manual_seed(index)
        is_common = torch.rand(length, generator=generator) < 0.5
        return as_tensors(torch.where(is_common, draw(length, 1), draw(length, 2 + index)), COHORT_SIDE)

    return Source(name, as_tensors(draw(SIDE**2, 0), SIDE), max(COHORTS), client)


def draw_gaussian(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def draw_laplace(count: int, seed: int) -> Tensor:
    centred = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return (-centred.sign() * torch.log1p(-2 * centred.abs())).float()


def real(name: str, updates: Updates) -> Source:
    """The updates of one stage of a run."""

    def client(index: int) -> Tensors:
        tensors = updates.client(index).items()
        return [
            (TensorSpec(key, tuple(value.shape), "float32", PARAMETER), value.contiguous()) for key, value in tensors
        ]

    return Source(name, client(0), updates.num_clients, client)


def sources(wanted: Sequence[str], data: Path) -> Iterator[Source | Row]:
    """The sources of these names; a row that says why for one that cannot be had."""
    for name in wanted:
        if name == "gaussian":
            yield synthetic(name, draw_gaussian)
        elif name == "laplace":
            yield synthetic(name, draw_laplace)
        else:
            scenario, _, stage = name.rpartition("-")
            try:
                yield real(name, updates_of(SCENARIOS[scenario], stage, data))
            except MissingDataError as error:
                yield Row(name, "all", not_run=str(error))


def flat_of(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).to(torch.float64) for tensor in tensors])


def quality(exact: Tensor, decoded: Tensor) -> Quality:
    energy, left = float(exact.dot(exact)), exact - decoded
    return Quality(float(left.dot(left)) / energy, float(exact.dot(decoded)) / energy)


class Files:
    """Payloads written to and read back from one temporary file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "update.payload"

    def there_and_back(
        self, tensors: Tensors, encoding: Encoding, seed: int = 0
    ) -> tuple[int, dict[str, int], FlatPair]:
        """Bytes of the file, tensors by codec, and the exact and the decoded update, flat."""
        with self._path.open("w+b") as file:
            written = write_payload(
                file,
                kind=common_pb2.PAYLOAD_KIND_UPDATE,
                run_id="01890a5d-ac96-774b-bcce-b302099a8057",
                round=7,
                model_version=6,
                base_digest=bytes(32),
                update=UpdateInfo("01890a5d-ac96-774b-bcce-b302099a8058", 600, num_steps=300, metrics={"loss": 0.25}),
                tensors=tensors,
                encoding=encoding,
                seed=seed,
            )
        with PayloadReader(self._path, written.digest) as reader:
            decoded = reader.tensors(verify=True)
        pair = flat_of([tensor for _, tensor in tensors]), flat_of([decoded[spec.name] for spec, _ in tensors])
        return self._path.stat().st_size, written.codecs, pair

    def cohort(self, source: Source, encoding: Encoding, most: int) -> dict[int, Quality | None]:
        """The error of the decoded mean, by number of clients, which is at most `most`."""
        found: dict[int, Quality | None] = dict.fromkeys(COHORTS)
        sums: FlatPair | None = None
        for index in range(min(most, source.num_clients) if most > 1 else 0):
            _, _, pair = self.there_and_back(source.client(index), encoding, seed=index)
            sums = (sums[0].add_(pair[0]), sums[1].add_(pair[1])) if sums else pair
            if index + 1 in COHORTS:
                found[index + 1] = quality(*sums)
        return found

    def search(self, tensors: Tensors, make: Callable[[float], EncodingConfig], target: float) -> EncodingConfig:
        """The encoding whose error on these tensors is nearest to the target: secants in the logarithms of setting and error."""
        tried: list[tuple[float, float]] = []
        setting = target
        for _ in range(_MAX_SEARCH):
            found = quality(*self.there_and_back(tensors, make(setting))[2]).vnmse
            tried.append((math.log(setting), math.log(max(found, 1e-12) / target)))
            if abs(tried[-1][1]) < _CLOSE:
                break
            slope = 1.0
            if len(tried) > 1 and tried[-1][0] != tried[-2][0]:
                slope = (tried[-1][1] - tried[-2][1]) / (tried[-1][0] - tried[-2][0])
            setting = min(0.9, math.exp(tried[-1][0] - tried[-1][1] / min(max(slope, 0.3), 3.0)))
        return make(math.exp(min(tried, key=lambda pair: abs(pair[1]))[0]))


def seconds_of(work: Callable[[], object]) -> float:
    """Median processor time of this thread; the first time does not count."""
    work()
    spent: list[float] = []
    while len(spent) < 3 or (len(spent) < 9 and sum(spent) < 0.4):
        began = time.thread_time()
        work()
        spent.append(time.thread_time() - began)
    return statistics.median(spent)


def measure_speeds(row: Row, source: Source, encoding: Encoding) -> None:
    """Encode, decode and fold, and beside them the plain addition of as many coordinates."""
    inputs = [(spec, tensor.reshape(-1)) for spec, tensor in source.first]

    def tiles_of(flat: Tensor) -> Callable[[int, int], Tensor]:
        return lambda first, count: flat[first : first + count]

    def encode() -> list[tuple[TensorSpec, str, bytes | None, list[tuple[int, int, bytes | memoryview]]]]:
        plans = encoding.plan([(spec, tiles_of(flat)) for spec, flat in inputs], seed=0)
        encoded = []
        for (spec, flat), plan in zip(inputs, plans, strict=True):
            tiles = [
                (first, flat[first : first + plan.body_coordinates])
                for first in range(0, len(flat), plan.body_coordinates)
            ]
            bodies = [(first, len(tile), plan.encode(first, tile)) for first, tile in tiles]
            encoded.append((spec, plan.codec, plan.head, bodies))
        return encoded

    encoded = encode()
    sums = [ExactSum(spec.num_elements, -40) for spec, _ in inputs]
    buffer = torch.empty(max(length for *_, bodies in encoded for _, length, _ in bodies))

    def fold() -> None:
        for total, (spec, codec, head, bodies) in zip(sums, encoded, strict=True):
            decoder = codec_named(codec).decoder(spec, head)
            for first, length, body in bodies:
                decoder.decode(first, body, buffer[:length])
                total.add(first, buffer[:length], 1)

    flat = torch.cat([flat for _, flat in inputs])
    total = torch.zeros_like(flat)
    millions = source.num_coordinates / 1e6
    row.encode_speed = millions / seconds_of(encode)
    row.fold_speed = millions / seconds_of(fold)
    row.add_speed = millions / seconds_of(lambda: total.add_(flat))


def _is_timed(source: Source) -> bool:
    """Early and late updates take as long as those in the middle."""
    return not source.name.endswith(("early", "late"))


def matched_lrq(error: float) -> EncodingConfig:
    return LrqConfig(target_error=error, match_gain=True)


def measure(source: Source, label: str, encoding: EncodingConfig, files: Files, *, most: int = 1) -> Row:
    """One row, with a cohort of at most so many clients; `most` 0 for a point of a curve, which is not timed either."""
    num_bytes, codecs, pair = files.there_and_back(source.first, encoding)
    found = quality(*pair)
    row = Row(
        source.name, label, encoding.model_dump(), 8 * num_bytes / source.num_coordinates, found.vnmse, found.gain
    )
    row.codecs = codecs
    if most:
        row.cohort = files.cohort(source, encoding, most) | {1: found}
        if _is_timed(source):
            measure_speeds(row, source, encoding)
    return row


def rows_of(source: Source, files: Files, most: int) -> Iterator[Row]:
    """All rows of a source, with cohorts of at most so many clients."""
    is_detailed, is_timed = source.name in DETAILED, _is_timed(source)
    for label, encoding in FIXED.items():
        yield measure(source, label, encoding, files, most=most)
    for label, encoding in FIXED_TOO.items() if is_detailed else ():
        yield measure(source, label, encoding, files)
    for label, make in LOSSY.items():
        encoding = files.search(source.first, make, TARGET)
        yield measure(source, f"{label}, at {TARGET}", encoding, files, most=most if is_timed or label == "lrq" else 1)
    if is_timed:
        encoding = files.search(source.first, matched_lrq, MATCHED_TARGET)
        yield measure(source, f"lrq matched gain, at {MATCHED_TARGET:.3f}", encoding, files, most=most)
    for label, make in LOSSY_TOO.items() if is_detailed else ():
        yield measure(source, f"{label}, at {TARGET}", files.search(source.first, make, TARGET), files)
    for label in CURVES if source.name in CURVED else ():
        for error in CURVE_ERRORS:
            encoding = (LOSSY | LOSSY_TOO)[label](error)
            yield measure(source, f"{label}, aims at {error:g}", encoding, files, most=0)


def aims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The figures that are aimed at, with what was measured (None where it was not)."""
    found = {(row.source, row.encoding): row for row in rows}

    def figure(source: str, encoding: str, attribute: str) -> float | None:
        row = found.get((source, encoding))
        return getattr(row, attribute) if row else None

    listed: list[tuple[str, float | None, float, str, str]] = []
    for bits in _SHANNON_BITS:
        label = f"fsq without contexts, aims at {_error_at(bits):g}"
        row = found.get(("gaussian", label))
        listed.append((f"gaussian: fsq without contexts off Shannon near {bits:g} b/p", _gap(row), 1.6, "max", "dB"))
    for bits in _TRELLIS_BITS:
        row = found.get(("gaussian", f"ectcq, aims at {_error_at(bits):g}"))
        listed.append((f"gaussian: ectcq off Shannon near {bits:g} b/p", _gap(row), 0.5, "max", "dB"))
    for number, errors in enumerate(_EDEN_ERRORS, 1):
        for label, published in zip((f"eden {number}", f"eden {number} biased"), errors, strict=True):
            error = figure("gaussian", label, "vnmse")
            off = None if error is None else 100 * abs(error / published - 1)
            listed.append((f"gaussian: {label} off the published vNMSE", off, 1.0, "max", "%"))
    for scenario, codec, most in (
        ("cnn-shards", "fsq", 0.5),
        ("cnn-shards", "lrq", 0.06),
        ("conv-iid-one-epoch", "lrq", 0.5),
        ("conv-iid", "lrq", 0.5),
    ):
        for stage in STAGES:
            value = figure(f"{scenario}-{stage}", f"{codec}, at {TARGET}", "bits")
            listed.append((f"{scenario}-{stage}: {codec} at vNMSE {TARGET}", value, most, "max", "b/p"))
    for source, encoding, encode, fold in (
        ("gaussian", "uniform 8", 300, 250),
        ("gaussian", "uniform 4", 300, 250),
        ("gaussian", f"fsq, at {TARGET}", 15, 25),
        ("cnn-shards-middle", f"fsq, at {TARGET}", 15, 25),
        ("cnn-shards-middle", f"lrq, at {TARGET}", 10, 100),
    ):
        for what, least in (("encode", encode), ("fold", fold)):
            value = figure(source, encoding, f"{what}_speed")
            listed.append((f"{source}: {encoding}: {what}", value, least, "min", "M/s"))
    return [{"what": w, "value": v, "aim": a, "direction": d, "unit": u} for w, v, a, d, u in listed]


def _error_at(bits: float) -> float:
    """Which of the curve's errors an ideal entropy-coded uniform quantizer has nearest to so many bits."""
    return min(CURVE_ERRORS, key=lambda error: abs(-0.5 * math.log2(error) + 0.25 - bits))


def _gap(row: Row | None) -> float | None:
    """Decibels between a row of a Gaussian source and the least error at its bits."""
    if row is None or row.bits is None or not row.vnmse:
        return None
    return 10 * math.log10(row.vnmse * 4**row.bits)


def table(rows: Sequence[Row]) -> Table:
    """What was measured; what was not is written so."""
    result = Table(
        title="Codecs", caption="b/p: bits per parameter of the whole payload; M/s: million coordinates per second"
    )
    columns = ["source", "encoding", "b/p", "vNMSE", "gain", "mean of 10", "gain", "mean of 100", "gain"]
    for column in (*columns, "encode M/s", "fold M/s", "add_ M/s"):
        result.add_column(column, justify="left" if column in ("source", "encoding") else "right")

    def show(value: float | None, form: str) -> str:
        return "not run" if value is None else f"{value:{form}}"

    for row in rows:
        if row.not_run:
            result.add_row(row.source, row.encoding, f"not run: {row.not_run}")
            continue
        if not row.cohort:
            continue
        means = [row.cohort.get(count) for count in COHORTS[1:]]
        cohort = [
            text
            for mean in means
            for text in (show(mean.vnmse if mean else None, ".3g"), show(mean.gain if mean else None, ".3f"))
        ]
        speeds = [show(speed, ".0f") for speed in (row.encode_speed, row.fold_speed, row.add_speed)]
        result.add_row(
            row.source,
            row.encoding,
            show(row.bits, ".4g"),
            show(row.vnmse, ".3g"),
            show(row.gain, ".3f"),
            *cohort,
            *speeds,
        )
    return result


def curve_table(rows: Sequence[Row]) -> Table:
    """The points of the curves."""
    result = Table(title="Curves")
    for column in ("source", "encoding", "b/p", "vNMSE", "off Shannon, dB"):
        result.add_column(column, justify="left" if column in ("source", "encoding") else "right")
    for row in rows:
        if row.bits is not None and not row.cohort:
            gap = _gap(row) if row.source == "gaussian" else None
            result.add_row(
                row.source, row.encoding, f"{row.bits:.4g}", f"{row.vnmse:.3g}", "" if gap is None else f"{gap:.2f}"
            )
    return result


def _curve(rows: Sequence[Row], kind: str) -> list[tuple[float, float]]:
    """Bits and errors of a codec at several settings."""
    found = [
        row
        for row in rows
        if row.encoding.startswith(f"{kind}, aims") or row.encoding.removeprefix(f"{kind} ").isdecimal()
    ]
    return sorted((row.bits, row.vnmse) for row in found if row.bits is not None and row.vnmse is not None)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Rate and distortion of the Gaussian, with Shannon's bound, and of a real update."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    panels = (("gaussian", "Gaussian vector, 2^20"), ("cnn-shards-middle", "Update of a CNN, two digits per client"))
    styles = {
        "uniform": ("^-", "C2"),
        "fsq": ("o-", "C0"),
        "lrq": ("s-", "C3"),
        "auto": ("D--", "k"),
        "ectcq": ("v-", "C5"),
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axis, (source, title) in zip(axes, panels, strict=True):
        for kind, (style, colour) in styles.items():
            if points := _curve([row for row in rows if row.source == source], kind):
                axis.plot(*zip(*points, strict=True), style, color=colour, label=kind, markersize=4, alpha=0.8)
        rotated = [(bits, error) for name, bits, error, _ in PEERS if "EDEN" in name]
        axis.plot(*zip(*rotated, strict=True), "x:", color="C1", label="EDEN, 1, 2 and 4 bits (published)")
        if source == "gaussian":
            others = [(bits, error) for name, bits, error, _ in PEERS if "nf4" in name or "int8" in name]
            axis.plot(*zip(*others, strict=True), "P", color="C4", label="nf4, int8 (by their formats)")
            rates = [0.05 * 1.06**index for index in range(90)]
            axis.plot(rates, [4**-rate for rate in rates], "-", color="0.6", label="Shannon's bound")
        axis.axhline(TARGET, color="0.85", zorder=0)
        axis.set(title=title, xlabel="bits per parameter, the whole payload")
        axis.set(xscale="log", yscale="log", ylim=(3e-5, 1.1))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.grid(which="major", alpha=0.25)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("vNMSE")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, prints the table, writes benchmarks/results/codecs.json and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["gaussian", "laplace", *(f"{scenario}-{stage}" for scenario in SCENARIOS for stage in STAGES)]
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}; prints, and writes nothing")
    parser.add_argument("--only", nargs="*", choices=every, help="only these; prints, and writes nothing")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder of the data sets")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=160)
    wanted = arguments.only or (QUICK if arguments.quick else every)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sources(wanted, arguments.data):
            if isinstance(source, Row):
                rows.append(source)
                continue
            began = time.process_time()
            with console.status(source.name):
                rows += rows_of(source, Files(Path(folder)), most=10 if arguments.quick else max(COHORTS))
            console.print(f"{source.name}: {time.process_time() - began:.0f} s of processor time")
    console.print(table(rows), curve_table(rows))
    found = aims(rows)
    for aim in found:
        value = "not measured" if aim["value"] is None else f"{aim['value']:.3g} {aim['unit']}"
        console.print(
            f"{aim['what']}: {value} (aim: at {'most' if aim['direction'] == 'max' else 'least'} {aim['aim']:g})"
        )
    if arguments.only or arguments.quick:
        return
    peers = [dict(zip(("system", "bits", "gaussian_vnmse", "origin"), peer, strict=True)) for peer in PEERS]
    result = {"benchmark": "codecs", "rows": [asdict(row) for row in rows], "peers": peers, "aims": found}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, PLOT)


if __name__ == "__main__":
    main()
