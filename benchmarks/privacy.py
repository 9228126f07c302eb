"""What privacy costs: accuracy by epsilon, MNIST with its 539 writers as clients.

    python -m benchmarks.privacy --tune [--mechanisms none fixed ...]       # first
    python -m benchmarks.privacy [--mechanisms none fixed ...] [--epsilons 8 3 1] [--seeds 0 1 2]
    python -m benchmarks.privacy --show

Protected is one writer with all that they wrote, delta 1e-4, 100 rounds, a tenth of the writers a round. The mechanisms:

    none        federated averaging: no clipping, no noise, the mean over who came
    fixed       central, a coin for each writer and round, a fixed clipping norm; amplified by sampling (DP-FedAvg)
    adaptive    the same, the clipping norm follows the median of the updates' norms (Andrew et al. 2021)
    tree        central, noise correlated by the full binary tree
    inverse     by the banded inverse root, 8 bands
    buffered    by the buffered Toeplitz factorization that is best for these rounds (not in the coordinator)
    local       every writer's device adds its own noise, and nobody is trusted

In the last four, writers take turns in ten fixed groups: 10 participations, 10 rounds apart, no amplification. All have the same
model, server optimizer and pieces: fixed edge filters (below), then 24 units, then 10 classes, 9,682 parameters, one epoch in
batches of 32 at a writer, FedAvgM at the coordinator, and an exponential moving average of the versions, which costs no privacy and
is what accuracy is measured of (that of the last version stands beside it).

Everything is in one process. Clipping, grid, noise, factorizations, account, server optimizer and average are the coordinator's
own, on vectors instead of payload files. `check`, which begins every measurement, compares a round of each kind bit by bit with
what the coordinator's PrivateSum releases or a client's device sends, what is declared with what the coordinator would declare, and
the training of many writers at once with a client's.

`--tune` tries at most NUM_TRIALS settings for each mechanism at epsilon 8 and 3, by the same search from the same start, on writers
who are held out (`writers_of`); it ends earlier where no neighbour of the best on the grid is better. The best is for the rows that
follow; epsilon 1 takes that of 3. The trials themselves are not accounted for: who tunes on data that is to be protected pays for
that, too. Accuracy is of the 10,000 test images, written by others. Trials and rows are merged into
benchmarks/results/privacy.json one by one, and those that are there are not measured again: after a change of what is measured,
take them out. The plot is docs/images/privacy.png.

Data: DIR of --data (default: FEDSTREAM_DATA, else ../shared/data beside the repository) holds `mnist` with writers.npz.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.data import Dataset

from benchmarks.records import commit, kept_in
from benchmarks.updates import default_data
from benchmarks.vectors import flat, load_flat, parts
from examples.mnist.workload import Array, Examples, Mnist, examples, load
from fed_client.training.local_privacy import protect
from fed_client.training.loop import train
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import write_payload
from fed_core.plan import OptimizerPlan, PrivacyPlan, TrainingPlan
from fed_core.privacy.accounting import Spend, epsilon, noise_multiplier_for
from fed_core.privacy.banded import BandedInverseRoot, optimize_buffered
from fed_core.privacy.clipping import (
    STD_BITS,
    SquaredNorm,
    clip_factor,
    max_squared_steps,
    squared_steps,
    to_steps,
)
from fed_core.privacy.correlated import Factorization, rms_error
from fed_core.privacy.mechanism import (
    DISTANCE_PER_NUMBER,
    Correlation,
    Everyone,
    Mechanism,
    Poisson,
    central_adaptive,
    central_poisson,
    correlated,
    default_bit_sigma,
    local,
)
from fed_core.privacy.noise import GridGaussian, NoiseStream
from fed_core.privacy.tree import BinaryTree
from fed_core.tensors import model_specs
from fed_core.workload import initial_model
from fed_server.aggregation.private import PrivateNoise, PrivateSum, ReleasedSum, next_clipping_norm
from fed_server.config import parse_run_config
from fed_server.config_privacy import CentralPrivacyConfig
from fed_server.optim.average import blend, decay_at
from fed_server.optim.momentum import Momentum
from fed_server.privacy.mechanisms import FINER_BITS, mechanism_of
from fedstream.v1 import common_pb2

RESULT: Final = Path(__file__).parent / "results" / "privacy.json"
IMAGE: Final = Path(__file__).parents[1] / "docs" / "images" / "privacy.png"
NUM_WRITERS: Final = 539
NUM_ROUNDS: Final = 100
RATE: Final = 0.1
DELTA: Final = 1e-4
NUM_GROUPS: Final = 10
EPSILONS: Final = (8.0, 3.0, 1.0)
TUNED: Final = (8.0, 3.0)
AVERAGE_DECAY: Final = 0.9
QUANTILE: Final = 0.5
QUANTILE_RATE: Final = 0.2
MECHANISMS: Final = ("none", "fixed", "adaptive", "tree", "inverse", "buffered", "local")
WITH_COINS: Final = ("none", "fixed", "adaptive")
WHOLE: Final = ("tree", "inverse", "buffered")
AIMS: Final = {8.0: 2.0, 3.0: 4.0}

NUM_HELD: Final = 54
NUM_TRIALS: Final = 16
TUNING_SEED: Final = 100
BATCH_SIZE: Final = 32


@dataclass(frozen=True)
class Setting:
    """What is tuned. `clipping_norm` is where an adaptive one begins; without privacy it says nothing. `gain` is by how much of a
    mean update the model moves in the end: FedAvgM's learning rate / (1 - momentum)."""

    gain: float = 4.0
    learning_rate: float = 0.2
    clipping_norm: float = 0.25
    momentum: float = 0.9


