"""safetensors files by tiles: the library's format both ways, any order, hostile headers."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fed_core import safetensors_tiles
from fed_core.errors import InvalidError, PayloadError
from fed_core.safetensors_tiles import SafetensorsReader, SafetensorsWriter, tensors_digest
from fed_core.specs import BUFFER, DTYPES, TensorSpec
from fed_core.tensors import dtype_name, torch_dtype

# What the library and the format know by the same name.
SHARED_DTYPES = [dtype for dtype in DTYPES if dtype != "complex128"]


def values(dtype: str, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Any bits that are a value of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    num_bytes = torch.Size(shape).numel() * DTYPES[dtype]
    data = torch.randint(0, 2 if dtype == "bool" else 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return data.view(torch_dtype(dtype)).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    """NaN differs from itself; its bytes do not."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> list[TensorSpec]:
    specs = [TensorSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in tensors.items()]
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, specs, metadata)
        for name, tensor in tensors.items():
            writer.write_tile(name, 0, tensor)
        writer.finish()
    return specs


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_the_library_reads_every_dtype_that_we_write(path: Path) -> None:
    # In an order in which neighbours would not be aligned.
    names = sorted(SHARED_DTYPES, key=lambda dtype: DTYPES[dtype])
    tensors = {name: values(name, (3, 5)) for name in names}
    write(path, tensors, {"run_id": "r1"})
    loaded = load_file(path)
    assert {name: bits(tensor) for name, tensor in loaded.items()} == {name: bits(t) for name, t in tensors.items()}
    assert all(loaded[name].dtype == tensors[name].dtype and loaded[name].shape == (3, 5) for name in names)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"run_id": "r1"}


def test_we_read_every_dtype_that_the_library_writes(path: Path) -> None:
    tensors = {name: values(name, (3, 5)) for name in SHARED_DTYPES}
    save_file(tensors, path, {"run_id": "r1"})
    with SafetensorsReader(path) as reader:
        assert {spec.name: (spec.dtype, spec.shape) for spec in reader.specs} == {n: (n, (3, 5)) for n in SHARED_DTYPES}
        assert {name: bits(reader.tensor(name)) for name in tensors} == {name: bits(t) for name, t in tensors.items()}
        assert reader.metadata == {"run_id": "r1"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (7,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_makes_the_round_trip(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    tensor = values(dtype, shape)
    specs = write(path, {"before": values("bool", (3,)), "x": tensor})
    with SafetensorsReader(path) as reader:
        assert list(reader.specs) == specs
        found = reader.tensor("x")
    assert (found.dtype, found.shape, bits(found)) == (tensor.dtype, tensor.shape, bits(tensor))


def test_complex128_is_pairs_of_float64_to_the_library(path: Path) -> None:
    tensor = values("complex128", (2, 3))
    write(path, {"x": tensor})
    assert bits(load_file(path)["x"]) == bits(torch.view_as_real(tensor))


def test_specs_keep_the_order_of_the_model_and_the_roles(path: Path) -> None:
    specs = [
        TensorSpec("z", (1,), "bool", BUFFER),
        TensorSpec("ü \n", (2,), "float64"),
        TensorSpec("a", (), "int8", BUFFER),
        TensorSpec("m", (3,), "float16"),
    ]
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, specs)
        for spec in specs:
            writer.write_tile(spec.name, 0, torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype)))
        writer.finish()
    with SafetensorsReader(path) as reader:
        assert list(reader.specs) == specs
        assert reader.metadata == {}


def test_a_model_without_tensors_is_a_file_too(path: Path) -> None:
    write(path, {}, {"empty": "yes"})
    assert load_file(path) == {}
    with SafetensorsReader(path) as reader:
        assert reader.specs == ()
    assert tensors_digest(path) == blake3().digest()


def test_data_begin_on_a_multiple_of_eight(path: Path) -> None:
    for length in range(1, 9):
        write(path, {"x" * length: torch.zeros(1)})
        (header,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert header % 8 == 0


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, 99)), order=st.randoms(use_true_random=False), dtype=st.sampled_from(list(DTYPES)))
def test_tiles_may_be_of_any_size_and_come_in_any_order(path: Path, cuts: set[int], order: object, dtype: str) -> None:
    tensor = values(dtype, (10, 10))
    flat = tensor.reshape(-1)
    tiles = list(zip([0, *sorted(cuts)], [*sorted(cuts), 100], strict=True))
    order.shuffle(tiles)  # type: ignore[attr-defined]
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, [TensorSpec("x", (10, 10), dtype), TensorSpec("y", (3,), "float32")])
        writer.write_tile("y", 0, torch.ones(3))
        for begin, end in tiles:
            writer.write_tile("x", begin, flat[begin:end])
        writer.finish()
    with SafetensorsReader(path) as reader:
        for begin, end in tiles:
            assert bits(reader.read_tile("x", begin, end - begin)) == bits(flat[begin:end])
        assert bits(reader.tensor("x")) == bits(tensor)


