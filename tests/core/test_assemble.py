"""Models made of what was broadcast: chains, spans and whole versions come to the bits of the version, or are refused."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fed_core.codecs.base import Encoding
from fed_core.codecs.cast import CastConfig
from fed_core.codecs.fsq import FsqConfig
from fed_core.codecs.lattice import LosslessEncoding
from fed_core.codecs.lrq import LrqConfig
from fed_core.codecs.mask import MaskConfig
from fed_core.codecs.raw import RawConfig
from fed_core.codecs.uniform import UniformConfig
from fed_core.errors import PayloadError
from fed_core.payload import assemble
from fed_core.payload.assemble import DivergedError, assemble_model
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import Written, identify_model, write_payload
from fed_core.specs import TensorSpec
from fed_core.tensors import apply_difference, difference, torch_dtype
from fedstream.v1 import common_pb2
from tests.core.coding import memory_of, normal, source_of

RUN = "run-1"
SPECS = [
    TensorSpec("w", (200, 60), "float32"),
    TensorSpec("big", (600, 500), "float32"),  # two bodies of raw
    TensorSpec("b", (60,), "float32"),
    TensorSpec("h", (9, 7), "float16"),
    TensorSpec("d", (11,), "float64"),
    TensorSpec("none", (0, 3), "float32"),
    TensorSpec("mean", (60,), "float32", "buffer"),
    TensorSpec("count", (), "int64", "buffer"),
]
Version = dict[str, Tensor]
ENCODINGS: dict[str, Encoding] = {
    "raw": RawConfig(),
    "cast": CastConfig(),
    "uniform": UniformConfig(bits=4, rounding="stochastic"),
    "mask": MaskConfig(values="float16"),
    "fsq": FsqConfig(),
    "lrq": LrqConfig(),
    "lossless": LosslessEncoding(),
}


def random_version(seed: int, scale: float = 1.0) -> Version:
    return {
        spec.name: torch.tensor(seed)
        if spec.dtype == "int64"
        else normal(spec.shape, spec.dtype, scale=scale, seed=seed)
        for spec in SPECS
    }


class Line:
    """Versions of a model, their identities, and readers of the payloads that lead to them."""

    def __init__(self, folder: Path, stack: ExitStack, first: Version) -> None:
        self._folder = folder
        self._stack = stack
        self._num_files = 0
        self.versions = [first]

    def identity(self, version: int) -> bytes:
        return identify_model(RUN, version, [(spec, self.versions[version][spec.name]) for spec in SPECS]).digest

    def whole(self, version: int, encoding: Encoding | None = None) -> PayloadReader:
        """A version as a model payload; the encoding must be able to hold it."""
        return self._write(
            common_pb2.PAYLOAD_KIND_MODEL,
            version,
            self.versions[version],
            encoding=encoding,
            result_digest=lambda: self.identity(version),
        )

    def step(self, target: Version, encoding: Encoding | None, **changes: Any) -> PayloadReader:
        """The delta to a new version near the target: what the encoding leaves of it."""
        base, version = self.versions[-1], len(self.versions)
        decoded = {name: torch.empty(tensor.numel(), dtype=tensor.dtype) for name, tensor in base.items()}

        def apply(spec: TensorSpec, codec: str, first: int, tile: Tensor) -> None:
            part = slice(first, first + len(tile))
            known = base[spec.name].reshape(-1)[part]
            decoded[spec.name][part] = tile if codec == "raw" else apply_difference(known, tile)

        def result() -> bytes:
            self.versions.append({name: tensor.view(base[name].shape) for name, tensor in decoded.items()})
            return self.identity(version)

        return self._write(
            common_pb2.PAYLOAD_KIND_DELTA,
            version,
            {name: difference(target[name], base[name]) for name in target},
            **{
                "base_digest": self.identity(version - 1),
                "encoding": encoding,
                "new_values": {name: source_of(tensor) for name, tensor in target.items()},
                "on_decoded": apply,
                "result_digest": result,
            }
            | changes,
        )

    def span(self, base: int, version: int) -> PayloadReader:
        """The difference of two versions, raw: new values."""
        return self._write(
            common_pb2.PAYLOAD_KIND_DELTA,
            version,
            {name: difference(tensor, self.versions[base][name]) for name, tensor in self.versions[version].items()},
            base_digest=self.identity(base),
            new_values={name: source_of(tensor) for name, tensor in self.versions[version].items()},
            result_digest=lambda: self.identity(version),
        )

    def update(self) -> PayloadReader:
        return self._write(
            common_pb2.PAYLOAD_KIND_UPDATE,
            0,
            self.versions[0],
            round=1,
            base_digest=bytes(32),
            update=UpdateInfo("a", 1),
        )

    def _write(
        self, kind: common_pb2.PayloadKind.ValueType, version: int, tensors: Version, **options: Any
    ) -> PayloadReader:
        path = self._folder / f"{self._num_files}.payload"
        self._num_files += 1
        with path.open("wb+") as file:
            write_payload(
                file,
                kind=kind,
                run_id=RUN,
                model_version=version,
                tensors=[(spec, tensors[spec.name]) for spec in SPECS if spec.name in tensors],
                **{"round": 0, "base_digest": b"", "update": None} | options,
            )
        return self._stack.enter_context(PayloadReader(path))


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with ExitStack() as stack:
        yield Line(tmp_path, stack, random_version(0))


def made(base: PayloadReader | None, *steps: PayloadReader) -> tuple[Written, bytes]:
    file = io.BytesIO()
    return assemble_model(base, steps, file), file.getvalue()


def is_version(line: Line, version: int, data: bytes) -> bool:
    """Whether the payload is the version, raw, to the last bit of the file."""
    file = io.BytesIO()
    write_payload(
        file,
        kind=common_pb2.PAYLOAD_KIND_MODEL,
        run_id=RUN,
        round=0,
        model_version=version,
        base_digest=b"",
        update=None,
        tensors=[(spec, line.versions[version][spec.name]) for spec in SPECS],
    )
    return data == file.getvalue()


# --- ways


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_chain_of_deltas_leads_to_every_version_on_it(line: Line, name: str) -> None:
    whole = line.whole(0)
    steps = [line.step(random_version(seed, 0.01), ENCODINGS[name]) for seed in (1, 2, 3)]
    for version in (1, 2, 3):
        written, data = made(whole, *steps[:version])
        assert written.digest == line.identity(version)
        assert is_version(line, version, data)
    assert memory_of(line.versions[1]["count"]) == memory_of(torch.tensor(1))
    if name not in ("raw", "lossless"):
        assert memory_of(line.versions[1]["w"]) != memory_of(random_version(1, 0.01)["w"]), (
            "the test must lose something"
        )


def test_encodings_may_change_along_a_chain(line: Line) -> None:
    whole = line.whole(0)
    steps = [line.step(random_version(seed), encoding) for seed, encoding in enumerate(ENCODINGS.values(), start=1)]
    assert is_version(line, len(steps), made(whole, *steps)[1])


def test_a_span_leads_where_the_chain_does(line: Line) -> None:
    whole = line.whole(0)
    chain = [line.step(random_version(seed, 0.01), UniformConfig()) for seed in (1, 2, 3)]
    assert made(whole, line.span(0, 3)) == made(whole, *chain)
    first = made(whole, chain[0])[1]
    assert is_version(line, 1, first)


def test_a_whole_version_needs_no_base_and_makes_all_before_it_pointless(line: Line) -> None:
    zeroth = line.whole(0)
    steps = [line.step(random_version(seed, 0.01), UniformConfig()) for seed in (1, 2)]
    whole = line.whole(1)
    for base, way in ((None, [whole]), (zeroth, [whole]), (zeroth, [steps[0], whole]), (None, [whole, whole])):
        assert is_version(line, 1, made(base, *way)[1])
    for base, way in ((None, [whole, steps[1]]), (zeroth, [whole, steps[1]]), (None, [zeroth, *steps])):
        assert is_version(line, 2, made(base, *way)[1])


def test_a_version_that_is_written_without_loss_becomes_the_raw_one(line: Line) -> None:
    coarse = {n: (t * 16).round() / 16 if t.is_floating_point() else t for n, t in random_version(4).items()}
    line.versions[0] = {name: tensor + 0 for name, tensor in coarse.items()}  # no negative zeros
    lossless = line.whole(0, LosslessEncoding())
    assert lossless.manifest.codecs["fsq"] >= 4
    assert is_version(line, 0, made(None, lossless)[1])
    step = line.step(random_version(1, 0.01), UniformConfig())
    assert is_version(line, 1, made(None, lossless, step)[1])


def test_the_base_may_itself_be_a_payload_in_another_codec(line: Line) -> None:
    line.versions[0] = {name: torch.ones_like(tensor) for name, tensor in line.versions[0].items()}
    base = line.whole(0, CastConfig())
    step = line.step(random_version(1, 0.01), UniformConfig())
    assert is_version(line, 1, made(base, step)[1])


# --- what does not follow


Way = Callable[[Line, PayloadReader, list[PayloadReader]], tuple[PayloadReader | None, list[PayloadReader]]]
WRONG: dict[str, Way] = {
    "no payload to make a model of": lambda line, whole, steps: (whole, []),
    "the delta to version 1 begins at the model .*; here is none": lambda line, whole, steps: (None, steps),
    "the delta to version 2 begins at the model": lambda line, whole, steps: (whole, steps[1:]),
    "the delta to version 2 begins at": lambda line, whole, steps: (whole, [steps[1], steps[0]]),
    "the delta to version 1 begins at the model": lambda line, whole, steps: (whole, [steps[0], steps[0]]),
    "the delta to version 1": lambda line, whole, steps: (line.whole(1), steps),
    "an update is no step to a model": lambda line, whole, steps: (whole, [line.update()]),
    "an update is no step": lambda line, whole, steps: (whole, [steps[0], line.update()]),
}


@pytest.mark.parametrize("complaint", WRONG)
def test_steps_that_do_not_follow_on_are_refused_before_a_byte_is_written(line: Line, complaint: str) -> None:
    whole = line.whole(0)
    steps = [line.step(random_version(seed, 0.01), UniformConfig()) for seed in (1, 2)]
    base, way = WRONG[complaint](line, whole, steps)
    file = io.BytesIO()
    with pytest.raises(PayloadError, match=complaint) as caught:
        assemble_model(base, way, file)
    assert not isinstance(caught.value, DivergedError)
    assert file.getvalue() == b""


def test_a_delta_of_other_tensors_is_refused(line: Line) -> None:
    whole = line.whole(0)
    target = random_version(1)
    step = line._write(
        common_pb2.PAYLOAD_KIND_DELTA,
        1,
        {name: tensor for name, tensor in target.items() if name != "b"},
        base_digest=line.identity(0),
        result_digest=lambda: bytes(32),
    )
    with pytest.raises(PayloadError, match="the tensors of version 1 are not those before it: 'b' is missing"):
        made(whole, step)


# --- divergence


def test_a_result_that_is_not_the_announced_one_is_a_divergence_with_its_digest(line: Line) -> None:
    whole = line.whole(0)
    step = line.step(random_version(1), UniformConfig(), result_digest=lambda: bytes(range(32)))
    with pytest.raises(DivergedError, match=r"version 1 came out as .*, and should be 0001020304050607") as caught:
        made(whole, step)
    assert len(bytes.fromhex(caught.value.digest)) == 32
    assert caught.value.digest[:16] in str(caught.value)
    assert caught.value.reason == "DIVERGED"


def test_a_base_whose_values_are_not_what_its_manifest_says_diverges(line: Line, tmp_path: Path) -> None:
    """As a disk that rots after the base was verified, or memory that flips a bit."""
    whole = line.whole(0)
    step = line.step(random_version(1, 0.01), UniformConfig())
    expected = made(whole, step)[0].digest
    data = bytearray(whole.path.read_bytes())
    data[whole.manifest.segments[0].offset + 1] ^= 4
    (tmp_path / "rotten").write_bytes(data)
    with PayloadReader(tmp_path / "rotten") as rotten, pytest.raises(DivergedError) as caught:
        made(rotten, step)
    assert caught.value.digest != expected.hex()


def test_arithmetic_that_rounds_otherwise_diverges(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = line.whole(0)
    step = line.step(random_version(1, 0.01), UniformConfig())

    def fused(received: Tensor, change: Tensor) -> Tensor:
        """A last bit off wherever there is one."""
        exact = apply_difference(received, change)
        return torch.nextafter(exact, exact + 1) if exact.is_floating_point() and exact.element_size() > 2 else exact

    monkeypatch.setattr(assemble, "apply_difference", fused)
    with pytest.raises(DivergedError):
        made(whole, step)
    assert is_version(line, 1, made(None, line.whole(1))[1]), "a whole version needs no arithmetic"


def test_only_one_tensor_is_in_memory_at_a_time(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = line.whole(0)
    steps = [line.step(random_version(seed, 0.01), UniformConfig()) for seed in (1, 2)]
    asked: list[str] = []
    read = PayloadReader.tensor

    def watched(reader: PayloadReader, name: str, **options: Any) -> Tensor:
        asked.append(name)
        return read(reader, name, **options)

    monkeypatch.setattr(PayloadReader, "tensor", watched)
    made(whole, *steps)
    # The base, and each delta, of one tensor after the other; whatever is empty has no tiles to be asked for.
    assert asked == [spec.name for spec in SPECS if spec.num_elements for _ in range(3)]


def test_the_result_has_the_dtype_and_shape_of_every_tensor(line: Line, tmp_path: Path) -> None:
    _, data = made(line.whole(0), line.step(random_version(1), FsqConfig()))
    (tmp_path / "made").write_bytes(data)
    with PayloadReader(tmp_path / "made") as reader:
        assert reader.manifest.specs == tuple(SPECS)
        assert reader.manifest.codecs == {"raw": len(SPECS)}
        assert {n: t.dtype for n, t in reader.tensors().items()} == {s.name: torch_dtype(s.dtype) for s in SPECS}
