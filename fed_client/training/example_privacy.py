"""Example-level differential privacy: DP-SGD at a site (Abadi et al. 2016, https://arxiv.org/abs/1607.00133, algorithm 1).

With B the plan's batch size and n the site's number of examples, each example is in a step's batch by an independent coin at
q = min(1, B / n); with g_i the gradient of example i, all parameters together one vector, C the clipping norm and z the noise
multiplier, the optimizer steps along

    (sum over the batch of g_i min(1, C / |g_i|)  +  N(0, z^2 C^2)) / B

whatever the batch holds, nothing included; an example whose gradient is NaN or beyond all reason counts as zero, and does not end
the training, which would give it away. Opacus computes the gradients of the single examples. What differs from the paper and from
Opacus: coins and noise are words of a cipher's key stream, keyed by the operating system's entropy, and not of a seeded generator
of torch, whose CPU version takes 32 bits of a seed; and gradients are clipped and rounded toward zero to the grid on which the
noise is drawn, and added up as whole numbers, so that the sensitivity is C exactly and the noise Gaussian up to a computed distance
(fed_core/privacy/clipping.py, noise.py). Opacus' own noise is floating-point, which can be undone (Mironov 2012,
https://doi.org/10.1145/2382196.2382264), and its remedy, secure_mode, needs torchcsprng, which is no longer built.

All is done where an optimizer step begins, before what the plan's objective adds there (objectives.py), which does not depend on
the batch. So a workload's `training_step` runs unchanged, as long as it changes parameters by the optimizer it was given alone,
steps once a batch, has each layer see the examples along the first dimension, and has a loss that is the mean of what the examples
cost one by one; its own clipping of the mean gradient has no effect. A loss that compares examples of a batch gives gradients that
no clipping takes apart, and nothing here can tell.

The number of examples, and with it q and the steps of an epoch, is taken as given: the guarantee hides what an example is, and
whether it is there, from whoever knows how many there are. It is not told to anyone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isnan
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer

from fed_client.training.refusal import CannotDoError
from fed_core.errors import InvalidError
from fed_core.plan import PrivacyPlan
from fed_core.privacy.clipping import clip_factor, max_squared_steps, step_exponent, toward_zero_
from fed_core.privacy.noise import GridGaussian, NoiseStream

# Columns of a gradient of all examples that are widened at once.
_TILE: Final = 2**14
_OPTIMIZERS: Final = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
# What works in place of a layer that does not.
_INSTEAD: Final[Sequence[tuple[type[nn.Module], str]]] = (
    (_BatchNorm, "GroupNorm or LayerNorm, which do not mix examples"),
    (_InstanceNorm, "the same layer with track_running_stats=False"),
    (nn.LSTM, "opacus.layers.DPLSTM"),
    (nn.GRU, "opacus.layers.DPGRU"),
    (nn.RNN, "opacus.layers.DPRNN"),
    (nn.MultiheadAttention, "opacus.layers.DPMultiheadAttention"),
)


class ExampleNoise:
    """Clips the gradients of single examples and adds noise, at every step of an optimizer, until `close`.

    Memory: the gradients of all parameters times the examples of a batch, and a tile."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        plan: PrivacyPlan,
        batch_size: int,
        stream: NoiseStream | None = None,
    ) -> None:
        """The model is in training mode and as it will be trained; `stream` is for tests. Raises CannotDoError where Opacus is not
        installed, and for models, optimizers and devices that this cannot be done with."""
        if type(optimizer) not in _OPTIMIZERS:
            raise CannotDoError(
                f"DP-SGD works with torch's SGD, Adam and AdamW; the workload's optimizer() made {type(optimizer).__name__}"
            )
        self._parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad
        ]
        if any(parameter.device.type == "mps" for parameter in self._parameters):
            raise CannotDoError("DP-SGD adds up 64-bit numbers, which the device mps does not have; set --device cpu")
        if any(parameter.is_complex() for parameter in self._parameters):
            raise CannotDoError("DP-SGD has no gradients of single examples for complex parameters")
        self._norm, self._batch_size = plan.clipping_norm, batch_size
        sigma = plan.noise_multiplier * plan.clipping_norm
        self._exponent = step_exponent(sigma)
        self._most_steps = max_squared_steps(plan.clipping_norm, self._exponent)
        self._gaussian = GridGaussian(sigma * 2.0**-self._exponent)
        self._stream = stream or NoiseStream()
        self._size, self._may_step = 0, False
        self._optimizer = optimizer
        self._hooks = _per_example_hooks(model)
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    def batches(self, num_examples: int, rate: float, num_steps: int, num_epochs: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (epoch from 0, indices of a batch), `num_steps` times; an epoch is as many steps as its share of them. Each of the
        examples is in a batch with chance `rate`."""
        # Rounded down: no example is in more often than is accounted for.
        threshold = np.uint64(min(int(rate * 2**64), 2**64 - 1))
        for step in range(num_steps):
            words = self._stream.words(num_examples)
            is_in = words < threshold if rate < 1 else np.ones(num_examples, bool)
            yield step * num_epochs // num_steps, torch.from_numpy(np.flatnonzero(is_in))

    @contextmanager
    def batch(self, size: int) -> Iterator[None]:
        """Around the training step on a batch of so many examples, 1 or more. Raises CannotDoError where it was not one step."""
        self._size, self._may_step = size, True
        with warnings.catch_warnings():
            # Of torch, for the hooks of a first layer; what they miss is the gradient of the inputs.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
        if self._may_step:
            raise CannotDoError(
                "the workload's training_step did not call optimizer.step(); DP-SGD is accounted for one step a batch"
            )

    def empty_batch(self) -> None:
        """The step on a batch that no example is in: noise alone."""
        self._size, self._may_step = 0, True
        self._optimizer.zero_grad()
        self._optimizer.step()

    def close(self) -> None:
        """Lets go of the model and the optimizer."""
        self._handle.remove()
        self._hooks.cleanup()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(each is not None for each in (*args[1:], *kwargs.values())):
            raise CannotDoError("DP-SGD needs optimizer.step() without a closure, which would bring gradients anew")
        if not self._may_step:
            raise CannotDoError(
                "the workload's training_step called optimizer.step() more than once; DP-SGD is accounted for one step a batch"
            )
        self._may_step = False
        samples = [self._take_sample(parameter) for parameter in self._parameters]
        with torch.no_grad():
            factors = self._factors(samples)
            squared = torch.zeros(self._size, dtype=torch.float64)
            for parameter, sample in zip(self._parameters, samples, strict=True):
                parameter.grad = self._noisy_mean(parameter, sample, factors, squared)
        if self._size and float(squared.max()) > self._most_steps:
            raise InvalidError("the clipped gradient of an example is longer than the clipping norm")

    def _take_sample(self, parameter: Tensor) -> Tensor | None:
        """The gradients of the examples, [batch, coordinates]; None where the loss does not depend on the parameter."""
        sample: Any = getattr(parameter, "grad_sample", None)
        parameter.grad_sample = None  # type: ignore[attr-defined]
        if sample is None:
            if self._size and parameter.grad is not None and bool(parameter.grad.any()):
                raise CannotDoError("a parameter has a gradient that Opacus does not know by example")
            return None
        if isinstance(sample, list):
            raise CannotDoError("the workload's training_step went backward more than once; DP-SGD needs once a batch")
        if len(sample) != self._size:
            raise CannotDoError(
                "a layer of the model does not see the examples along its first dimension; DP-SGD cannot tell them apart there"
            )
        return torch.flatten(sample.detach(), 1)

    def _factors(self, samples: Sequence[Tensor | None]) -> Tensor:
        """What each example's gradient is multiplied with, [batch]."""
        squared = torch.zeros(self._size, dtype=torch.float64)
        for sample in samples:
            for tile in torch.split(sample, _TILE, dim=1) if sample is not None else ():
                wide = tile.double()
                squared += torch.einsum("ij,ij->i", wide, wide).cpu()
        factors = [0.0 if isnan(value) else clip_factor(value, self._norm) for value in squared.tolist()]
        return torch.tensor(factors, dtype=torch.float64)

    def _noisy_mean(self, parameter: Tensor, sample: Tensor | None, factors: Tensor, squared: Tensor) -> Tensor:
        """The parameter's part of the step. Adds the squared lengths of the rounded gradients to `squared`, [batch]."""
        mean = torch.empty(parameter.numel(), dtype=torch.float64)
        scales = (factors * 2.0**-self._exponent).unsqueeze(1)
        is_out = factors == 0  # what is infinite or NaN stays so, whatever it is multiplied with
        for start in range(0, len(mean), _TILE):
            part = mean[start : start + _TILE]
            part.zero_()
            if sample is not None:
                wide = sample[:, start : start + _TILE].double()
                steps = toward_zero_(wide.mul_(scales.to(wide.device)).cpu())
                steps[is_out] = 0
                squared += torch.einsum("ij,ij->i", steps, steps)
                torch.sum(steps, dim=0, out=part)
            self._gaussian.add_to(part, self._stream)
        mean.mul_(2.0**self._exponent / self._batch_size)
        return mean.view(parameter.shape).to(parameter)


def _per_example_hooks(model: nn.Module) -> Any:
    """Opacus' hooks at the model. Raises CannotDoError for layers that it cannot tell examples apart in."""
    try:
        from opacus.grad_sample.grad_sample_module import GradSampleHooks  # type: ignore[import-untyped]
        from opacus.validators import ModuleValidator  # type: ignore[import-untyped]
    except ImportError as error:
        raise CannotDoError(
            f"DP-SGD needs Opacus, which is not installed at this site ({error}): pip install 'fedstream[privacy]'"
        ) from error
    refused = [
        f"{name or 'the model'} ({type(module).__name__}): use {instead}"
        for name, module in model.named_modules()
        for kind, instead in _INSTEAD
        if isinstance(module, kind) and _is_unfit(module)
    ]
    if not refused:
        refused = [str(error) for error in ModuleValidator.validate(model, strict=False)]
    if not refused:
        try:
            return GradSampleHooks(model, loss_reduction="mean", strict=True)
        except NotImplementedError as error:
            refused = [f"{error}: keep what it holds out of layers that are trained"]
    raise CannotDoError(f"DP-SGD cannot train layers of this model: {'; '.join(refused)}")


def _is_unfit(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        # Frozen as well, unless it goes by what it was given.
        return module.training or not module.track_running_stats
    is_trained = any(parameter.requires_grad for parameter in module.parameters())
    return is_trained and (not isinstance(module, _InstanceNorm) or module.track_running_stats)