GRID: Final[dict[str, tuple[float, ...]]] = {
    "gain": (0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
    "learning_rate": (0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
    "clipping_norm": (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0),
    "momentum": (0.0, 0.5, 0.9),
}


@dataclass
class Row:
    """One run. `epsilon` is what was asked for, 0 for no privacy; `spent` what the accountant says of what was done. `setting`,
    `noise_multiplier` and `sigma` (of the last round) are what was declared and drawn. Accuracies in 0..1, of the average after the
    last round and of the last version; `clipped` is the part of updates that were cut, `last_norm` to what in the last round."""

    mechanism: str
    epsilon: float
    seed: int
    setting: dict[str, float]
    noise_multiplier: float
    sigma: float
    spent: float
    accuracy: float
    last_accuracy: float
    clipped: float
    last_norm: float
    seconds: float
    commit: str


# -- data and model ----------------------------------------------------------------------------------------------------


class EdgesNet(Mnist):
    """What is learned: 392 edge features to 24 units to 10 classes, 9,682 parameters."""

    name = "bench-edges"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(392, 24), nn.ELU(), nn.Linear(24, 10))


def edges(images: Tensor) -> Tensor:
    """Images (N, 1, 28, 28) to features (N, 392) of norm sqrt(392): how much edge there is in each of 8 directions at 7 x 7 places.

    Fixed, so no device needs anybody's data for it and it costs no privacy, as in Tramer and Boneh 2021, Differentially private
    learning needs better features, https://arxiv.org/abs/2011.11660 (there wavelets; here the oriented gradients of Dalal and
    Triggs 2005, for they are two small convolutions)."""
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([sobel, sobel.T]).unsqueeze(1)
    angles = torch.arange(8) * (math.pi / 4)
    turns = torch.stack([angles.cos(), angles.sin()], 1)[:, :, None, None]
    made = []
    for some in torch.split(images, 2000):
        slopes = functional.conv2d(some, kernels, padding=1)
        steepness = slopes.norm(dim=1, keepdim=True) + 1e-9
        along = functional.conv2d(slopes, turns).div_(steepness).clamp_(min=0).square_().mul_(steepness)
        pooled = functional.avg_pool2d(along, 6, 4, 1).flatten(1)
        made.append(functional.normalize(pooled) * math.sqrt(pooled.shape[1]))
    return torch.cat(made)


@dataclass(frozen=True)
class Writers:
    """Training examples by writer, padded: `features` (writers, most images, 392), `labels` (writers, most images), `counts`; and
    what accuracy is measured on."""

    features: Tensor
    labels: Tensor
    counts: Tensor
    test: Examples

    def __len__(self) -> int:
        return len(self.counts)


def padded(of_each: Sequence[Examples], test: Examples) -> Writers:
    """The examples of writers who have different numbers of them."""
    counts = torch.tensor([len(labels) for _, labels in of_each])
    features = torch.zeros(len(of_each), int(counts.max()), test[0].shape[1])
    labels = torch.zeros(features.shape[:2], dtype=torch.long)
    for place, (some, digits) in enumerate(of_each):
        features[place, : len(digits)] = some
        labels[place, : len(digits)] = digits
    return Writers(features, labels, counts, test)


def writers_of(data: Path, *, held_out: bool) -> Writers:
    """The training images, and the test images. With `held_out`, NUM_HELD writers drawn with seed 0 do not train, and their images
    are what is measured on instead of the test images."""
    with np.load(data / "mnist" / "writers.npz", allow_pickle=False) as archive:
        numbers: Array = archive["train_writer"]
    people = np.random.default_rng(0).permutation(np.unique(numbers))
    held = people[:NUM_HELD] if held_out else people[:0]
    images, digits = examples(*load(data / "mnist", "train"))
    found = edges(images)
    of_each = [np.flatnonzero(numbers == writer) for writer in people[len(held) :]]
    if held_out:
        measured = np.isin(numbers, held)
        test = found[measured], digits[measured]
    else:
        images, test_digits = examples(*load(data / "mnist", "t10k"))
        test = edges(images), test_digits
    return padded([(found[each], digits[each]) for each in of_each], test)


def shuffled(counts: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Places (writers, most) of each writer's examples in an order of its own, and then those of the padding."""
    order = torch.rand(len(counts), most, generator=generator)
    order[torch.arange(most) >= counts[:, None]] = 2.0
    return order.argsort(1)


def train_together(
    model: nn.Module, start: Tensor, writers: Writers, cohort: Tensor, order: Tensor, learning_rate: float
) -> Tensor:
    """Updates (cohort, parameters) of an epoch of minibatch SGD at each of the cohort's writers, all in step; who has no batch left
    waits. `order` (cohort, most images) is that of their examples."""
    specs, num = model_specs(model), len(cohort)
    weights = {name: part.expand(num, *part.shape).clone() for name, part in parts(specs, start).items()}
    counts = writers.counts[cohort]

    def loss(weights: dict[str, Tensor], features: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        logits = functional_call(model, weights, (features,))
        return (functional.cross_entropy(logits, labels, reduction="none") * share).sum()

    gradients, every = vmap(grad(loss)), cohort[:, None]
    for first in range(0, max(counts.tolist(), default=0), BATCH_SIZE):
        batch = order[:, first : first + BATCH_SIZE]
        is_there = (first + torch.arange(batch.shape[1]) < counts[:, None]).float()
        share = is_there / is_there.sum(1, keepdim=True).clamp(min=1)
        found = gradients(weights, writers.features[every, batch], writers.labels[every, batch], share)
        for name, gradient in found.items():
            weights[name].sub_(gradient, alpha=learning_rate)
    return torch.cat([weights[spec.name].flatten(1) for spec in specs], 1) - start


def accuracy(model: nn.Module, values: Tensor, test: Examples) -> float:
    """Of a model as a vector."""
    load_flat(model, values.float())
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())


# -- noise -------------------------------------------------------------------------------------------------------------


@cache
def factorization(mechanism: str) -> Factorization:
    """Of a correlated mechanism."""
    if mechanism == "tree":
        return BinaryTree(NUM_ROUNDS)
    if mechanism == "inverse":
        return BandedInverseRoot(NUM_ROUNDS, 8)
    return optimize_buffered(NUM_ROUNDS, NUM_GROUPS, NUM_ROUNDS // NUM_GROUPS)


@cache
def noise_multiplier(mechanism: str, epsilon: float) -> float:
    """Standard deviation over sensitivity of what `declared` will say."""
    if mechanism in ("fixed", "adaptive"):
        return noise_multiplier_for(epsilon, DELTA, NUM_ROUNDS, Poisson(RATE))
    if mechanism == "local":
        return noise_multiplier_for(epsilon, DELTA, NUM_ROUNDS // NUM_GROUPS, Everyone(), "replace_one")
    return noise_multiplier_for(epsilon, DELTA, 1, Everyone())


def declared(mechanism: str, epsilon: float, norm: float, num_writers: int, num_parameters: int) -> Mechanism:
    """What the accountant is told; for one round, or where noise is correlated, for the run."""
    noise = noise_multiplier(mechanism, epsilon)
    if mechanism == "fixed":
        return central_poisson(norm, noise, RATE)
    if mechanism == "adaptive":
        return central_adaptive(norm, noise, default_bit_sigma(noise, RATE, num_writers), RATE)
    if mechanism == "local":
        return local(norm, 2 * noise)
    factors, participations = factorization(mechanism), NUM_ROUNDS // NUM_GROUPS
    sensitivity = factors.sensitivity(NUM_GROUPS, participations)
    # What rounding the noises' sum adds hangs on the step, and so on the noise that it is added to.
    rounding = factors.rounding_sensitivity(num_parameters) * 2.0 ** -(STD_BITS + FINER_BITS)
    correlation = Correlation(factors.name, NUM_ROUNDS, participations, NUM_GROUPS)
    return correlated(norm, noise, sensitivity / (1 - noise * rounding), correlation)


def key_of(seed: int, round: int) -> bytes:
    """Of a round's noise. A benchmark's is to be had again; a coordinator's never."""
    return sha256(f"{seed} {round}".encode()).digest()


def noise_of(mechanism: str, declared: Mechanism, seed: int, round: int) -> PrivateNoise:
    """A round's noise."""
    key = key_of(seed, round)
    if mechanism not in WHOLE:
        return PrivateNoise(declared.update_sigma, declared.bit_sigma or 0.0, key=key)
    weights = factorization(mechanism).noise_weights(round)
    again = [(key_of(seed, other), weight) for other, weight in weights.items() if other != round]
    return PrivateNoise(declared.sigma, finer_bits=0 if mechanism == "tree" else FINER_BITS, key=key, drawn_again=again)


@lru_cache(4)
def gaussian_of(std: float, exponent: int) -> GridGaussian:
    """The noise in steps: its tables take as long as a round's sum, so they are kept."""
    return GridGaussian(std * 2.0**-exponent)


def clipped_steps(update: Tensor, bound: float, exponent: int) -> tuple[Tensor, bool]:
    """An update cut to the bound, in whole steps, and whether it was longer."""
    norm = SquaredNorm()
    norm.add(update)
    factor = clip_factor(norm.value, bound)
    steps = to_steps(update, factor, exponent, torch.empty(len(update), dtype=torch.float64))
    assert squared_steps(steps) <= max_squared_steps(bound, exponent)
    return steps, factor < 1.0


def noisy_sum(updates: Tensor, noise: PrivateNoise, norm: float) -> tuple[Tensor, float, int]:
    """What the coordinator's PrivateSum releases of these updates: the sum, float64, and the noisy sum of bits; and how many were
    cut, which it keeps to itself."""
    total, bits, num_cut = torch.zeros(updates.shape[1], dtype=torch.float64), 0, 0
    for update in updates:
        steps, is_cut = clipped_steps(update, norm, noise.exponent)
        total += steps
        num_cut += is_cut
        if noise.bit_std:
            half = int(0.5 * 2.0**-noise.bit_exponent)
            bits += -half if is_cut else half
    gaussian, stream = gaussian_of(noise.std, noise.exponent), NoiseStream(noise.key)
    gaussian.add_to(total, stream)
    if noise.drawn_again:
        again = torch.zeros_like(total)
        for key, weight in noise.drawn_again:
            drawn = torch.zeros_like(total)
            gaussian.add_to(drawn, NoiseStream(key))
            again += drawn * weight
        total += again.round_()
    if noise.bit_std:
        bits += int(noise.bit_gaussian().draw(1, stream)[0])
        return total.mul_(2.0**noise.exponent), bits * 2.0**noise.bit_exponent, num_cut
    return total.mul_(2.0**noise.exponent), 0.0, num_cut


def locally_noisy(
    update: Tensor, gaussian: GridGaussian, exponent: int, norm: float, stream: NoiseStream
) -> tuple[Tensor, bool]:
    """What a device sends of its update, float32, and whether it was cut."""
    steps, is_cut = clipped_steps(update, norm, exponent)
    gaussian.add_to(steps, stream)
    return steps.mul_(2.0**exponent).float(), is_cut


# -- runs --------------------------------------------------------------------------------------------------------------


def cohorts(mechanism: str, num_writers: int, seed: int) -> Iterator[Tensor]:
    """Who takes part in each round: by coins, or in turn."""
    generator = torch.Generator().manual_seed(1_000 + seed)
    groups = torch.randperm(num_writers, generator=generator).tensor_split(NUM_GROUPS)
    for round in range(NUM_ROUNDS):
        if mechanism in WITH_COINS:
            yield (torch.rand(num_writers, generator=generator) < RATE).nonzero().flatten()
        else:
            yield groups[round % NUM_GROUPS]


def run(writers: Writers, mechanism: str, epsilon_: float, seed: int, setting: Setting) -> Row:
    """One row."""
    begin = time.monotonic()
    model = initial_model(EdgesNet(), seed)
    weights = flat(model).double()
    num_parameters, norm, expected = len(weights), setting.clipping_norm, RATE * len(writers)
    optimizer = Momentum(setting.gain * (1 - setting.momentum), setting.momentum)
    state: tuple[Tensor, ...] = (torch.zeros_like(weights),)
    average, generator = weights.clone(), torch.Generator().manual_seed(seed)
    num_cut = num_updates = 0
    mech, spends, sigma = None, list[Spend](), 0.0
    for round, cohort in enumerate(cohorts(mechanism, len(writers), seed)):
        order = shuffled(writers.counts[cohort], writers.labels.shape[1], generator)
        updates = train_together(model, weights.float(), writers, cohort, order, setting.learning_rate)
        num_updates += len(updates)
        if mechanism == "none":
            mean = updates.double().sum(0) / max(1, len(updates))
        else:
            mech = declared(mechanism, epsilon_, norm, len(writers), num_parameters)
            noise = noise_of(mechanism, mech, seed, round)
            if mechanism == "local":
                gaussian, stream = gaussian_of(noise.std, noise.exponent), NoiseStream(noise.key)
                sent = [locally_noisy(update, gaussian, noise.exponent, norm, stream) for update in updates]
                total, cut = torch.stack([update for update, _ in sent]).double().sum(0), sum(cut for _, cut in sent)
            else:
                total, bits, cut = noisy_sum(updates, noise, norm)
            spends.append(Spend(mech))
            num_cut += cut
            mean, sigma = total / expected, noise.std
            if mechanism == "adaptive":
                norm = next_clipping_norm(norm, 0.5 + bits / expected, QUANTILE, QUANTILE_RATE)
        state, weights = optimizer.step(state, weights, mean)
        average = blend(average, weights.clone(), decay_at(AVERAGE_DECAY, round + 1))
    # A correlated event pays for all rounds, and a writer pays for those in which that writer's device sends something.
    spends = spends[:1] if mechanism in WHOLE else spends[:: NUM_GROUPS if mechanism == "local" else 1]
    distance = NUM_ROUNDS * (num_parameters + 1) * DISTANCE_PER_NUMBER
    return Row(
        mechanism,
        epsilon_,
        seed,
        asdict(setting),
        noise_multiplier=0.0 if mech is None else mech.noise_multiplier,
        sigma=sigma,
        spent=epsilon(spends, DELTA, distance=distance).reported,
        accuracy=accuracy(model, average, writers.test),
        last_accuracy=accuracy(model, weights, writers.test),
        clipped=num_cut / num_updates,
        last_norm=norm,
        seconds=time.monotonic() - begin,
        commit=commit(),
    )


# -- against the coordinator and the client ----------------------------------------------------------------------------


def check() -> None:
    """Raises AssertionError where something here is not what the coordinator or a client does."""
    model = initial_model(EdgesNet(), 0)
    check_training(model)
    check_local(model)
    for mechanism in MECHANISMS:
        if mechanism not in ("none", "local"):
            check_round(model, mechanism)
        if mechanism not in ("none", "local", "buffered"):
            check_declared(mechanism)


def drawn_updates(model: nn.Module, norm: float) -> Tensor:
    """Twelve updates, from a tenth of the norm to three norms long."""
    generator = torch.Generator().manual_seed(1)
    updates = torch.randn(12, len(flat(model)), generator=generator)
    lengths = norm * torch.linspace(0.1, 3.0, 12)
    return functional.normalize(updates) * lengths[:, None]


def check_round(model: nn.Module, mechanism: str) -> None:
    """A round's sum, to the last bit: the fourteenth, where earlier noise is drawn again."""
    norm, expected, seed, round = 0.3, RATE * NUM_WRITERS, 3, 13
    specs, updates = model_specs(model), drawn_updates(model, norm)
    noise = noise_of(mechanism, declared(mechanism, 8.0, norm, NUM_WRITERS, updates.shape[1]), seed, round)
    total, bits, num_cut = noisy_sum(updates, noise, norm)
    names = [f"writer {number}" for number in range(len(updates))]
    theirs = PrivateSum(specs, noise, dict.fromkeys(names, norm), norm)
    with tempfile.TemporaryDirectory() as folder:
        for name, update in zip(names, updates, strict=True):
            path = Path(folder) / "update"
            with path.open("wb+") as file:
                write_payload(
                    file,
                    kind=common_pb2.PAYLOAD_KIND_UPDATE,
                    run_id="bench",
                    round=round + 1,
                    model_version=round,
                    base_digest=bytes(32),
                    update=UpdateInfo(name, num_examples=1),
                    tensors=zip(specs, parts(specs, update).values(), strict=True),
                )
            with PayloadReader(path) as reader:
                theirs.add(reader, 1)
        theirs.release(Path(folder) / "sum")
        with ReleasedSum(Path(folder) / "sum", expected) as released:
            found = [released.report(spec, 0, spec.num_elements) for spec in specs]
            mean = torch.cat([part for part in found if part is not None])
            uncut = released.uncut_part if noise.bit_std else 0.5 + bits / expected
    assert torch.equal(mean, total / expected), f"{mechanism}: not what the coordinator releases"
    assert uncut == 0.5 + bits / expected, f"{mechanism}: not the bits that the coordinator releases"
    assert num_cut == theirs.num_clipped, f"{mechanism}: the coordinator cuts others"


def check_local(model: nn.Module) -> None:
    """What devices send, to the last bit."""
    norm, specs, updates = 0.3, model_specs(model), drawn_updates(model, 0.3)
    noise = noise_of("local", declared("local", 8.0, norm, NUM_WRITERS, updates.shape[1]), 3, 13)
    plan = PrivacyPlan("local", norm, 2 * noise_multiplier("local", 8.0), DELTA)
    mine, theirs = NoiseStream(noise.key), NoiseStream(noise.key)
    for update in updates:
        sent, _ = locally_noisy(update, gaussian_of(noise.std, noise.exponent), noise.exponent, norm, mine)
        protected = [(spec, part.clone()) for spec, part in zip(specs, parts(specs, update).values(), strict=True)]
        protect(protected, [spec.name for spec in specs], plan, theirs)
        assert torch.equal(sent, torch.cat([part.reshape(-1) for _, part in protected])), "local: a device differs"


def check_declared(mechanism: str) -> None:
    """What the coordinator would declare, and so account for, is what is declared here."""
    turns = f"max_participations = {NUM_ROUNDS // NUM_GROUPS}\nmin_separation = {NUM_GROUPS}"
    kinds = {"tree": "tree", "inverse": "banded_inverse"}
    clipping = 'kind = "adaptive"\ninitial_norm = 0.3' if mechanism == "adaptive" else 'kind = "fixed"\nnorm = 0.3'
    config = parse_run_config(
        f'name = "bench"\nworkload = "bench-edges"\n[cohort]\nsize = {NUM_WRITERS}\n[evaluation]\nat = "none"\n'
        f"[schedule]\nmax_rounds = {NUM_ROUNDS}\ndeadline_seconds = 60\n"
        '[aggregation]\nkind = "mean"\nweighting = "uniform"\n'
        f'[privacy]\nkind = "central"\nsampling_rate = {RATE}\nnoise_multiplier = {noise_multiplier(mechanism, 8.0)}\n'
        f"delta = {DELTA}\n[privacy.clipping]\n{clipping}\n"
        + (f'[privacy.correlation]\nkind = "{kinds[mechanism]}"\n{turns}\n' if mechanism in kinds else "")
    )
    assert isinstance(config.privacy, CentralPrivacyConfig)
    theirs = mechanism_of(config, config.privacy, 0.3, NUM_WRITERS, 9_682)
    assert theirs == declared(mechanism, 8.0, 0.3, NUM_WRITERS, 9_682), (
        f"{mechanism}: not what the coordinator declares"
    )


class _Recorded(Dataset[tuple[Tensor, Tensor]]):
    """Examples that remember in which order they were asked for."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self._features, self._labels = features, labels
        self.order: list[int] = []

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.order.append(index)
        return self._features[index], self._labels[index]


def check_training(model: nn.Module) -> None:
    """Three writers with different numbers of examples, who come to what a client comes to with the same order of them, but for the
    order in which floats are added up."""
    generator, learning_rate, start = torch.Generator().manual_seed(2), 0.1, flat(model)
    of_each = [
        (torch.randn(count, 392, generator=generator), torch.randint(0, 10, (count,), generator=generator))
        for count in (3 * BATCH_SIZE + 5, 7, 2 * BATCH_SIZE)
    ]
    writers, alone = padded(of_each, of_each[0]), []
    order = torch.arange(writers.labels.shape[1]).repeat(len(writers), 1)
    for place, (features, labels) in enumerate(of_each):
        load_flat(model, start)
        data = _Recorded(features, labels)
        plan = TrainingPlan(BATCH_SIZE, OptimizerPlan("sgd", learning_rate), seed=place, epochs=1)
        train(EdgesNet(), model, data, plan, torch.device("cpu"))
        order[place, : len(labels)] = torch.tensor(data.order)
        alone.append(flat(model) - start)
    load_flat(model, start)
    together = train_together(model, start, writers, torch.arange(len(writers)), order, learning_rate)
    difference = (together - torch.stack(alone)).norm(dim=1) / torch.stack(alone).norm(dim=1)
    assert float(difference.max()) < 1e-5, f"training together differs from a client's by {float(difference.max()):.2g}"


# -- tuning ------------------------------------------------------------------------------------------------------------


def search(measure: Callable[[Setting], float], names: Sequence[str], num_trials: int) -> Setting:
    """The best of at most so many settings: it tries the neighbours on the grid of the best so far, figure after figure, and goes
    on from the first that is better. `names` are the figures that count."""
    best = Setting()
    tried = {best: measure(best)}
    while len(tried) < num_trials:
        setting = next((each for each in neighbours(best, names) if each not in tried), None)
        if setting is None:
            break
        tried[setting] = measure(setting)
        if tried[setting] > tried[best]:
            best = setting
    return best


def neighbours(setting: Setting, names: Sequence[str]) -> Iterator[Setting]:
    """One figure one place up, or down."""
    for name in names:
        values = GRID[name]
        place = values.index(getattr(setting, name))
        for other in (place + 1, place - 1):
            if 0 <= other < len(values):
                yield replace(setting, **{name: values[other]})


def names_of(mechanism: str) -> list[str]:
    """The figures that count for a mechanism."""
    return [name for name in GRID if mechanism != "none" or name != "clipping_norm"]


def tune(writers: Writers, mechanism: str, epsilon_: float) -> Setting:
    """The best of NUM_TRIALS settings, each kept when it is measured and taken from there the next time."""

    def measure(setting: Setting) -> float:
        case = {"mechanism": mechanism, "epsilon": epsilon_, "setting": asdict(setting)}
        with kept_in(RESULT) as content:
            trials = content.get("tuning", [])
        known = [each for each in trials if all(each[key] == value for key, value in case.items())]
        if known:
            return float(known[0]["accuracy"])
        row = run(writers, mechanism, epsilon_, TUNING_SEED, setting)
        print(f"trial: {_said(row)}", flush=True)
        with kept_in(RESULT) as content:
            trial = case | {"accuracy": row.accuracy, "last_accuracy": row.last_accuracy}
            content["tuning"] = [*content.get("tuning", []), trial]
        return row.accuracy

    return search(measure, names_of(mechanism), NUM_TRIALS)


def tuned_epsilon(mechanism: str, epsilon_: float) -> float:
    """Where the setting of a row is chosen."""
    return 0.0 if mechanism == "none" else min(TUNED, key=lambda each: abs(each - epsilon_))


def chosen(content: Mapping[str, Any], mechanism: str, epsilon_: float) -> dict[str, Any] | None:
    """The best trial that is there for a row; None where there is none."""
    case = (mechanism, tuned_epsilon(mechanism, epsilon_))
    trials = [each for each in content.get("tuning", []) if (each["mechanism"], each["epsilon"]) == case]
    return max(trials, key=lambda each: float(each["accuracy"]), default=None)


# -- what comes of it --------------------------------------------------------------------------------------------------


def _said(row: Row) -> str:
    setting = ", ".join(f"{name} {value:g}" for name, value in row.setting.items())
    return (
        f"{row.mechanism}, epsilon {row.epsilon:g}, seed {row.seed} ({setting}): {100 * row.accuracy:.2f} %, last version "
        f"{100 * row.last_accuracy:.2f} %, {row.seconds:.0f} s"
    )


def rows_of(content: Mapping[str, Any], mechanism: str, epsilon_: float) -> list[Row]:
    """All seeds of a row."""
    rows = (Row(**each) for each in content.get("rows", []))
    return sorted((r for r in rows if (r.mechanism, r.epsilon) == (mechanism, epsilon_)), key=lambda row: row.seed)


def cases(epsilons: Sequence[float], mechanisms: Sequence[str] = MECHANISMS) -> Iterator[tuple[str, float]]:
    """Mechanism and epsilon, 0 for no privacy."""
    for mechanism in mechanisms:
        for epsilon_ in (0.0,) if mechanism == "none" else epsilons:
            yield mechanism, epsilon_


def accumulated_noise(mechanism: str, multiplier: float) -> float:
    """Standard deviation of the noise in the sum of all updates that a version is made of, in clipping norms: root mean square over
    versions. At equal epsilon, it is what mechanisms differ by."""
    if mechanism in WHOLE:
        return multiplier * rms_error(factorization(mechanism), NUM_GROUPS, NUM_ROUNDS // NUM_GROUPS)
    each = 2 * multiplier * math.sqrt(RATE * NUM_WRITERS) if mechanism == "local" else multiplier
    return each * math.sqrt((NUM_ROUNDS + 1) / 2)


def aims(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures that are aimed at: what central privacy costs, of `fixed` and `adaptive` the one that was better on the writers
    held out; None where it was not measured."""
    found = []
    for epsilon_, aim in AIMS.items():
        trials = [trial for name in ("fixed", "adaptive") if (trial := chosen(content, name, epsilon_)) is not None]
        best = max(trials, key=lambda each: float(each["accuracy"]), default={"mechanism": "fixed"})["mechanism"]
        private, plain = (
            [row.accuracy for row in rows] for rows in (rows_of(content, best, epsilon_), rows_of(content, "none", 0.0))
        )
        value = 100 * (statistics.fmean(plain) - statistics.fmean(private)) if plain and private else None
        what = f"central privacy ({best}) at epsilon {epsilon_:g}: accuracy below that without privacy, mean over seeds"
        found.append({"what": what, "value": value, "aim": aim, "direction": "max", "unit": "points"})
    return found


def table(content: Mapping[str, Any]) -> Table:
    """A row for each mechanism and epsilon: means over seeds, least and most; "z" is `Row.noise_multiplier`, "noise" what
    `accumulated_noise` says, "held out" the accuracy of the trial that chose the setting."""
    made = Table(title="MNIST, 539 writers, 100 rounds, delta 1e-4; accuracies in %")
    columns = (
        "mechanism",
        "epsilon",
        "spent",
        "z",
        "noise",
        "accuracy",
        "least, most",
        "below none",
        "last version",
        "held out",
    )
    for column in (*columns, *GRID):
        made.add_column(column, justify="left" if column == "mechanism" else "right")
    plain = rows_of(content, "none", 0.0)
    for mechanism, epsilon_ in cases(EPSILONS):
        rows, trial = rows_of(content, mechanism, epsilon_), chosen(content, mechanism, epsilon_)
        name = "" if mechanism == "none" else f"{epsilon_:g}"
        if not rows:
            made.add_row(mechanism, name, "not run")
            continue
        found = [row.accuracy for row in rows]
        made.add_row(
            mechanism,
            name,
            f"{max(row.spent for row in rows):.3f}" if name else "",
            f"{rows[0].noise_multiplier:.3f}" if name else "",
            f"{accumulated_noise(mechanism, rows[0].noise_multiplier):.1f}" if name else "",
            f"{100 * statistics.fmean(found):.2f}",
            f"{100 * min(found):.2f}, {100 * max(found):.2f}",
            f"{100 * (statistics.fmean(row.accuracy for row in plain) - statistics.fmean(found)):.2f}" if plain else "",
            f"{100 * statistics.fmean(row.last_accuracy for row in rows):.2f}",
            f"{100 * trial['accuracy']:.2f}" if trial and tuned_epsilon(mechanism, epsilon_) == epsilon_ else "",
            *(f"{rows[0].setting[each]:g}" if each in names_of(mechanism) else "" for each in GRID),
        )
    return made


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: accuracy against epsilon, means over seeds with least and most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Okabe and Ito's colours, which people with colour blindness can tell apart.
    colors = dict(zip(MECHANISMS[1:], ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7"), strict=True))
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (whole, near) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained", dpi=130)
        for axes in (whole, near):
            if plain := rows_of(content, "none", 0.0):
                level = 100 * statistics.fmean(row.accuracy for row in plain)
                axes.axhline(level, color="black", linewidth=1, linestyle="--", label="no privacy")
            for number, (mechanism, color) in enumerate(colors.items()):
                points = []
                for epsilon_ in sorted(EPSILONS):
                    if found := [100 * row.accuracy for row in rows_of(content, mechanism, epsilon_)]:
                        # Side by side, for some lie upon each other.
                        points.append((epsilon_ * 1.02 ** (number - 2.5), statistics.fmean(found), found))
                if points:
                    places, means = [place for place, _, _ in points], [mean for _, mean, _ in points]
                    spread = [[m - min(f) for _, m, f in points], [max(f) - m for _, m, f in points]]
                    style = "o-" if mechanism in WITH_COINS else "s--"
                    axes.errorbar(places, means, spread, fmt=style, color=color, label=mechanism, markersize=4,
                                  linewidth=1.2, capsize=2)  # fmt: skip
            axes.set_xscale("log")
            axes.set_xticks(EPSILONS, [f"{each:g}" for each in EPSILONS])
            axes.minorticks_off()
            axes.set_xlabel("epsilon of a writer, at delta 1e-4")
            axes.grid(axis="y", alpha=0.25)
        whole.set_ylabel("test accuracy, %")
        whole.legend(frameon=False, fontsize=8)
        near.set_ylim(90, 99)
        near.set_title("the same, from 90 %", fontsize=10)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)


def main() -> None:
    """Tunes or measures, prints the table, writes the JSON and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanisms", nargs="*", choices=MECHANISMS, default=list(MECHANISMS))
    parser.add_argument("--epsilons", nargs="*", type=float, choices=EPSILONS, default=list(EPSILONS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--tune", action="store_true", help="the trials, on writers held out")
    parser.add_argument("--show", action="store_true", help="only the table and the plot of what was measured")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder that holds mnist")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=180)
    if not arguments.show:
        check()
        writers = writers_of(arguments.data, held_out=arguments.tune)
    if arguments.tune and not arguments.show:
        for mechanism, epsilon_ in cases([each for each in arguments.epsilons if each in TUNED], arguments.mechanisms):
            console.print(f"{mechanism}, epsilon {epsilon_:g}: {tune(writers, mechanism, epsilon_)}")
    for mechanism, epsilon_ in (
        [] if arguments.show or arguments.tune else cases(arguments.epsilons, arguments.mechanisms)
    ):
        with kept_in(RESULT) as content:
            trial = chosen(content, mechanism, epsilon_)
            there = [
                row.seed for row in rows_of(content, mechanism, epsilon_) if trial and row.setting == trial["setting"]
            ]
        if trial is None:
            raise SystemExit(f"{mechanism}: no setting is chosen for epsilon {epsilon_:g} yet; run with --tune first")
        for seed in [each for each in arguments.seeds if each not in there]:
            row = run(writers, mechanism, epsilon_, seed, Setting(**trial["setting"]))
            print(_said(row), flush=True)
            with kept_in(RESULT) as content:
                case = (mechanism, epsilon_, seed)
                others = [e for e in content.get("rows", []) if (e["mechanism"], e["epsilon"], e["seed"]) != case]
                content["rows"] = [*others, asdict(row)]
    with kept_in(RESULT) as content:
        content["aims"] = aims(content)
    console.print(table(content))
    for aim in content["aims"]:
        value = "not run" if aim["value"] is None else f"{aim['value']:.2f} {aim['unit']}"
        console.print(f"{aim['what']}: {value} (aim: at most {aim['aim']:g})")
    if content.get("rows"):
        draw(content, IMAGE)


if __name__ == "__main__":
    main()
