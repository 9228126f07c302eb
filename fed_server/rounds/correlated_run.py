"""A private run whose rounds' noises are correlated, so that what one adds the next ones partly take back: no amplification by
sampling, and no secret who takes part. The maths is in `fed_core.privacy.correlated`.

The whole run is one Gaussian mechanism and is charged whole, in the transaction that opens its first round: what it would cost to
stop early is the same. Noise is drawn again in later rounds, so each round has a stream of its own, made of the run's key and its
number; the key lies in a file that is deleted with the run. A client is asked at most max_participations times and never twice
within min_separation rounds, which the sensitivity counts on: both are read off the assignments, so that no restart forgets one.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence

from blake3 import blake3

from fed_core.errors import CorruptError
from fed_server.aggregation.private import PrivateNoise
from fed_server.config import RunConfig
from fed_server.config_privacy import BandedInverseConfig, IndependentConfig
from fed_server.privacy.mechanisms import FINER_BITS, factorization_of
from fed_server.rounds.cohort import next_in_turn
from fed_server.rounds.private_run import PrivateRun
from fed_server.rounds.surroundings import Facilities, Surroundings
from fed_server.store.base import LedgerRecord, RunRecord

_KEY_BYTES = 32


class CorrelatedRun(PrivateRun):
    """A round's sum takes part of the noise of earlier rounds with it."""

    def __init__(
        self, facilities: Facilities, surroundings: Surroundings, record: RunRecord, config: RunConfig
    ) -> None:
        super().__init__(facilities, surroundings, record, config)
        assert not isinstance(self._privacy.correlation, IndependentConfig)
        self._correlation = self._privacy.correlation
        self._factorization = factorization_of(config, self._privacy)
        self._key = b""

    async def load(self) -> None:
        """See `LiveRun.load`."""
        await self._facilities.workers.disk(self._find_key)
        await super().load()

    def _find_key(self) -> None:
        files = self._facilities.files
        path = files.noise_key_path(self.run_id)
        try:
            self._key = path.read_bytes()
        except FileNotFoundError:
            if self.record.round > 0:
                return  # what is released stands; the next round will say so
            self._key = secrets.token_bytes(_KEY_BYTES)
            part = files.temporary(path)
            with files.disk_errors("keeping the key of a run's noise"):
                part.touch(mode=0o600)
                part.write_bytes(self._key)
                files.publish(part, path)

    async def _step(self) -> float:
        if not self._has_key:
            raise CorruptError(
                f"the key of run {self.record.name}'s noise is gone, so that what its versions carry cannot be taken back: what is "
                "released keeps its guarantee, but the run cannot go on; submit another that begins with its last version",
                offset=0,
            )
        return await super()._step()

    def _is_filling(self) -> bool:
        return super()._is_filling() and self._has_key

    @property
    def _has_key(self) -> bool:
        return len(self._key) == _KEY_BYTES

    def _draw_units(self, number: int) -> set[str]:
        """Those that were asked longest ago, of all that may be asked again."""
        correlation = self._correlation
        turns = {unit: self.turns[names[0]] for unit, names in self._members.items() if names[0] in self.turns}
        allowed = [
            unit
            for unit in self._members
            if unit not in turns
            or (
                turns[unit].num_times < correlation.max_participations
                and number - turns[unit].last_round >= correlation.min_separation
            )
        ]
        return set(next_in_turn(self.config.seed, allowed, round(self._expected_units), turns))

    @property
    def _how_drawn(self) -> str:
        return f"drawn in turn from a roster of {self.config.cohort.size}"

    def _charge(self, charged: Sequence[LedgerRecord], number: int, cohort: Iterable[str]) -> LedgerRecord | None:
        return None if self._charges else super()._charge(charged, number, cohort)

    def _noise(self, number: int, norm: float) -> PrivateNoise:
        weights = self._factorization.noise_weights(number - 1)
        again = [(self._key_of(seed), weight) for seed, weight in weights.items() if seed != number - 1]
        return PrivateNoise(
            self._mechanism(norm).sigma,
            finer_bits=FINER_BITS if isinstance(self._correlation, BandedInverseConfig) else 0,
            key=self._key_of(number - 1),
            drawn_again=tuple(again),
        )

    def _key_of(self, seed: int) -> bytes:
        """Of the stream that round `seed` + 1 drew from."""
        return blake3(str(seed).encode(), key=self._key).digest()