def test_a_tile_may_lie_in_memory_in_another_order(path: Path) -> None:
    tensor = values("complex64", (4, 6))
    write(path, {"t": tensor.t(), "c": tensor.conj(), "s": tensor[:, ::2]})
    with SafetensorsReader(path) as reader:
        assert bits(reader.tensor("t")) == bits(tensor.t())
        assert bits(reader.tensor("c")) == bits(tensor.conj().resolve_conj())
        assert bits(reader.tensor("s")) == bits(tensor[:, ::2])


def test_a_tile_is_read_into_the_memory_that_is_given(path: Path) -> None:
    write(path, {"x": torch.arange(10.0)})
    out = torch.full((8,), -1.0)
    with SafetensorsReader(path) as reader:
        tile = reader.read_tile("x", 3, 4, out)
    assert tile.data_ptr() == out.data_ptr()
    assert out.tolist() == [3.0, 4.0, 5.0, 6.0, -1.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    "out",
    [torch.zeros(3), torch.zeros(4, dtype=torch.float64), torch.zeros(2, 4), torch.zeros(8)[::2]],
    ids=["short", "another dtype", "two dimensions", "strided"],
)
def test_memory_that_does_not_fit_is_refused(path: Path, out: Tensor) -> None:
    write(path, {"x": torch.arange(10.0)})
    with SafetensorsReader(path) as reader, pytest.raises(InvalidError, match="`out` for 4 elements"):
        reader.read_tile("x", 3, 4, out)


@pytest.mark.parametrize(("first", "count"), [(0, 11), (10, 1), (-1, 2), (3, -1), (2**70, 1)])
def test_a_tile_outside_the_tensor_is_refused(path: Path, first: int, count: int) -> None:
    write(path, {"x": torch.arange(10.0)})
    with SafetensorsReader(path) as reader, pytest.raises(InvalidError, match="there is no tile"):
        reader.read_tile("x", first, count)


def test_a_writer_refuses_what_the_file_has_no_place_for(path: Path) -> None:
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, [TensorSpec("x", (4,), "float32")])
        writer.write_tile("x", 1, torch.ones(2))
        with pytest.raises(InvalidError, match="no tensor 'y'"):
            writer.write_tile("y", 0, torch.ones(1))
        with pytest.raises(InvalidError, match="'x' is float32; a tile came as float64"):
            writer.write_tile("x", 0, torch.ones(1, dtype=torch.float64))
        with pytest.raises(InvalidError, match="no tile of 2 at 3"):
            writer.write_tile("x", 3, torch.ones(2))
        for first, count in ((0, 2), (2, 2), (1, 1), (0, 4)):
            with pytest.raises(InvalidError, match="were written before"):
                writer.write_tile("x", first, torch.ones(count))


@pytest.mark.parametrize(("written", "gap"), [([], 0), ([(0, 2)], 2), ([(1, 3)], 0), ([(0, 1), (2, 2)], 1)])
def test_an_unfinished_file_is_refused_with_the_first_gap(path: Path, written: list[tuple[int, int]], gap: int) -> None:
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, [TensorSpec("x", (4,), "float32")])
        for first, count in written:
            writer.write_tile("x", first, torch.ones(count))
        with pytest.raises(InvalidError, match=f"element {gap} was not written"):
            writer.finish()


@pytest.mark.parametrize("names", [["x", "x"], ["__metadata__"]])
def test_names_that_a_file_cannot_tell_apart_are_refused(path: Path, names: list[str]) -> None:
    with path.open("wb") as file, pytest.raises(InvalidError, match="names that differ"):
        SafetensorsWriter(file, [TensorSpec(name, (1,), "float32") for name in names])


def test_the_digest_is_over_the_bytes_in_the_order_of_the_model(path: Path) -> None:
    tensors = {"b": values("bool", (3,)), "w": values("float32", (600_000,)), "s": values("float64", ())}
    write(path, tensors, {"version": "1"})
    expected = blake3(b"".join(bits(tensor) for tensor in tensors.values())).digest()
    with SafetensorsReader(path) as reader:
        assert tensors_digest(path) == tensors_digest(reader) == expected


