"""The MNIST example's network with two hidden layers, its training step written out: the same step as autograd's up to the order of
sums, in half the time. A round of a benchmark is mostly such steps. Plain SGD is faster still where it does not store gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from examples.mnist.workload import Examples, TwoNN


def _backward(model: nn.Module, batch: Examples) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The mean cross entropy, and of each layer what came back to it, d [batch, outputs], and what it was given, h [batch, inputs]:
    the gradient of its weights is d.t() @ h, that of its bias d.sum(0)."""
    images, labels = batch
    with torch.no_grad():
        w1, b1, w2, b2, w3, b3 = model.parameters()
        x = images.flatten(1)
        h1 = torch.addmm(b1, x, w1.t()).relu_()
        h2 = torch.addmm(b2, h1, w2.t()).relu_()
        log_p = torch.log_softmax(torch.addmm(b3, h2, w3.t()), 1)
        chosen = labels.unsqueeze(1)
        loss = -log_p.gather(1, chosen).mean()
        d3 = log_p.exp_().scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=log_p.dtype)) / len(labels)
        d2 = (d3 @ w3) * (h2 > 0)
        d1 = (d2 @ w2) * (h1 > 0)
        return loss, [(d1, x), (d2, h1), (d3, h2)]


def gradients(model: nn.Module, batch: Examples) -> tuple[Tensor, list[Tensor]]:
    """The mean cross entropy, and its gradients by the model's parameters, in their order; no autograd."""
    loss, layers = _backward(model, batch)
    return loss, [each for d, h in layers for each in (d.t() @ h, d.sum(0))]


class SteppedTwoNN(TwoNN):
    """TwoNN for any optimizer and any objective."""

    def training_step(self, model: nn.Module, batch: Examples, optimizer: Optimizer) -> Tensor:
        """One step of cross entropy."""
        loss, found = gradients(model, batch)
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return loss


class WrittenOutTwoNN(TwoNN):
    """TwoNN for plain SGD."""

    def training_step(self, model: nn.Module, batch: Examples, optimizer: Optimizer) -> Tensor:
        """One step of cross entropy. Raises ValueError for an optimizer that is not plain SGD."""
        (group,) = optimizer.param_groups
        if not isinstance(optimizer, torch.optim.SGD) or group["momentum"] or group["weight_decay"]:
            raise ValueError("this step is that of SGD without momentum and weight decay")
        rate = -group["lr"]
        loss, layers = _backward(model, batch)
        parameters = iter(model.parameters())
        with torch.no_grad():
            for d, h in layers:
                next(parameters).addmm_(d.t(), h, alpha=rate)
                next(parameters).add_(d.sum(0), alpha=rate)
        return loss
