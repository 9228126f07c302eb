"""Gaussian noise on a grid, from the operating system's entropy, with a bound on what separates it from the ideal.

The ideal is a whole number of steps: round(N(0, std_steps^2)), to the nearest. Added to a whole number it gives the Gaussian
mechanism followed by a rounding that looks at nothing else, so every theorem about the Gaussian mechanism holds for it
(post-processing). A Gaussian in floating point does not have that property: which floats a sampler can reach, and with what
probability, depends on the value underneath, and that was enough to undo the mechanism (Mironov 2012,
https://doi.org/10.1145/2382196.2382264; Jin, McMurtry, Rubinstein and Ohrimenko 2022, https://arxiv.org/abs/2112.05307; Haney et
al. 2022, https://arxiv.org/abs/2207.13793), as sums of floats have larger sensitivity than their formula says (Casacuberta et al.
2022, https://arxiv.org/abs/2207.10635). Here values and noise are whole numbers, and all sums are exact.

**How it is drawn.** Convolution of small Gaussians (Peikert 2010, https://eprint.iacr.org/2010/088, theorem 3.1; Micciancio and
Walter 2017, https://eprint.iacr.org/2017/259), each out of a table:

    X = D_0 + 32 D_1 + 32^2 D_2 + ...,    std_steps^2 = s_0^2 + 32^2 s_1^2 + 32^4 s_2^2 + ...

D_0 is distributed as round(N(0, s_0^2)), the others as the discrete Gaussian N_Z(s): P(k) proportional to exp(-k^2 / (2 s^2)).
All but the last s are 128. We differ from the papers in the lowest level: they end in a discrete Gaussian; that of a rounded one
makes the sum a rounded one as well, because 32 W + round(N) = round(32 W + N) for whole W. Neither Sheppard's correction nor its
remainder is needed.

**Why it holds.** Let W ~ N_Z(s) and Y ~ N(0, t^2), K = 32 and v = 1 / (1 / s^2 + K^2 / t^2). The density of K W + Y at x is a sum
of exp(-(k - c)^2 / (2 v)) over whole k with c depending on x, times the density of N(0, K^2 s^2 + t^2). By Poisson's summation
formula that sum is sqrt(2 pi v) (1 + e) with |e| <= 2 exp(-2 pi^2 v) and less than a millionth of it more: independent of x but
for e. The sum that normalizes N_Z(s) has such a factor too, and s^2 >= v. So the ratio of densities lies within 4 exp(-2 pi^2 v)
of 1; where Y ~ N_Z(t), two more normalizations make it 8. The distance is half of it. Here s > 4.8 and t / K = 4: v > 9.4, and
all joints together stay below 1e-79.

**The tables** hold the values from -2047 to 2047, at least 10.2 standard deviations, with probabilities in whole multiples of
2^-128, in 4096 buckets of 2^116 multiples, each shared by at most two values (Walker 1977, https://doi.org/10.1145/355744.355749,
in whole numbers). A word of 64 random bits is one draw: its first 12 bits are the bucket, the others say which of the two, but for
one word of each bucket, where a second word decides: it comes once in 2^52 draws, and without it the distance would be a million
times as large. Every other draw takes the same steps without a branch, whatever comes out. Only which line of the tables (96 KiB
a level) was read differs; whoever can watch the caches of the machine that adds the noise is not kept out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import cache
from typing import Final, NamedTuple, NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from fed_core.errors import InvalidError

Words = NDArray[np.uint64]

KEY_BYTES: Final = 32
RADIX: Final = 32
LOWER_STD: Final = 128
"""Standard deviation of all levels but the highest: four times the radix."""
HIGHEST_STD: Final = 200
"""Largest standard deviation of the highest level; one more level is taken beyond."""
REACH: Final = 2047
"""Largest magnitude in a table."""
MIN_STD: Final = 0.5
MAX_STD: Final = 2.0**22

PROBABILITY_BITS: Final = 128
"""Probabilities are whole multiples of 2^-128."""

_BUCKET_BITS: Final = 12
_WITHIN_BITS: Final = 64 - _BUCKET_BITS
# Coordinates drawn at once: with three levels, words, scratch and tables stay in a second-level cache of 512 KiB or little more.
_BLOCK: Final = 2**13
_ZEROS: Final = bytes(2**18)
_PI: Final = Decimal("3.14159265358979323846264338327950288419716939937510582097494")


class NoiseStream:
    """Random 64-bit words: the key stream of AES-256 in counter mode.

    The key is 32 bytes of the operating system's entropy, kept nowhere but in the cipher. With `key` the words can be drawn again
    by whoever has it: for tests, and for noise that must be taken back later. A key serves one stream only.

    Words that an observer cannot tell from random ones are a computational assumption (on AES), which no bound here counts. A
    stream cannot be printed, copied or pickled, and refuses to go on in a forked process, where it would give the parent's words
    again. Not thread-safe. Raises InvalidError for a key of another length."""

    def __init__(self, key: bytes | None = None) -> None:
        if key is not None and len(key) != KEY_BYTES:
            raise InvalidError(
                f"the key of a noise stream has {KEY_BYTES} bytes, not {len(key)}; leave it out for a new one"
            )
        cipher = Cipher(algorithms.AES256(os.urandom(KEY_BYTES) if key is None else key), modes.CTR(bytes(16)))
        self._encryptor = cipher.encryptor()
        # Numbered from the other end, so that the two never meet.
        spare = modes.CTR(b"\x80" + bytes(15))
        self._spare = Cipher(cipher.algorithm, spare).encryptor()
        self._process = os.getpid()

    def fill(self, out: Words) -> None:
        """Overwrites a contiguous array with the next words."""
        if os.getpid() != self._process:
            raise RuntimeError("a noise stream belongs to the process that made it; make a new one in each process")
        # A view with a zero in its shape cannot be cast.
        data = out.data.cast("B") if out.size else memoryview(b"")
        for start in range(0, len(data), len(_ZEROS)):
            part = data[start : start + len(_ZEROS)]
            self._encryptor.update_into(memoryview(_ZEROS)[: len(part)], part)

    def spare(self) -> int:
        """A word of another series, for the draw that a word does not decide."""
        return int.from_bytes(self._spare.update(bytes(8)), "little")

    def words(self, count: int) -> Words:
        """The next `count` words, [count]."""
        out = np.empty(count, np.uint64)
        self.fill(out)
        return out

    def __repr__(self) -> str:
        return "NoiseStream(key withheld)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a noise stream is never copied or pickled: its noise must not exist twice")


def rounded_gaussian(variance: Fraction) -> list[Decimal]:
    """Probabilities of 0, 1, ... REACH under round(N(0, variance)), each as of one sign, within 1e-40.

    In the cell around k the density is its value at k times the power series of exp(-(k t + t^2 / 2) / variance), whose
    coefficients follow each other: (n + 1) a[n + 1] = -(k a[n] + a[n - 1]) / variance. Over -1/2 .. 1/2 only the even powers
    count."""
    with localcontext(Context(prec=60)):
        inverse = _decimal(1 / variance)
        middle = (inverse / (2 * _PI)).sqrt()
        # Beyond 16 standard deviations, and a cell more, lies less than 1e-56.
        last = min(REACH, math.ceil(16 * math.sqrt(variance)) + 1)
        cells = [middle * weight * _cell(k, inverse) for k, weight in enumerate(_densities(inverse, last))]
        return cells + [Decimal(0)] * (REACH - last)


def discrete_gaussian(variance: Fraction) -> list[Decimal]:
    """Probabilities of 0, 1, ... REACH under N_Z of the parameter sqrt(variance) <= HIGHEST_STD, each as of one sign, within
    1e-40."""
    with localcontext(Context(prec=60)):
        # Twice the reach is 20 standard deviations: what lies beyond is below 1e-87.
        weights = _densities(_decimal(1 / variance), 2 * REACH)
        total = 2 * sum(weights) - 1
        return [weight / total for weight in weights[: REACH + 1]]


def whole_weights(probabilities: Sequence[Decimal]) -> tuple[list[int], Decimal]:
    """Probabilities of 0, 1, ... REACH as whole multiples of 2^-128, and the total variation distance that this makes, with the
    tails beyond the table. Zero takes what the rounding of all others leaves, so that both signs together make exactly 2^128."""
    whole = 2**PROBABILITY_BITS
    with localcontext(Context(prec=60)):
        ideal = [probability * whole for probability in probabilities]
        weights = [0, *(int(weight + Decimal("0.5")) for weight in ideal[1:])]
        weights[0] = whole - 2 * sum(weights)
        missing = [abs(weight - rounded) for weight, rounded in zip(ideal, weights, strict=True)]
        tails = whole + ideal[0] - 2 * sum(ideal)
        return weights, (2 * sum(missing) - missing[0] + abs(tails)) / 2 / whole


class Table(NamedTuple):
    """An alias table. A word w belongs to bucket b = w >> 52 and draws values[2 b + 1] where w < limits[b], values[2 b] where it is
    above. Where it is equal, a second word says the same by rests[b].

    `limits` and `rests` [4096] uint64, `values` [8192] float64, whole and already multiplied with the level's power of the radix;
    `distance` is the total variation distance between a draw and the ideal."""

    limits: Words
    rests: Words
    values: NDArray[np.float64]
    distance: Decimal


def alias_table(probabilities: Sequence[Decimal], scale: int) -> Table:
    """The table of `scale` times a number that has these probabilities (of 0, 1, ... REACH, and the same for the negative ones)."""
    weights, distance = whole_weights(probabilities)
    # Bucket b begins as that of the value b - 2048; -2048 itself has no weight, and its bucket only another's.
    weight = [0, *reversed(weights[1:]), *weights]
    capacity = 1 << (PROBABILITY_BITS - _BUCKET_BITS)
    own = [(bucket - REACH - 1) * scale for bucket in range(len(weight))]
    other, first = own.copy(), [capacity] * len(weight)
    small = [bucket for bucket, w in enumerate(weight) if w < capacity]
    large = [bucket for bucket, w in enumerate(weight) if w > capacity]
    while small:
        bucket, giver = small.pop(), large[-1]
        first[bucket], other[bucket] = weight[bucket], own[giver]
        weight[giver] -= capacity - weight[bucket]
        if weight[giver] <= capacity:
            large.pop()
            if weight[giver] < capacity:
                small.append(giver)
    for bucket, w in enumerate(first):
        if w == capacity:  # beyond its last word there is no limit, and no choice
            other[bucket], first[bucket] = own[bucket], 0
    limits = [(bucket << _WITHIN_BITS) + (w >> 64) for bucket, w in enumerate(first)]
    values = np.stack([np.array(other, np.float64), np.array(own, np.float64)], axis=1).reshape(-1)
    rests = np.array([w % 2**64 for w in first], np.uint64)
    table = Table(np.array(limits, np.uint64), rests, values, distance)
    for array in (table.limits, table.rests, table.values):
        array.setflags(write=False)
    return table


def joint_distance(upper: float, lower: float) -> float:
    """Bound on the total variation distance between RADIX W + Y and the Gaussian of their variances' sum, where W is a discrete
    Gaussian of variance `upper` and Y a rounded or discrete one of variance `lower`. Holds where it is small."""
    v = 1 / (1 / upper + RADIX**2 / lower)
    return 5 * math.exp(-2 * math.pi**2 * v)


class GridGaussian:
    """Whole numbers distributed as round(N(0, std_steps^2)), up to `failure`.

    `std_steps` lies between MIN_STD and MAX_STD; up to 200 one word a number is used, up to 6,400 two, up to 204,800 three,
    beyond four. Memory: 96 KiB a level, and 0.5 MiB of scratch. An instance serves one thread at a time.

    Law: how coordinates are cut into calls does not change what they get from a stream: drawing a and then b numbers gives those
    of drawing a + b.

    Raises InvalidError for a standard deviation out of range."""

    def __init__(self, std_steps: float) -> None:
        if not MIN_STD <= std_steps <= MAX_STD:
            raise InvalidError(
                f"std_steps is {std_steps!r}; expected from {MIN_STD:g} to {MAX_STD:g} grid steps: choose the step so that "
                f"the noise's standard deviation is within"
            )
        self.std_steps = float(std_steps)
        num_lower = 0
        while std_steps > HIGHEST_STD * RADIX**num_lower:
            num_lower += 1
        lower = Fraction(LOWER_STD**2 * sum(RADIX ** (2 * level) for level in range(num_lower)))
        highest = (Fraction(self.std_steps) ** 2 - lower) / RADIX ** (2 * num_lower)
        self.tables = (*(_lower_table(level) for level in range(num_lower)), _table(highest, num_lower))
        self._joints, upper = 0.0, float(highest)
        for _ in range(num_lower):
            self._joints += joint_distance(upper, LOWER_STD**2)
            upper = RADIX**2 * upper + LOWER_STD**2
        self._words = np.empty((_BLOCK, len(self.tables)), np.uint64)
        self._index, self._limit = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
        self._value = np.empty(_BLOCK, np.float64)

    def failure(self, count: int) -> float:
        """Bound on the total variation distance between `count` drawn numbers and as many ideal ones, at most 2^-77 a number.

        A mechanism that is (epsilon, delta)-private with the ideal numbers is (epsilon, delta + (1 + e^epsilon) failure)-private
        with these: both neighbours' outputs are off by as much."""
        with localcontext(Context(prec=60)):
            each = sum(table.distance for table in self.tables) + Decimal(self._joints)
            return min(1.0, math.nextafter(float(count * each), math.inf))

    def add_to(self, steps: Tensor, stream: NoiseStream) -> None:
        """Adds a number to each element, in place. `steps` is float64, 1-D, contiguous and on the CPU, and holds whole numbers;
        sums are exact as long as they stay below 2^53. Raises InvalidError for any other tensor."""
        if steps.dtype != torch.float64 or steps.dim() != 1 or not steps.is_contiguous() or steps.device.type != "cpu":
            raise InvalidError(
                f"noise is added to contiguous 1-D float64 tensors on the CPU; this one is {steps.dtype} of shape "
                f"{tuple(steps.shape)} on {steps.device}"
            )
        numbers = steps.detach().numpy()
        for start in range(0, len(numbers), _BLOCK):
            self._add_block(numbers[start : start + _BLOCK], stream)

    def draw(self, count: int, stream: NoiseStream) -> NDArray[np.int64]:
        """The next `count` numbers, [count]."""
        numbers = torch.zeros(count, dtype=torch.float64)
        self.add_to(numbers, stream)
        return numbers.numpy().astype(np.int64)

    def __reduce__(self) -> tuple[type[GridGaussian], tuple[float]]:
        # The scratch holds the last numbers drawn.
        return GridGaussian, (self.std_steps,)

    def _add_block(self, numbers: NDArray[np.float64], stream: NoiseStream) -> None:
        words, value = self._words[: len(numbers)], self._value[: len(numbers)]
        index, limit = self._index[: len(numbers)], self._limit[: len(numbers)]
        # As `take` wants them: the same memory, without a conversion.
        places = index.view(np.int64)
        stream.fill(words)
        for level, table in enumerate(self.tables):
            word = words[:, level]
            np.right_shift(word, _WITHIN_BITS, out=index)
            # All indices are in range; "raise", the default, would copy.
            np.take(table.limits, places, out=limit, mode="wrap")
            # Below zero where the word is below the limit, which the first bit then says.
            np.subtract(word, limit, out=limit)
            if not limit.all():
                self._decide(limit, index, table, stream)
            np.right_shift(limit, 63, out=limit)
            np.left_shift(index, 1, out=index)
            np.bitwise_or(index, limit, out=index)
            np.take(table.values, places, out=value, mode="wrap")
            np.add(numbers, value, out=numbers)

    def _decide(self, below: Words, index: Words, table: Table, stream: NoiseStream) -> None:
        """Where a word is equal to its limit: below it after all, or not."""
        for place in np.flatnonzero(below == 0).tolist():
            if stream.spare() < int(table.rests[index[place]]):
                below[place] = 2**64 - 1


def _table(variance: Fraction, level: int) -> Table:
    return alias_table(discrete_gaussian(variance) if level else rounded_gaussian(variance), RADIX**level)


@cache
def _lower_table(level: int) -> Table:
    return _table(Fraction(LOWER_STD**2), level)


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def _densities(inverse: Decimal, last: int) -> list[Decimal]:
    """exp(-k^2 / 2 * inverse) for k = 0, 1, ... last, each from the one before."""
    ratio = (-inverse / 2).exp()
    square, weights = ratio * ratio, [Decimal(1)]
    for _ in range(last):
        weights.append(weights[-1] * ratio)
        ratio *= square
    return weights


def _cell(k: int, inverse: Decimal) -> Decimal:
    """Integral of exp(-(k t + t^2 / 2) * inverse) over -1/2 .. 1/2: the sum of b[n] / (n + 1) over even n, b[n] = a[n] / 2^n."""
    before, term, total, n = Decimal(0), Decimal(1), Decimal(1), 0
    while abs(before) + abs(term) > Decimal("1e-50"):
        before, term, n = term, -(k * term / 2 + before / 4) * inverse / (n + 1), n + 1
        if n % 2 == 0:
            total += term / (n + 1)
    return total
