"""Error feedback as the trainer does it: nothing of an update is lost for good, and no file can stop a training."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed_client.training import leaving
from fed_client.training.leaving import Update
from fed_client.training.residual import RESIDUAL, FedBack, add_residual, has_residual, write_with_feedback
from fed_core.codecs.base import Encoding
from fed_core.codecs.fsq import FsqConfig
from fed_core.codecs.raw import RawConfig
from fed_core.codecs.registry import EncodingConfig, encoding_from_json
from fed_core.codecs.uniform import UniformConfig
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import OnDecoded, Written, write_payload
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import BUFFER, TensorSpec
from fedstream.v1 import common_pb2


def encoding_of(config: dict[str, Any]) -> EncodingConfig:
    return encoding_from_json(json.dumps(config))


COARSE = UniformConfig(bits=2, feedback=True)
SPECS = [
    TensorSpec("w", (70, 1000), "float32"),
    TensorSpec("half", (40, 30), "bfloat16"),
    TensorSpec("double", (500,), "float64"),
    TensorSpec("scalar", (), "float32"),
    TensorSpec("none", (0, 3), "float32"),
    TensorSpec("mean", (7,), "float32", BUFFER),
    TensorSpec("count", (), "int64", BUFFER),
    TensorSpec("complex", (3,), "complex64"),
]
CARRIED = ["w", "half", "double", "scalar"]


class Rounds:
    """One client's rounds: what it would send, what of it arrives, and what stays."""

    def __init__(self, folder: Path, encoding: Encoding = COARSE, specs: Sequence[TensorSpec] = SPECS) -> None:
        self.folder, self.encoding, self.specs = folder, encoding, list(specs)
        self.residual: tuple[str, str] | None = None
        self.number = 0

    def update(self) -> Update:
        generator = torch.Generator().manual_seed(self.number)
        return [(spec, _random(spec, generator)) for spec in self.specs]

    def write(self, tensors: Update, on_decoded: OnDecoded | None) -> Written:
        with (self.folder / "update").open("w+b") as file:
            return write_payload(
                file,
                kind=common_pb2.PAYLOAD_KIND_UPDATE,
                run_id="r",
                round=1,
                model_version=0,
                base_digest=b"b" * 32,
                update=UpdateInfo("a1", num_examples=3),
                tensors=tensors,
                encoding=self.encoding,
                on_decoded=on_decoded,
            )

    def next(self) -> tuple[Update, dict[str, Tensor], FedBack]:
        """A round: its update, what a receiver decodes, what came of the feedback."""
        self.number += 1
        update = self.update()
        path = self.folder / f"a{self.number}.{RESIDUAL}"
        fed_back = write_with_feedback(self.write, list(update), self.residual, path)
        self.residual = (str(path), fed_back.carried[RESIDUAL]) if fed_back.carried else None
        with PayloadReader(self.folder / "update") as reader:
            return update, reader.tensors(), fed_back

    def left(self) -> dict[str, Tensor]:
        assert self.residual is not None
        with SafetensorsReader(Path(self.residual[0])) as reader:
            return {spec.name: reader.tensor(spec.name) for spec in reader.specs}


