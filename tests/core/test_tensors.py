"""Named tensors of a model: order, aliases, loading, differences, finiteness."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fed_core.errors import InvalidError, NotFiniteError, PayloadError
from fed_core.specs import DTYPES, TensorSpec, is_floating
from fed_core.tensors import (
    apply_difference,
    check_finite,
    difference,
    dtype_name,
    load_tensors,
    model_specs,
    model_tensors,
    torch_dtype,
)

FLOATING = [name for name in DTYPES if is_floating(name)]


class Tied(nn.Module):
    """An encoder and a decoder that share a matrix, with a norm that has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight


def test_every_dtype_name_is_torchs_and_has_its_size() -> None:
    for name, size in DTYPES.items():
        assert dtype_name(torch_dtype(name)) == name
        assert torch_dtype(name).itemsize == size
        assert is_floating(name) == (torch_dtype(name).is_floating_point or torch_dtype(name).is_complex)


def test_an_unknown_dtype_is_refused_both_ways() -> None:
    with pytest.raises(PayloadError, match="expected one of float32"):
        torch_dtype("float8_e5m2")
    with pytest.raises(PayloadError, match="float8_e5m2 cannot be sent"):
        dtype_name(torch.float8_e5m2)


def test_tied_weights_are_listed_once_in_state_dict_order() -> None:
    specs = model_specs(Tied())
    assert [(spec.name, spec.role) for spec in specs] == [
        ("encoder.weight", "parameter"),
        ("norm.weight", "parameter"),
        ("norm.bias", "parameter"),
        ("norm.running_mean", "buffer"),
        ("norm.running_var", "buffer"),
        ("norm.num_batches_tracked", "buffer"),
        ("decoder.bias", "parameter"),
    ]
    assert specs[5] == TensorSpec("norm.num_batches_tracked", (), "int64", "buffer")


def test_two_parameters_over_one_storage_are_one_tensor_too() -> None:
    model = Tied()
    model.decoder.weight = nn.Parameter(model.encoder.weight.data)
    assert "decoder.weight" not in model_tensors(model)


def test_empty_tensors_are_not_mistaken_for_aliases() -> None:
    model = nn.ParameterDict({"a": nn.Parameter(torch.empty(0)), "b": nn.Parameter(torch.empty(0))})
    assert list(model_tensors(model)) == ["a", "b"]


def test_tensors_are_views_of_the_model_without_gradient() -> None:
    model = Tied()
    weight = model_tensors(model)["encoder.weight"]
    assert weight.data_ptr() == model.encoder.weight.data_ptr()
    assert not weight.requires_grad


def test_a_model_with_extra_state_is_refused_by_name() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"scale": 1}

        def set_extra_state(self, state: object) -> None:
            pass

    with pytest.raises(InvalidError, match="_extra_state"):
        model_tensors(Extra(1, 1))


def test_loading_copies_in_place_and_reaches_aliases() -> None:
    model = Tied()
    before = model.encoder.weight
    values = {name: torch.ones_like(tensor) for name, tensor in model_tensors(model).items()}
    load_tensors(model, values)
    assert model.encoder.weight is before
    assert torch.equal(model.decoder.weight, torch.ones(3, 3))
    assert int(model.norm.num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("encoder.weight", None, "'encoder.weight' is missing"),
        ("surprise", torch.zeros(1), "'surprise' is not expected"),
        ("encoder.weight", torch.zeros(2, 3), r"shape \(2, 3\), expected \(3, 3\)"),
        ("encoder.weight", torch.zeros(3, 3, dtype=torch.float64), "dtype float64, expected float32"),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(name: str, value: Tensor | None, complaint: str) -> None:
    model = Tied()
    values = {key: torch.zeros_like(tensor) for key, tensor in model_tensors(model).items()}
    values.pop(name, None)
    if value is not None:
        values[name] = value
    before = {key: tensor.clone() for key, tensor in model_tensors(model).items()}
    with pytest.raises(InvalidError, match=complaint):
        load_tensors(model, values)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model_tensors(model).items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_difference_keeps_the_dtype(dtype: str) -> None:
    local, received = (torch.tensor(values).to(torch_dtype(dtype)) for values in ([1, 0, 1], [0, 0, 1]))
    result = difference(local, received)
    assert result.dtype == local.dtype
    expected = [1, 0, 0] if is_floating(dtype) else [1, 0, 1]
    assert torch.equal(result, torch.tensor(expected).to(torch_dtype(dtype)))


def test_halves_subtract_in_float32_and_round_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        local, received = (torch.randn(1000, generator=generator).to(dtype) for _ in range(2))
        assert torch.equal(
            difference(local, received), (local.double() - received.double()).to(torch.float32).to(dtype)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_applying_a_difference_gives_the_local_value_where_sums_are_exact(dtype: str) -> None:
    local, received = (torch.tensor(values).to(torch_dtype(dtype)) for values in ([3, 0, 1, 5], [0, 2, 1, 4]))
    result = apply_difference(received, difference(local, received))
    assert result.dtype == local.dtype
    assert torch.equal(result, local)


def test_applied_halves_add_in_float32_and_round_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        received, change = (torch.randn(1000, generator=generator).to(dtype) for _ in range(2))
        expected = (received.double() + change.double()).to(torch.float32).to(dtype)
        assert torch.equal(apply_difference(received, change), expected)


def test_a_counter_in_a_difference_is_its_new_value() -> None:
    for kind in (torch.int64, torch.bool, torch.uint8):
        change = torch.tensor([1, 0]).to(kind)
        assert apply_difference(torch.tensor([0, 1]).to(kind), change).equal(change)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 500, 999])
def test_a_value_that_is_not_finite_is_found_and_its_tensor_named(dtype: str, bad: float, position: int) -> None:
    tensor = torch.ones(1000, dtype=torch_dtype(dtype))
    check_finite("layer.weight", tensor)
    tensor[position] = bad
    with pytest.raises(NotFiniteError, match=r"'layer.weight' holds 1 value.*of "):
        check_finite("layer.weight", tensor)


def test_an_imaginary_part_that_is_not_finite_is_found() -> None:
    with pytest.raises(NotFiniteError):
        check_finite("w", torch.tensor([complex(0, float("inf"))]).conj())


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_scalar_and_extreme_tensors_are_finite(dtype: str) -> None:
    kind = torch_dtype(dtype)
    check_finite("w", torch.zeros(0, 3, dtype=kind))
    check_finite("w", torch.zeros((), dtype=kind))
    if kind.is_floating_point:
        check_finite("w", torch.full((9,), torch.finfo(kind).max, dtype=kind))
