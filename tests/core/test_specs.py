"""Specs travel unchanged, hostile ones are refused by name, and a fingerprint tells lists apart."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed_core import specs
from fed_core.errors import PayloadError
from fed_core.payload.limits import MAX_DIMENSIONS, MAX_NAME_BYTES
from fed_core.specs import DTYPES, TensorSpec, explain_difference, fingerprint
from fedstream.v1 import common_pb2

SPECS = st.builds(
    TensorSpec,
    name=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40),
    shape=st.lists(st.integers(0, 9), max_size=MAX_DIMENSIONS).map(tuple),
    dtype=st.sampled_from(sorted(DTYPES)),
    role=st.sampled_from(["parameter", "buffer"]),
)


def test_every_dtype_of_the_contract_has_a_size_and_back() -> None:
    assert {f"DTYPE_{name.upper()}" for name in DTYPES} | {"DTYPE_UNSPECIFIED"} == set(common_pb2.Dtype.keys())


@given(SPECS)
def test_a_spec_survives_the_trip(spec: TensorSpec) -> None:
    wire = specs.to_proto(spec).SerializeToString()
    assert specs.from_proto(common_pb2.TensorSpec.FromString(wire)) == spec


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": ""}, "0 bytes"),
        ({"name": "é" * (MAX_NAME_BYTES // 2) + "x"}, "513 bytes"),
        ({"shape": [1] * (MAX_DIMENSIONS + 1)}, "9 dimensions"),
        ({"shape": [2, -1]}, "negative dimension -1"),
        ({"shape": [2**20, 2**20]}, "at most 274877906944 elements"),
        ({"shape": [0, 2**62, 2**62]}, "at most 274877906944 elements"),
        ({"dtype": 99}, "unknown dtype 99"),
        ({"dtype": 0}, "unknown dtype 0"),
        ({"role": 0}, "unknown role 0"),
    ],
)
def test_a_spec_that_breaks_a_rule_is_refused_by_name(change: dict[str, object], complaint: str) -> None:
    fields: dict[str, object] = {"name": "w", "shape": [2], "dtype": 1, "role": 1}
    with pytest.raises(PayloadError, match=complaint):
        specs.from_proto(common_pb2.TensorSpec(**(fields | change)))  # type: ignore[arg-type]


def test_the_longest_name_and_the_most_dimensions_are_taken() -> None:
    spec = TensorSpec("x" * MAX_NAME_BYTES, (1,) * MAX_DIMENSIONS, "int8")
    assert specs.from_proto(specs.to_proto(spec)) == spec


@pytest.mark.parametrize("spec", [TensorSpec("w", (), "float8_e5m2"), TensorSpec("w", (), "int8", "gradient")])
def test_what_has_no_place_in_the_contract_is_not_sent(spec: TensorSpec) -> None:
    with pytest.raises(PayloadError, match="'w'"):
        specs.to_proto(spec)


@given(st.lists(SPECS, max_size=4), st.lists(SPECS, max_size=4))
def test_fingerprints_are_equal_exactly_where_the_lists_are(one: list[TensorSpec], other: list[TensorSpec]) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (one == other)
    assert len(fingerprint(one)) == 32


def test_neighbouring_fields_cannot_trade_bytes() -> None:
    one = [TensorSpec("a", (1, 2), "int8"), TensorSpec("b", (), "int8")]
    other = [TensorSpec("a", (1,), "int8"), TensorSpec("b", (2,), "int8")]
    assert fingerprint(one) != fingerprint(other)


@given(st.lists(SPECS, max_size=4), st.lists(SPECS, max_size=4))
def test_a_difference_is_explained_exactly_where_there_is_one(one: list[TensorSpec], other: list[TensorSpec]) -> None:
    assert bool(explain_difference(one, other)) == (one != other or len({spec.name for spec in other}) != len(other))


def test_a_difference_names_what_is_missing_extra_and_changed() -> None:
    expected = [
        TensorSpec("a", (2,), "float32"),
        TensorSpec("b", (3,), "float32"),
        TensorSpec("c", (), "int64", "buffer"),
    ]
    actual = [TensorSpec("b", (4,), "float16"), TensorSpec("c", (), "int64"), TensorSpec("d", (), "int8")]
    assert explain_difference(expected, actual) == (
        "'a' is missing; 'd' is not expected; 'b' has shape (4,), expected (3,); 'b' has dtype float16, expected float32; "
        "'c' has role parameter, expected buffer"
    )


def test_a_long_explanation_ends_with_a_count() -> None:
    expected = [TensorSpec(f"w{index}", (), "int8") for index in range(8)]
    assert explain_difference(expected, []).endswith("'w4' is missing; and 3 more")


def test_the_daemons_half_of_the_payload_needs_no_torch() -> None:
    modules = "fed_core.specs fed_core.payload.manifest fed_core.payload.verify fed_core.payload.frames fed_core.payload.limits"
    code = f"import sys, {', '.join(modules.split())}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
