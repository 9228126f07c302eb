"""What a client minimizes besides its workload's loss, and how much work its update stands for.

Both are done where every optimizer step begins, so that they hold for whatever a workload's `training_step` does, gradient
accumulation and several steps a batch included, as long as it steps with the optimizer that it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fed_core.errors import InvalidError
from fed_core.plan import ObjectivePlan


class _Pull(NamedTuple):
    """What a parameter's gradient gains besides the loss's: strength * (parameter - received) + correction."""

    parameter: Tensor
    received: Tensor | None
    correction: Tensor | None


class Objective:
    """A plan's objective, at work on an optimizer until the optimizer is let go of.

    FedProx (Li et al. 2020, https://arxiv.org/abs/1812.06127, equation 2): the gradient of strength / 2 |w - w received|^2 is added
    to that of the loss. Memory: one more copy of the parameters.

    FedNova (Wang et al. 2020, https://arxiv.org/abs/2007.07481, equation 4): the update is to be divided by |a|_1, the sum of the
    coefficients that the gradients have in it. We count the step sizes in, which may change within a round: for SGD with momentum m
    and step sizes n_k, a = sum over k of n_k (1 + m + ... + m^k), k from 0. Weight decay and the proximal term are not counted.

    FedDyn (Acar et al. 2021, https://arxiv.org/abs/2111.04263, algorithm 1): as FedProx, and the site's variate is taken off the
    gradient (variates.py). Memory: two more copies of the parameters.

    SCAFFOLD (Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378, algorithm 1): the common variate is added to the gradient
    and the site's taken off (variates.py). The work behind the update is a of FedNova. Memory: one more copy of the parameters.
    """

    def __init__(
        self,
        plan: ObjectivePlan,
        model: nn.Module,
        optimizer: Optimizer,
        corrections: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`corrections` are added to the gradients, by the names of the model's parameters. Raises InvalidError where the objective
        asks for what the optimizer is not."""
        self._plan = plan
        self._num_steps = 0
        self._share = self._work = 0.0
        if plan.needs_sgd:
            _check_sgd(plan.kind, optimizer)
        named = dict(model.named_parameters(remove_duplicate=False))
        of_parameter = {
            named[name]: correction.to(named[name])
            for name, correction in (corrections or {}).items()
            if correction.any()
        }
        self._pulls = [
            _Pull(parameter, parameter.detach().clone() if plan.strength else None, of_parameter.get(parameter))
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and (plan.strength or parameter in of_parameter)
        ]
        if plan.kind != "plain":
            optimizer.register_step_pre_hook(self._before_step)

    def normalizer(self) -> float:
        """What the update is to be divided by; 0 where it is sent as it is. Raises InvalidError where no step was seen."""
        self._check_steps()
        return self._work if self._plan.kind == "fednova" else 0.0

    def work(self) -> float:
        """What the update says is behind it; 0 where that is not asked for. Raises InvalidError where no step was seen."""
        self._check_steps()
        return self._work if self._plan.kind == "scaffold" else 0.0

    def _check_steps(self) -> None:
        if self._plan.kind != "plain" and not self._num_steps:
            raise InvalidError(
                f"the workload's training_step did not call optimizer.step(), and the objective {self._plan.kind!r} works there; "
                "step with the optimizer, or ask for the plain objective"
            )

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._num_steps += 1
        with torch.no_grad():
            for parameter, received, correction in self._pulls:
                if parameter.grad is None:
                    if correction is None:
                        continue
                    # The loss does not depend on it in this step; what it is corrected by does not know that.
                    parameter.grad = torch.zeros_like(parameter)
                if received is not None:
                    parameter.grad.add_(parameter.sub(received).mul_(self._plan.strength))
                if correction is not None:
                    parameter.grad.add_(correction)
        if self._plan.needs_sgd:
            group = optimizer.param_groups[0]
            self._share = group["momentum"] * self._share + 1.0
            self._work += group["lr"] * self._share


def _check_sgd(kind: str, optimizer: Optimizer) -> None:
    groups = optimizer.param_groups
    is_plain = isinstance(optimizer, torch.optim.SGD) and all(
        not group["nesterov"] and not group["dampening"] and group["momentum"] == groups[0]["momentum"]
        for group in groups
    )
    if not is_plain:
        raise InvalidError(
            f"the objective {kind!r} needs torch.optim.SGD without nesterov and dampening and with one momentum; the workload's "
            f"optimizer() made {type(optimizer).__name__}"
        )
