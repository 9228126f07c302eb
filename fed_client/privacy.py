"""The site's own account of what its updates gave away, where it protects its data by itself. Free of torch.

An assignment is charged before its training begins, durably, and nothing is ever taken back: whatever becomes of it, nobody can
say that less was released. One charge pays for one update. Its digest is put down, durably as well, before anything of it is sent:

    charged                    no update has left; after a crash the training, and with it the noise, may be done anew
    charged, update = digest   that update may have left, and no other one ever does

What was spent adds up by population, which the coordinator names, and by what is protected: all of a site's data, or its single
examples. The site's own limit counts all populations, for they are all the same data.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isinf
from pathlib import Path
from typing import Any

from blake3 import blake3

from fed_client.durable import write_durably
from fed_core.errors import InvalidError
from fed_core.plan import PrivacyPlan, TrainingPlan
from fed_core.privacy import accounting
from fed_core.privacy.accounting import Spend
from fed_core.privacy.mechanism import DISTANCE_PER_NUMBER, Mechanism, Unit, example_poisson, local
from fedstream.v1 import participation_pb2


class LedgerError(InvalidError):
    """The account does not allow it: it is damaged, or has no charge for what is to be sent."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What an assignment cost: `mechanism` ran `count` times, with noise at a total variation `distance` of the ideal at most;
    `epsilon` is what the population had spent with it, at `delta`; `num_examples` what it goes by, where examples are protected.
    `update` is the digest, in hex, of the update that may have left;
    empty: none has."""

    assignment_id: str
    run_id: str
    round: int
    population: str
    mechanism: Mechanism
    count: int
    delta: float
    distance: float
    epsilon: float
    created_time: float
    num_examples: int | None = None
    update: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        """What the update may say of it. Where examples are protected, nothing: one could tell from it how many there are."""
        return {"privacy.epsilon": self.epsilon} if self.mechanism.unit == "client" else {}

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        return asdict(self) | {"mechanism": self.mechanism.to_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Charge:
        """What `to_json` wrote. Raises what comes of anything else."""
        return cls(**{**fields, "mechanism": Mechanism.from_json(fields["mechanism"])})


@dataclass(frozen=True, slots=True)
class Limits:
    """What the site's administrator allows at most: epsilon over all populations, None for no limit, and delta."""

    max_epsilon: float | None
    max_delta: float