def test_memory_does_not_grow_with_the_tensor(path: Path) -> None:
    tile, num_tiles = torch.ones(2**14), 256
    tracemalloc.start()
    with path.open("wb") as file:
        writer = SafetensorsWriter(file, [TensorSpec("x", (num_tiles, 2**14), "float32")])
        for index in reversed(range(num_tiles)):
            writer.write_tile("x", index * 2**14, tile)
        writer.finish()
    tensors_digest(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 2**20 < path.stat().st_size


# Hostile files

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "complaint"),
    [
        (b"", b"", "not JSON"),
        (b"\xff\xff", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', b"", "not JSON"),
        ([], b"", "not a JSON object"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ is not"),
        ({"__metadata__": []}, b"", "__metadata__ is not"),
        ({"__metadata__": {"fedstream.buffers": "[1]"}}, b"", "not a list of names"),
        ({"__metadata__": {"fedstream.buffers": "["}}, b"", "is not JSON"),
        (b'{"x":1,"x":2}', b"", "has a name twice"),
        ({"x": 1}, b"", "needs a dtype, a shape"),
        ({"x": {**ENTRY, "extra": 1}}, bytes(8), "nothing else"),
        ({"x": {"dtype": "F32", "shape": [2]}}, bytes(8), "needs a dtype, a shape"),
        ({"x": {**ENTRY, "data_offsets": [0]}}, bytes(8), "two data_offsets"),
        ({"x": {**ENTRY, "dtype": "F4"}}, bytes(8), "has dtype 'F4'; expected one of F32"),
        ({"x": {**ENTRY, "shape": [-2]}}, bytes(8), "not a whole number"),
        ({"x": {**ENTRY, "shape": [2.0]}}, bytes(8), "not a whole number"),
        ({"x": {**ENTRY, "shape": [True, 2]}}, bytes(8), "not a whole number"),
        ({"x": {**ENTRY, "shape": [float("nan")]}}, bytes(8), "not a whole number"),
        ({"x": {**ENTRY, "shape": [3]}}, bytes(8), "needs 12 bytes, its offsets span 8"),
        ({"x": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8), "its offsets span -8"),
        ({"x": {**ENTRY, "shape": [2**32, 2**32]}}, bytes(8), "or 274877906944 elements"),
        ({"x": {**ENTRY, "shape": [0, 2**62]}}, bytes(8), "or 274877906944 elements"),
        ({"x": {**ENTRY, "shape": [1] * 10}}, bytes(8), "more than 8 dimensions"),
        ({"": ENTRY}, bytes(8), "not text of 1 to 512 bytes"),
        ({"x" * 513: ENTRY}, bytes(8), "not text of 1 to 512 bytes"),
        (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "not text of 1 to 512 bytes"),
        ({"x": ENTRY}, bytes(7), "the file has"),
        ({"x": ENTRY}, bytes(9), "the file has"),
        ({"x": ENTRY, "y": ENTRY}, bytes(8), "begins at byte 0 of the data, expected 8"),
        ({"x": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12), "begins at byte 4 of the data, expected 0"),
    ],
)
def test_a_header_that_breaks_a_rule_is_refused_by_name(
    path: Path, header: object, data: bytes, complaint: str
) -> None:
    write_raw(path, header, data)
    with pytest.raises(PayloadError, match=r"model\.safetensors is not a usable safetensors file") as caught:
        SafetensorsReader(path)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 9) + b"{}", struct.pack("<Q", 2**63) + b"{}"])
def test_a_length_that_the_file_does_not_have_is_refused_before_anything_is_read(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(PayloadError, match="bytes"):
        SafetensorsReader(path)


def test_too_many_tensors_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, {"x": torch.ones(1), "y": torch.ones(1)})
    monkeypatch.setattr(safetensors_tiles, "MAX_TENSORS", 1)
    with pytest.raises(PayloadError, match="at most 1 are allowed"):
        SafetensorsReader(path)


def test_a_bool_that_is_neither_true_nor_false_is_refused(path: Path) -> None:
    write_raw(path, {"x": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\0\1\2")
    with SafetensorsReader(path) as reader:
        assert reader.read_tile("x", 0, 2).tolist() == [False, True]
        with pytest.raises(PayloadError, match="other than 0 and 1"):
            reader.tensor("x")


def test_a_file_that_is_cut_short_while_open_is_noticed(path: Path) -> None:
    write(path, {"x": torch.ones(100)})
    with SafetensorsReader(path) as reader:
        with path.open("rb+") as file:
            file.truncate(200)
        with pytest.raises(PayloadError, match="ends at byte 200"):
            reader.tensor("x")


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), length=st.integers(0, 10_000))
def test_flipped_and_missing_bytes_are_our_error_or_a_readable_file(
    path: Path, position: int, value: int, length: int
) -> None:
    write(path, {"w": torch.ones(4, 3), "b": torch.tensor([True, False]), "c": torch.ones(2, dtype=torch.complex128)})
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data[: max(length % (2 * len(data)), 1)])
    try:
        with SafetensorsReader(path) as reader:
            for spec in reader.specs:
                reader.tensor(spec.name)
    except PayloadError:
        pass