def _random(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    if spec.dtype == "int64":
        return torch.tensor(7)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return torch.randn(spec.shape, generator=generator).pow(3).to(dtype)


ON = [
    {"kind": "sign"},
    {"kind": "ternary"},
    {"kind": "topk", "fraction": 0.01},
    {"kind": "randomk", "fraction": 0.1, "unbiased": False},
]
OFF = ["auto", "raw", "cast", "uniform", "mask", "fsq", "lrq"]


def test_feedback_is_on_by_itself_for_codes_that_lose_most_and_off_for_the_others() -> None:
    assert [encoding_of(config).wants_feedback for config in ON] == [True] * len(ON)
    assert [encoding_of({"kind": kind}).wants_feedback for kind in OFF] == [False] * len(OFF)
    for kind in ("auto", "uniform", "fsq", "lrq"):
        assert encoding_of({"kind": kind, "feedback": True}).wants_feedback
    assert not encoding_of({"kind": "sign", "feedback": False}).wants_feedback


@pytest.mark.parametrize(
    "encoding",
    [COARSE, FsqConfig(target_error=0.4, feedback=True), *map(encoding_of, ON)],
    ids=lambda encoding: encoding.kind,
)
def test_what_was_decoded_in_all_is_what_was_trained_less_the_last_residual(tmp_path: Path, encoding: Encoding) -> None:
    rounds = Rounds(tmp_path, encoding)
    trained = {name: torch.zeros(()).double() for name in CARRIED}
    arrived = dict(trained)
    for _ in range(8):
        update, decoded, fed_back = rounds.next()
        assert fed_back.problems == []
        for spec, change in update:
            if spec.name in CARRIED:
                trained[spec.name] = trained[spec.name] + change.double()
                arrived[spec.name] = arrived[spec.name] + decoded[spec.name].double()
    left = rounds.left()
    assert list(left) == CARRIED
    for name in CARRIED:
        # Each round rounds once to the tensor's type when it adds and once when it subtracts.
        unit = torch.finfo(left[name].dtype).eps * float(trained[name].abs().max() + 20)
        assert torch.allclose(arrived[name] + left[name].double(), trained[name], atol=16 * unit, rtol=0), name
    assert left["w"].abs().max() > 0.1


def test_without_feedback_the_same_error_is_made_again_and_with_it_not(tmp_path: Path) -> None:
    """A value that a coarse code never sends by itself arrives in the end."""
    spec = TensorSpec("w", (64,), "float32")
    change = torch.full((64,), 0.2)
    change[0] = 1.0

    class Same(Rounds):
        def update(self) -> Update:
            return [(spec, change)]

    rounds = Same(tmp_path, specs=[spec])
    arrived = torch.zeros(64)
    for _ in range(10):
        _, decoded, _ = rounds.next()
        arrived += decoded["w"]
    alone = Same(tmp_path, specs=[spec])
    _, once, _ = alone.next()
    assert once["w"][1:].abs().max() == 0
    assert (arrived[1:] / 10 - 0.2).abs().max() < 0.1


def test_what_is_sent_without_loss_leaves_nothing(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, RawConfig())
    rounds.next()
    assert list(rounds.left()) == CARRIED
    assert all(not values.any() for values in rounds.left().values())


def test_buffers_integers_and_complex_numbers_are_sent_as_they_are(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, RawConfig())
    rounds.next()
    first = rounds.residual
    rounds.encoding = COARSE
    rounds.next()
    assert rounds.residual != first
    update, decoded, _ = rounds.next()
    for spec, change in update:
        if spec.name in ("count", "complex"):
            assert torch.equal(decoded[spec.name], change)
    assert [spec.name for spec in SPECS if has_residual(spec)] == CARRIED


def test_the_same_residual_gives_the_same_bytes_again(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path)
    rounds.next()
    before = rounds.residual
    _, _, first = rounds.next()
    again = tmp_path / "again"
    again.mkdir()
    repeated = Rounds(again)
    repeated.residual, repeated.number = before, 1
    _, _, second = repeated.next()
    assert (second.written.digest, second.carried) == (first.written.digest, first.carried)


def test_a_strided_tensor_is_carried_in_the_order_of_its_coordinates(tmp_path: Path) -> None:
    spec = TensorSpec("w", (4, 3, 5, 5), "float32")
    plain = torch.randn(spec.shape, generator=torch.Generator().manual_seed(1))

    class Strided(Rounds):
        last = plain.to(memory_format=torch.channels_last)

        def update(self) -> Update:
            return [(spec, self.last)]

    class Plain(Strided):
        last = plain

    results = []
    for kind in (Strided, Plain):
        folder = tmp_path / kind.__name__
        folder.mkdir()
        rounds = kind(folder, specs=[spec])
        results.append([rounds.next()[2].carried for _ in range(3)])
    assert results[0] == results[1]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (Path.unlink, "cannot be read: .*No such file"),
        (_truncate, "cannot be read: .*not a usable safetensors file"),
        (_flip, "is damaged"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
    ],
    ids=["gone", "short", "rotten", "empty"],
)
def test_a_damaged_residual_is_left_out_and_named(tmp_path: Path, harm: Callable[[Path], object], reason: str) -> None:
    rounds = Rounds(tmp_path)
    rounds.next()
    assert rounds.residual is not None
    harm(Path(rounds.residual[0]))
    _, _, fed_back = rounds.next()
    [problem] = fed_back.problems
    assert re.search(reason, problem)
    # It was written as if there had never been one, and leaves a good one behind.
    folder = tmp_path / "fresh"
    folder.mkdir()
    fresh = Rounds(folder)
    fresh.number = 1
    _, _, expected = fresh.next()
    assert (fed_back.written.digest, fed_back.carried) == (expected.written.digest, expected.carried)
    assert rounds.next()[2].problems == []