class PrivacyLedger:
    """The file of charges. One daemon owns it (state.py's lock). Thread-safe. A file that is damaged is never taken for an empty
    one: everything raises LedgerError until it is restored."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._charges: dict[str, Charge] | None = None

    def charges(self) -> list[Charge]:
        """Everything charged, the oldest first."""
        with self._lock:
            return list(self._read().values())

    def find(self, assignment_id: str) -> Charge | None:
        """The charge of an assignment, if there is one."""
        with self._lock:
            return self._read().get(assignment_id)

    def add(self, charge: Charge) -> None:
        """Charges an assignment that was not charged yet; durable when it returns. Raises DiskFullError."""
        with self._lock:
            if charge.assignment_id in self._read():
                raise LedgerError(f"assignment {charge.assignment_id} is charged already")
            self._write(charge)

    def sending(self, assignment_id: str, digest: bytes) -> None:
        """Puts down which update of an assignment is sent; durable when it returns. Saying the same again changes nothing. Raises
        LedgerError where there is no charge for it, or another update may have left."""
        with self._lock:
            charge = self._read().get(assignment_id)
            if charge is None:
                raise LedgerError(
                    f"{self._path} has no charge for assignment {assignment_id}, so its update is not sent; was the file "
                    "replaced by an older one?"
                )
            if charge.update not in ("", digest.hex()):
                raise LedgerError(
                    f"another update of assignment {assignment_id} may have left this site; this one does not"
                )
            if not charge.update:
                self._write(replace(charge, update=digest.hex()))

    def _write(self, charge: Charge) -> None:
        charges = {**self._read(), charge.assignment_id: charge}
        text = json.dumps([each.to_json() for each in charges.values()])
        document = {"digest": blake3(text.encode()).hexdigest(), "charges": text}
        write_durably(self._path, json.dumps(document).encode())
        self._charges = charges

    def _read(self) -> dict[str, Charge]:
        if self._charges is None:
            try:
                document = json.loads(self._path.read_bytes())
                text = document["charges"]
                if blake3(text.encode()).hexdigest() != document["digest"]:
                    raise ValueError("its digest is another")
                charges = [Charge.from_json(fields) for fields in json.loads(text)]
            except FileNotFoundError:
                charges = []
            except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidError) as error:
                raise LedgerError(
                    f"the account {self._path} cannot be read ({error}): what was spent is not known, so nothing more is; restore "
                    "it from a backup that is not older than the last update"
                ) from error
            self._charges = {charge.assignment_id: charge for charge in charges}
        return self._charges


class SiteAccount:
    """Decides what this site may still spend, and puts it down."""

    def __init__(self, ledger: PrivacyLedger, limits: Limits, clock: Callable[[], float] = time.time) -> None:
        self._ledger = ledger
        self._limits = limits
        self._clock = clock

    def charge(
        self,
        assignment: participation_pb2.Assignment,
        plan: TrainingPlan,
        num_numbers: int,
        num_examples: int | None = None,
    ) -> Charge:
        """Charges an assignment whose plan asks for privacy, or finds that it was charged and nothing of it has left. A step
        releases `num_numbers` at most; `num_examples` is known where examples are protected. Takes as long as the accountant does.

        Raises InvalidError where the population, or the site, would have spent more than it may, where the plan gives no guarantee,
        and where an update of the assignment may have left; LedgerError where the account cannot be read. None of the messages says
        how many examples there are."""
        privacy = plan.privacy
        assert privacy is not None, "whoever asks for a charge has looked"
        _check_delta(privacy, self._limits, num_examples)
        mechanism, count = _mechanism(privacy, plan, num_examples)
        charged = self._ledger.find(assignment.assignment_id)
        if charged is not None:
            if charged.update:
                raise LedgerError(
                    f"an update of assignment {assignment.assignment_id} may have left this site before; another one, with other "
                    "noise, does not"
                )
            if (charged.mechanism, charged.count) != (mechanism, count):
                raise LedgerError(
                    f"assignment {assignment.assignment_id} was charged for another plan, or for other data; it is not done"
                )
            return charged
        distance = count * num_numbers * DISTANCE_PER_NUMBER
        charge = Charge(
            assignment.assignment_id,
            assignment.run_id,
            assignment.round,
            privacy.population,
            mechanism,
            count,
            privacy.delta,
            distance,
            0.0,
            self._clock(),
            num_examples,
        )
        earlier = [each for each in self._ledger.charges() if each.mechanism.unit == mechanism.unit]
        of_population = [each for each in earlier if each.population == privacy.population]
        charge = replace(charge, epsilon=spent([*of_population, charge], privacy.delta))
        self._check_budget(privacy, charge, of_population, earlier)
        self._ledger.add(charge)
        return charge

    def sending(self, assignment_id: str, digest: bytes) -> None:
        """See `PrivacyLedger.sending`."""
        self._ledger.sending(assignment_id, digest)

    def _check_budget(
        self, privacy: PrivacyPlan, charge: Charge, of_population: Sequence[Charge], earlier: Sequence[Charge]
    ) -> None:
        if isinf(charge.epsilon):
            raise InvalidError(
                f"a noise multiplier of {privacy.noise_multiplier:g} gives no guarantee at all; raise privacy.noise_multiplier"
            )
        if privacy.max_epsilon is not None and charge.epsilon > privacy.max_epsilon:
            raise InvalidError(
                f"privacy budget: this would bring what this site spent on population {privacy.population!r} "
                f"{_figures(of_population, charge, privacy.delta)}above the run's limit of epsilon {privacy.max_epsilon:g} at "
                f"delta {privacy.delta:g}; submit a run with more noise or a higher privacy.max_epsilon, or on another population"
            )
        most = self._limits.max_epsilon
        if most is not None and spent([*earlier, charge], privacy.delta) > most:
            raise InvalidError(
                f"privacy budget: this would bring what this site spent on population {privacy.population!r} and all others "
                f"{_figures(earlier, charge, privacy.delta)}above the site's own limit of epsilon {most:g} at delta "
                f"{privacy.delta:g}; ask its administrator to raise max_epsilon"
            )


def _figures(earlier: Sequence[Charge], charge: Charge, delta: float) -> str:
    """From which epsilon to which; nothing where one could tell from it how many examples there are."""
    if charge.mechanism.unit != "client":
        return ""
    return f"from epsilon {spent(earlier, delta):.4g} to {spent([*earlier, charge], delta):.4g}, "


def spent(charges: Iterable[Charge], delta: float) -> float:
    """Epsilon of charges that protect the same, at `delta`."""
    charges = list(charges)
    return found(charges, delta).reported


def found(charges: Sequence[Charge], delta: float) -> accounting.Epsilon:
    """The same, as both accountants see it. Raises InvalidError where there is no accountant here."""
    spends = [Spend(charge.mechanism, charge.count) for charge in charges]
    try:
        return accounting.epsilon(spends, delta, distance=sum(charge.distance for charge in charges))
    except ImportError as error:
        raise InvalidError(
            f"this site keeps its own account, and has no accountant ({error}): pip install 'fedstream[privacy]'"
        ) from error


@dataclass(frozen=True, slots=True)
class Account:
    """What was spent on a population in one way, at the delta of its last charge, and the claim in words."""

    population: str
    unit: Unit
    num_charged: int
    epsilon: float
    delta: float
    last_time: float
    claim: str


def accounts(charges: Sequence[Charge]) -> list[Account]:
    """What was spent, by population and by what is protected, in the order in which they were first charged. Takes as long as the
    accountant does."""
    grouped: dict[tuple[str, Unit], list[Charge]] = {}
    for charge in charges:
        grouped.setdefault((charge.population, charge.mechanism.unit), []).append(charge)
    return [_account(population, unit, group) for (population, unit), group in grouped.items()]


def _account(population: str, unit: Unit, charges: Sequence[Charge]) -> Account:
    last = charges[-1]
    epsilon = found(charges, last.delta)
    counts: dict[Mechanism, int] = {}
    for charge in charges:
        counts[charge.mechanism] = counts.get(charge.mechanism, 0) + charge.count
    spends = [Spend(mechanism, count) for mechanism, count in counts.items()]
    claim = accounting.claim(spends, epsilon, last.delta, sum(charge.distance for charge in charges))
    return Account(population, unit, len(charges), epsilon.reported, last.delta, last.created_time, claim)


def _mechanism(privacy: PrivacyPlan, plan: TrainingPlan, num_examples: int | None) -> tuple[Mechanism, int]:
    """What an assignment releases, and how often."""
    if privacy.kind == "local":
        return local(privacy.clipping_norm, privacy.noise_multiplier), 1
    if not num_examples:
        raise InvalidError("train_data has no examples; this site cannot train")
    rate = plan.sampling_rate(num_examples)
    return example_poisson(privacy.clipping_norm, privacy.noise_multiplier, rate), plan.num_steps(num_examples)


def _check_delta(privacy: PrivacyPlan, limits: Limits, num_examples: int | None) -> None:
    if privacy.delta > limits.max_delta:
        raise InvalidError(
            f"privacy.delta is {privacy.delta:g}, above this site's max_delta of {limits.max_delta:g}: lower it, or ask the site's "
            "administrator to raise that"
        )
    if privacy.kind == "examples" and num_examples and privacy.delta * num_examples >= 1:
        raise InvalidError(
            f"privacy.delta is {privacy.delta:g}, which is not below 1 / the number of this site's examples: such a guarantee "
            "would allow that one of them is published outright; lower it, best to a tenth of that"
        )
