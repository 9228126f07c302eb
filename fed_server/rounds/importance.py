"""Sampling by importance: sites with large losses are asked more often, and their updates count less, so that the expected update
of a round stays that of all sites together. Pure, and whole numbers where it decides: the same sites give the same draw anywhere.

After Chen, Horvath and Richtarik 2020 (https://arxiv.org/abs/2010.13723): to draw sites in proportion to w_i |u_i| is what disturbs
the mean the least, w_i being a site's share and u_i its update. Where we differ:

- |u_i| is known after the training only. The loss that a site last reported stands for it, as in power-of-choice (Cho et al. 2020,
  https://arxiv.org/abs/2010.01243), which however takes the largest losses and leaves the mean biased. A part of the chances is
  dealt out by share alone, so that no weight grows beyond its inverse.
- The paper tosses a coin for every site, so a cohort has any size. We draw systematically (Madow 1949) along an order that hangs on
  the round: exactly `count` sites, none twice, each with the chance that was meant for it. Joint chances are not those of
  independent draws, but unbiasedness asks only for each site's own.

The estimate is that of Horvitz and Thompson 1952. With share q_i of all who could be drawn, chance c_i to be among the K that are,
and S the cohort:

    E[sum over S of q_i u_i / c_i] = sum over all of q_i u_i

Where all sites have the same share 1 / N and no chance is cut at 1, c_i = K p_i, and this is the mean over S of u_i / (N p_i). To
divide by N p_i and by K would also be right for K draws with replacement; dividing by the sum of the weights would not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import fsum, isfinite

# Chances are whole multiples of 2**-48 of their sum, and at least one.
_UNITS = 2**48

# A loss beyond it counts as this much: sums stay finite.
_LARGEST_LOSS = 1e30


@dataclass(frozen=True)
class SiteReport:
    """What a site said with the last update that was received of it: the loss of its training, None where there was none or none
    that can be reckoned with, and its examples."""

    round: int
    loss: float | None
    num_examples: int


@dataclass(frozen=True)
class Chances:
    """Who is drawn for certain, and for all others whole numbers in proportion to which the rest of the `count` places is drawn."""

    certain: frozenset[str]
    sizes: Mapping[str, int]
    num_drawn: int

    @cached_property
    def total(self) -> int:
        """Sum of the sizes."""
        return sum(self.sizes.values())

    def of(self, name: str) -> Fraction:
        """The chance that a site is in the cohort."""
        if name in self.certain:
            return Fraction(1)
        return Fraction(self.num_drawn * self.sizes[name], self.total)


def shares_of(
    names: Sequence[str], reports: Mapping[str, SiteReport], importance: Mapping[str, int], *, by_examples: bool
) -> dict[str, float]:
    """What each site's update counts in the mean over all of them; they add up to 1. By its examples, where asked for (a site that
    was never heard of has as many as the mean of the others), times what the operator says."""
    known = [reports[name].num_examples for name in names if name in reports] if by_examples else []
    usual = fsum(known) / len(known) if known else 1.0
    counts = {
        name: importance.get(name, 1) * (float(reports[name].num_examples) if known and name in reports else usual)
        for name in names
    }
    total = fsum(counts.values())
    return {name: count / total for name, count in counts.items()}


def chances_of(
    shares: Mapping[str, float], reports: Mapping[str, SiteReport], count: int, equal_part: float
) -> Chances:
    """Chances for a cohort of `count`: share times (equal_part + (1 - equal_part) loss / mean loss), cut at 1 and the rest dealt
    out again. Who reported no loss has the mean one."""
    losses = {
        name: min(max(report.loss, 0.0), _LARGEST_LOSS)
        for name in shares
        if (report := reports.get(name)) is not None and report.loss is not None and isfinite(report.loss)
    }
    known = fsum(shares[name] for name in losses)
    mean = fsum(shares[name] * loss for name, loss in losses.items()) / known if known else 0.0
    scores = {
        name: share * (equal_part + (1 - equal_part) * (losses[name] / mean if name in losses and mean > 0 else 1.0))
        for name, share in shares.items()
    }
    total = fsum(scores.values())
    return _cut({name: max(1, round(score / total * _UNITS)) for name, score in scores.items()}, count)


def _cut(sizes: dict[str, int], count: int) -> Chances:
    certain: set[str] = set()
    while sizes and len(certain) < count:
        total, left = sum(sizes.values()), count - len(certain)
        more = [name for name, size in sizes.items() if size * left >= total]
        if not more:
            break
        certain.update(more)
        sizes = {name: size for name, size in sizes.items() if name not in certain}
    return Chances(frozenset(certain), sizes, max(0, min(count - len(certain), len(sizes))))


def systematic(order: Sequence[str], chances: Chances, start: int) -> list[str]:
    """The cohort: those whose stretch of a line holds one of the marks start, start + T, start + 2 T ... Stretches lie side by side
    in `order`, each `num_drawn` times a site's size long, and T is the sum of the sizes; `start` is 0 to T - 1. No stretch is
    longer than T, so nobody is met twice, and exactly `num_drawn` are met."""
    drawn, end, mark = [], 0, start
    for name in order:
        end += chances.num_drawn * chances.sizes[name]
        if mark < end:
            drawn.append(name)
            mark += chances.total
    return drawn


@dataclass(frozen=True)
class Correction:
    """How the updates of a cohort that was drawn by chances count: with `weights`, by name, of which `unit` is the 1 of an update
    that counts as in a plain mean. `chances` are those of having been drawn."""

    weights: Mapping[str, int]
    unit: int
    chances: Mapping[str, float]


def correction_of(cohort: Sequence[str], shares: Mapping[str, float], chances: Chances, max_weight: int) -> Correction:
    """Weights K q_i / c_i in whole multiples of 1 / unit, the largest power of two with which all stay below `max_weight`: as fine
    as sums allow, at least 2^-10 where cohorts have up to 1,000 sites and nobody has more than all others together."""
    exact = {name: len(cohort) * Fraction(shares[name]) / chances.of(name) for name in cohort}
    unit = 2 ** max(0, int(max_weight / max(exact.values())).bit_length() - 1)
    weights = {name: max(1, min(max_weight, round(unit * weight))) for name, weight in exact.items()}
    return Correction(weights, unit, {name: float(chances.of(name)) for name in cohort})