def test_a_residual_of_other_shapes_is_left_out_and_named(tmp_path: Path) -> None:
    rounds = Rounds(tmp_path, specs=[TensorSpec("w", (8, 4), "float32"), TensorSpec("v", (4,), "float32")])
    rounds.next()
    rounds.specs = [TensorSpec("w", (4, 8), "float32"), TensorSpec("v", (4,), "float32")]
    _, _, fed_back = rounds.next()
    assert fed_back.problems == ["the residual is another model's: 'w' has shape (8, 4), expected (4, 8)"]
    assert fed_back.carried


def test_a_sum_beyond_the_tensors_type_does_without_the_residual(tmp_path: Path) -> None:
    specs = [TensorSpec("big", (4,), "float16"), TensorSpec("small", (4,), "float16")]
    update: Update = [(spec, torch.full((4,), value).half()) for spec, value in zip(specs, (6e4, 1.0), strict=True)]

    def write_raw(tensors: Update, on_decoded: OnDecoded | None) -> Written:
        assert on_decoded is not None
        for spec, change in tensors:  # a receiver that gets nothing: all is left
            on_decoded(spec, "none", 0, torch.zeros_like(change))
        return _written(0.5)

    first = write_with_feedback(write_raw, list(update), None, tmp_path / "a1.residual")
    summed = list(update)
    problem = add_residual(summed, tmp_path / "a1.residual", first.carried[RESIDUAL])
    assert problem == "with its residual, tensor 'big' leaves the range of float16"
    assert summed[0][1].tolist() == update[0][1].tolist()
    assert summed[1][1].tolist() == [2.0] * 4


def _written(error: float) -> Written:
    with BytesIO() as file:
        written = write_payload(
            file,
            kind=common_pb2.PAYLOAD_KIND_UPDATE,
            run_id="r",
            round=1,
            model_version=0,
            base_digest=b"b" * 32,
            update=UpdateInfo("a1", num_examples=3),
            tensors=[(TensorSpec("w", (1,), "float32"), torch.ones(1))],
        )
    fidelity = type(written.fidelity)(energy=1.0, product=1.0, squared_error=error)
    return Written(written.digest, written.total_bytes, written.raw_bytes, fidelity, written.codecs)


def test_an_encoding_that_loses_more_than_there_is_carries_nothing(tmp_path: Path) -> None:
    """Two bits rounded at random err by more than a small value is worth; feedback of that would grow without end."""
    noisy = Rounds(tmp_path, UniformConfig(bits=2, rounding="stochastic", block=65536, feedback=True), SPECS[:1])
    _, _, fed_back = noisy.next()
    assert fed_back.written.fidelity.error > 1
    assert fed_back.carried == {}
    assert "lost more than all there was" in fed_back.problems[0]
    assert [path.name for path in tmp_path.iterdir()] == ["update"]


@pytest.mark.parametrize("step", ["write_tile", "finish"])
def test_a_full_disk_costs_the_residual_and_not_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    rounds = Rounds(tmp_path)
    _, _, well = rounds.next()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(leaving.SafetensorsWriter, step, full)
    rounds.number, rounds.residual = 0, None
    _, _, fed_back = rounds.next()
    assert fed_back.written.digest == well.written.digest
    assert fed_back.carried == {}
    assert fed_back.problems == ["the residual cannot be written: [Errno 28] No space left on device"]
    assert not list(tmp_path.glob("*.tmp"))


def test_an_encoding_that_fails_leaves_no_file_behind(tmp_path: Path) -> None:
    def fail(tensors: Update, on_decoded: OnDecoded | None) -> Written:
        raise ValueError("it fails")

    with pytest.raises(ValueError, match="it fails"):
        write_with_feedback(fail, Rounds(tmp_path).update(), None, tmp_path / "new" / "a1.residual")
    assert list((tmp_path / "new").iterdir()) == []


@settings(max_examples=15, deadline=None)
@given(values=st.lists(st.lists(st.integers(-1000, 1000), min_size=5, max_size=5), min_size=1, max_size=6))
def test_a_residual_never_grows_beyond_what_a_two_bit_code_can_lose(
    tmp_path_factory: pytest.TempPathFactory, values: list[list[int]]
) -> None:
    """Rounding to the nearest of -s, 0 and s loses at most half of the largest value, so the residual stays below the largest."""
    spec = TensorSpec("w", (5,), "float32")

    class Given(Rounds):
        def update(self) -> Update:
            return [(spec, torch.tensor(values[self.number - 1], dtype=torch.float32))]

    rounds = Given(tmp_path_factory.mktemp("rounds"), specs=[spec])
    largest = max(abs(value) for row in values for value in row)
    for _ in values:
        rounds.next()
        assert rounds.left()["w"].abs().max() <= 1.02 * largest
