"""Binary tree aggregation: a prefix of t rounds is the sum of at most log2(t) + 1 noised dyadic blocks of rounds.

Dwork, Naor, Pitassi and Rothblum 2010 (https://doi.org/10.1145/1806689.1806787), Chan, Shi and Song 2011
(https://doi.org/10.1145/2043621.2043626); for training as DP-FTRL, Kairouz et al. 2021 (https://arxiv.org/abs/2103.00039).

A node covers 2^l rounds from a multiple of 2^l on. With every round exactly one node joins the prefix, the largest that ends there,
so a node is named after its last round: node t covers the lowbit(t + 1) last rounds up to t (Fenwick 1994,
https://doi.org/10.1002/spe.4380240306). Right children never stand in a prefix. Nobody draws them, so C is square: row t has ones
at the rounds of node t, B = A C^-1 has ones at the nodes of each prefix, and sensitivity counts these nodes only.

How we differ from DP-FTRL: no estimator that combines redundant nodes (Honaker), which would need the right children; no restarts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import sqrt
from typing import ClassVar

import numpy as np

from fed_core.errors import ConfigError
from fed_core.privacy.sensitivity import Floats, most_participations


def prefix_nodes(t: int) -> list[int]:
    """Nodes whose sum is the sum of rounds 0 ... t, the newest first."""
    nodes, end = [], t + 1
    while end:
        nodes.append(end - 1)
        end &= end - 1
    return nodes


@dataclass(frozen=True)
class BinaryTree:
    """The binary tree as a factorization; see the module and `Factorization`.

    `every_node` computes sensitivity as textbooks do: over all nodes of the tree for the next power of two rounds, right children
    and nodes that end after the last round included. The mechanism stays the same."""

    num_rounds: int
    every_node: bool = False
    name: ClassVar[str] = "tree"

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise ConfigError(f"num_rounds is {self.num_rounds}; expected a whole number of at least 1")

    @property
    def num_buffers(self) -> int:
        """The nodes of the prefix so far: at most log2(num_rounds)."""
        return self.num_rounds.bit_length() - 1

    @property
    def num_draws(self) -> int:
        """The new node and those that it replaces."""
        return self.num_rounds.bit_length()

    def sensitivity(self, separation: int, participations: int) -> float:
        """Exact. A client adds to a node once for each of its rounds there: the root of the largest sum of squared counts.

        Time O(T^2 b) and memory O(T b) for T rounds: under a second for 2,048."""
        return sqrt(_most_squares(self.num_rounds, separation, participations, self.every_node))

    def rounding_sensitivity(self, num_elements: int) -> float:
        """Nothing: weights are whole numbers."""
        return 0.0

    def noise_weights(self, t: int) -> dict[int, float]:
        """The node that ends with round t joins the prefix, its left descendants along the right edge leave it."""
        return {t: 1.0} | {node: -1.0 for node in prefix_nodes(t - 1) if node not in prefix_nodes(t)}

    def prefix_variance(self, t: int) -> float:
        """How many nodes the prefix has."""
        return float((t + 1).bit_count())

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "num_rounds": self.num_rounds, "every_node": self.every_node}


def _most_squares(num_rounds: int, separation: int, participations: int, every_node: bool) -> float:
    """Largest sum over the nodes of (participations of one client in the node)^2.

    Dynamic programming over the tree. What a subtree holds meets the rest in three figures only: how many participations there are,
    how far from its left edge the first is, and how far from its right edge the last. Distances of `separation` - 1 and more
    hinder no neighbour, so `best(...)[m, a, z]` is the largest sum for m participations with nothing in the first a rounds and
    nothing in the last z, where a and z go from 0 to separation - 1, or only 0 where there is no neighbour."""
    limit = most_participations(num_rounds, separation, participations)

    def is_counted(level: int, length: int, is_left: bool) -> bool:
        return every_node or (is_left and length == 1 << level)

    def one(level: int, length: int) -> Floats:
        """For each round of a subtree, how many nodes below its root count it."""
        rounds = np.arange(length)
        counts = np.zeros(length)
        for below in range(level):
            node = rounds >> below
            counts += every_node | ((node % 2 == 0) & ((node + 1) << below <= length))
        return counts

    @cache
    def best(level: int, length: int, has_left: bool, has_right: bool) -> Floats:
        """For the `length` first rounds of a subtree of 2^level rounds, and without its root."""
        num_a, num_z = separation if has_left else 1, separation if has_right else 1
        if length <= separation:
            sums = np.full((2, num_a, num_z), -np.inf)
            sums[0] = 0
            counts = one(level, length)
            for a in range(min(num_a, length)):
                # The largest of rounds a ... length - 1 - z, for each z.
                largest = np.maximum.accumulate(counts[a:])[::-1][:num_z]
                sums[1, a, : len(largest)] = largest
            return sums
        half = 1 << (level - 1)
        if length <= half:
            return with_root(level - 1, length, has_left, has_right, is_left=True)
        left = with_root(level - 1, half, has_left, True, is_left=True)
        right = with_root(level - 1, length - half, True, has_right, is_left=False)
        sums = np.full((min(limit + 1, len(left) + len(right) - 1), num_a, num_z), -np.inf)
        # One half empty: the other sees what of the parent's distance reaches over it.
        to_right = np.maximum(np.arange(num_a) - half, 0)
        to_left = np.maximum(np.arange(num_z) - (length - half), 0)
        sums[: len(right)] = right[:, to_right, :][: len(sums)]
        sums[: len(left)] = np.maximum(sums[: len(left)], left[:, :, to_left][: len(sums)])
        # The last of the left half ends d before the middle, so the first of the right half comes separation - 1 - d after it.
        for m in range(1, len(left)):
            room = min(len(right), len(sums) - m)
            for d in range(separation):
                both = left[m, None, :, d, None] + right[1:room, None, separation - 1 - d, :]
                np.maximum(sums[m + 1 : m + room], both, out=sums[m + 1 : m + room])
        return sums

    def with_root(level: int, length: int, has_left: bool, has_right: bool, is_left: bool) -> Floats:
        sums = best(level, length, has_left, has_right)
        if not is_counted(level, length, is_left):
            return sums
        return sums + np.square(np.arange(len(sums), dtype=np.float64))[:, None, None]

    level = (num_rounds - 1).bit_length()
    return float(with_root(level, num_rounds, False, False, is_left=True).max())
