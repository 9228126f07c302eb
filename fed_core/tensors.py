"""Named tensors of a model: list them, describe them, load them, take differences.

The order is that of the state dict, and a tensor that two names share (tied weights) is listed once, under its first name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from fed_core.errors import InvalidError, NotFiniteError, PayloadError
from fed_core.specs import BUFFER, DTYPES, PARAMETER, TensorSpec, explain_difference

_TORCH_DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in DTYPES}
_NAMES: Final[dict[torch.dtype, str]] = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a name in `DTYPES`. Raises PayloadError for any other name."""
    if name not in _TORCH_DTYPES:
        raise PayloadError(f"unknown dtype {name!r}; expected one of {', '.join(DTYPES)}")
    return _TORCH_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a torch dtype. Raises PayloadError for one that a payload cannot hold."""
    if dtype not in _NAMES:
        raise PayloadError(f"{dtype} cannot be sent; expected one of {', '.join(DTYPES)}")
    return _NAMES[dtype]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers in state-dict order, tied aliases once: detached views, nothing is copied.

    Raises InvalidError for an entry of the state dict that is not a dense tensor (a module's extra state).
    """
    seen: set[object] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise InvalidError(f"{name!r} in the model's state dict is not a dense tensor and cannot be shared")
        # Memory tells aliases better than identity: two Parameters may wrap one storage. No memory (empty, meta): identity.
        memory = value.data_ptr()
        alias: object = (memory, value.dtype, value.shape, value.stride()) if memory else id(value)
        if alias not in seen:
            seen.add(alias)
            tensors[name] = value.detach()
    return tensors


def model_specs(model: nn.Module) -> list[TensorSpec]:
    """Specs of `model_tensors(model)`, in the same order."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [
        TensorSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype), PARAMETER if name in parameters else BUFFER)
        for name, tensor in model_tensors(model).items()
    ]


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies values into the model in place. Raises InvalidError, before anything changes, unless names, shapes and dtypes fit."""
    targets = model_tensors(model)
    expected, actual = (
        [TensorSpec(name, tuple(tensor.shape), dtype_name(tensor.dtype)) for name, tensor in side.items()]
        for side in (targets, tensors)
    )
    if set(expected) != set(actual):
        raise InvalidError(f"these tensors are not this model's: {explain_difference(expected, actual)}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def difference(local: Tensor, received: Tensor) -> Tensor:
    """What an update holds for one tensor: local - received, in the tensor's own dtype.

    float16 and bfloat16 subtract in float32 and round once. An integer or bool tensor has no meaningful difference: its local
    value itself is returned, not a copy.
    """
    if not (local.is_floating_point() or local.is_complex()):
        return local
    if local.dtype in (torch.float16, torch.bfloat16):
        return (local.float() - received.float()).to(local.dtype)
    return local - received


def apply_difference(received: Tensor, change: Tensor) -> Tensor:
    """The inverse of `difference`: received + change, rounded once to the tensor's dtype; an integer or bool tensor is the change
    itself.

    Every side that reconstructs a model does it through this function: one elementwise addition has the same bits on every CPU.
    """
    if not (received.is_floating_point() or received.is_complex()):
        return change
    if received.dtype in (torch.float16, torch.bfloat16):
        return (received.float() + change.float()).to(received.dtype)
    return received + change


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises NotFiniteError naming the tensor where it holds NaN or infinity. One pass, no temporary of its size."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # The extremes are finite exactly where all is: NaN passes through both, an infinity is one of them.
    if not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):
        num_bad = int((~tensor.isfinite()).sum())
        raise NotFiniteError(f"tensor {name!r} holds {num_bad} values that are NaN or infinite, of {tensor.numel()}")
