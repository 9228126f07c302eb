"""The site's own account: nothing leaves uncharged or is charged twice, and nobody spends more than the run or the site allows."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fed_client.privacy
from fed_client.privacy import (
    DISTANCE_PER_NUMBER,
    Charge,
    LedgerError,
    Limits,
    PrivacyLedger,
    SiteAccount,
    accounts,
)
from fed_core.errors import InvalidError
from fed_core.plan import PrivacyPlan
from fed_core.privacy.accounting import Spend, epsilon, rounded_up
from fed_core.privacy.mechanism import example_poisson, local
from fed_core.privacy.noise import GridGaussian
from fedstream.v1 import participation_pb2
from tests.client.site_jobs import plan

LOCAL = PrivacyPlan("local", clipping_norm=2.0, noise_multiplier=8.0, delta=1e-3, population="wards")
EXAMPLES = PrivacyPlan("examples", clipping_norm=2.0, noise_multiplier=1.5, delta=1e-4, population="wards")
NUM_NUMBERS, NUM_EXAMPLES = 1000, 640
FREE = Limits(None, 0.01)


def assignment(name: str = "a1", round: int = 1) -> participation_pb2.Assignment:
    return participation_pb2.Assignment(assignment_id=name, run_id="r1", round=round)


def opened(path: Path, limits: Limits = FREE) -> tuple[PrivacyLedger, SiteAccount]:
    """As a daemon that has just started finds it."""
    ledger = PrivacyLedger(path)
    return ledger, SiteAccount(ledger, limits, clock=lambda: 1234.5)


def charged(account: SiteAccount, privacy: PrivacyPlan, name: str = "a1", **changes: Any) -> Charge:
    num_examples = NUM_EXAMPLES if privacy.kind == "examples" else None
    return account.charge(assignment(name), plan(privacy, **changes), NUM_NUMBERS, num_examples)


def local_epsilon(count: int, delta: float = 1e-3) -> float:
    distance = count * NUM_NUMBERS * DISTANCE_PER_NUMBER
    return epsilon([Spend(local(2.0, 8.0), count)], delta, distance=distance).reported


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "privacy.json"


def test_a_charge_is_on_the_disk_when_it_is_answered(path: Path) -> None:
    _, account = opened(path)
    charge = charged(account, LOCAL)
    ledger, _ = opened(path)
    assert ledger.charges() == [charge]
    assert ledger.find("a1") == charge
    assert (charge.run_id, charge.round, charge.population, charge.created_time) == ("r1", 1, "wards", 1234.5)
    assert (charge.num_examples, charge.update) == (None, "")


def test_where_it_cannot_be_put_down_nothing_is_charged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    ledger, account = opened(path)
    with monkeypatch.context() as patched:
        patched.setattr(fed_client.privacy, "write_durably", full)
        with pytest.raises(OSError, match="no space left"):
            charged(account, LOCAL)
    assert ledger.charges() == []
    assert charged(account, LOCAL).epsilon == pytest.approx(local_epsilon(1))


def test_the_figures_are_those_of_the_accountant_on_the_same_events(path: Path) -> None:
    _, account = opened(path)
    found = [charged(account, LOCAL, f"a{number}") for number in range(3)]
    assert [each.epsilon for each in found] == [local_epsilon(count) for count in (1, 2, 3)]
    assert all((each.mechanism, each.count) == (local(2.0, 8.0), 1) for each in found)
    # One noise of 8 norms where a site's data may move two: noise multiplier 4.
    assert found[0].mechanism.noise_multiplier == 4.0


def test_examples_are_charged_for_every_planned_step_at_the_rate_of_their_coins(path: Path) -> None:
    _, account = opened(path)
    found = charged(account, EXAMPLES, batch_size=8, steps=50)
    mechanism = example_poisson(2.0, 1.5, 8 / NUM_EXAMPLES)
    assert (found.mechanism, found.count) == (mechanism, 50)
    assert (found.mechanism.unit, found.mechanism.relation) == ("example", "add_remove")
    distance = 50 * NUM_NUMBERS * DISTANCE_PER_NUMBER
    assert found.epsilon == epsilon([Spend(mechanism, 50)], 1e-4, distance=distance).reported
    by_epochs = charged(account, EXAMPLES, "a2", batch_size=100, steps=None, epochs=2)
    assert (by_epochs.count, by_epochs.mechanism.sampling) == (14, example_poisson(2, 1, 100 / 640).sampling)


def test_a_batch_that_may_hold_everything_is_not_amplified(path: Path) -> None:
    _, account = opened(path)
    found = charged(account, EXAMPLES, batch_size=10_000, steps=2)
    assert found.epsilon == pytest.approx(epsilon([Spend(local(1.0, 3.0), 2)], 1e-4).reported, rel=1e-5)


def test_drawn_noise_is_as_close_to_the_ideal_as_the_account_says() -> None:
    for std in (2.0**16, 2.0**17 - 1):
        assert GridGaussian(std).failure(1) <= DISTANCE_PER_NUMBER


def test_what_is_protected_in_two_ways_has_two_accounts(path: Path) -> None:
    _, account = opened(path)
    charged(account, LOCAL, "a1")
    charged(account, EXAMPLES, "a2")
    assert charged(account, LOCAL, "a3").epsilon == local_epsilon(2)
    ledger, _ = opened(path)
    found = accounts(ledger.charges())
    assert [(each.population, each.unit, each.num_charged) for each in found] == [
        ("wards", "client", 2),
        ("wards", "example", 1),
    ]
    assert found[0].epsilon == local_epsilon(2)
    assert found[0].claim.startswith(
        f"({rounded_up(found[0].epsilon, 4):g}, 0.001)-differential privacy over 2 releases"
    )
    for words in (
        "one client",
        "differ by replacing one",
        "L2 sensitivity 4",
        "No amplification by sampling",
        "dp-accounting",
    ):
        assert words in found[0].claim
    for words in ("Protected is one", "example", "adding or removing one", "L2 sensitivity 2"):
        assert words in found[1].claim


# One charge, one update


def test_after_a_restart_the_same_assignment_is_not_charged_again(path: Path) -> None:
    _, account = opened(path)
    first = charged(account, LOCAL)
    ledger, account = opened(path)
    assert charged(account, LOCAL) == first
    assert len(ledger.charges()) == 1


def test_another_plan_or_other_data_under_the_same_assignment_is_refused(path: Path) -> None:
    ledger, account = opened(path)
    charged(account, LOCAL, "a1")
    charged(account, EXAMPLES, "a2")
    with pytest.raises(LedgerError, match="a1 was charged for another plan, or for other data"):
        charged(account, replace(LOCAL, noise_multiplier=4.0), "a1")
    with pytest.raises(LedgerError, match="a2 was charged for another plan, or for other data"):
        account.charge(assignment("a2"), plan(EXAMPLES), NUM_NUMBERS, NUM_EXAMPLES + 1)
    assert len(ledger.charges()) == 2


def test_one_update_leaves_and_no_other_one_ever_does(path: Path) -> None:
    _, account = opened(path)
    charged(account, LOCAL)
    account.sending("a1", b"1" * 32)
    ledger, account = opened(path)
    account.sending("a1", b"1" * 32)  # again, after a crash
    with pytest.raises(LedgerError, match="another update of assignment a1 may have left this site"):
        account.sending("a1", b"2" * 32)
    with pytest.raises(LedgerError, match="an update of assignment a1 may have left this site before"):
        charged(account, LOCAL)
    [charge] = ledger.charges()
    assert charge.update == (b"1" * 32).hex()


def test_what_was_never_charged_is_not_sent(path: Path) -> None:
    _, account = opened(path)
    with pytest.raises(
        LedgerError, match=r"has no charge for assignment a1, .* was the file replaced by an older one\?"
    ):
        account.sending("a1", b"1" * 32)
    charge = charged(account, LOCAL)
    with pytest.raises(LedgerError, match="a1 is charged already"):
        opened(path)[0].add(charge)


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _edited(text: str) -> str:
    document = json.loads(text)
    document["charges"] = document["charges"].replace('"round": 1', '"round": 2')
    return json.dumps(document)


@pytest.mark.parametrize(
    "damage",
    [_cut, _edited, lambda _: "", lambda _: "[]", lambda _: "{}"],
    ids=["cut", "edited", "empty", "list", "other"],
)
def test_a_damaged_file_is_never_an_empty_one(path: Path, damage: Any) -> None:
    charged(opened(path)[1], LOCAL)
    path.write_text(damage(path.read_text()))
    before = path.read_bytes()
    ledger, account = opened(path)
    for attempt in (
        ledger.charges,
        lambda: charged(account, LOCAL, "a2"),
        lambda: account.sending("a1", b"1" * 32),
    ):
        with pytest.raises(LedgerError, match=r"cannot be read .* restore it from a backup"):
            attempt()
    assert path.read_bytes() == before


# Limits


def test_the_limit_of_the_run_stops_its_population_and_no_other(path: Path) -> None:
    ledger, account = opened(path)
    limited = replace(LOCAL, max_epsilon=(local_epsilon(2) + local_epsilon(3)) / 2)
    for number in range(2):
        charged(account, limited, f"a{number}")
    with pytest.raises(InvalidError) as refused:
        charged(account, limited, "a2")
    assert str(refused.value) == (
        f"privacy budget: this would bring what this site spent on population 'wards' from epsilon {local_epsilon(2):.4g} to "
        f"{local_epsilon(3):.4g}, above the run's limit of epsilon {limited.max_epsilon:g} at delta 0.001; submit a run with more "
        "noise or a higher privacy.max_epsilon, or on another population"
    )
    assert len(ledger.charges()) == 2
    charged(opened(path)[1], replace(limited, population="others"), "a3")


def test_the_limit_of_the_site_counts_all_populations_for_they_are_the_same_data(path: Path) -> None:
    most = (local_epsilon(2) + local_epsilon(3)) / 2
    ledger, account = opened(path, Limits(most, 0.01))
    charged(account, LOCAL, "a1")
    charged(account, replace(LOCAL, population="others"), "a2")
    with pytest.raises(
        InvalidError,
        match=rf"above the site's own limit of epsilon {most:g} at delta 0.001; ask its administrator to raise",
    ):
        charged(account, replace(LOCAL, population="third"), "a3")
    assert len(ledger.charges()) == 2
    # At another delta what was spent is another figure: it is reckoned anew, not compared with what once was written down.
    with pytest.raises(InvalidError, match=r"above the site's own limit of epsilon \S+ at delta 1e-06"):
        charged(opened(path, Limits(most, 0.01))[1], replace(LOCAL, delta=1e-6, noise_multiplier=16.0), "a4")


def test_a_delta_that_is_too_large_is_refused(path: Path) -> None:
    ledger, account = opened(path, Limits(None, 1e-5))
    with pytest.raises(
        InvalidError, match=r"privacy.delta is 0.001, above this site's max_delta of 1e-05: lower it, or ask"
    ):
        charged(account, LOCAL)
    assert ledger.charges() == []


def test_noise_that_is_next_to_none_is_refused(path: Path) -> None:
    ledger, account = opened(path)
    with pytest.raises(InvalidError, match=r"gives no guarantee at all; raise privacy\.noise_multiplier"):
        account.charge(assignment(), plan(replace(LOCAL, noise_multiplier=0.01), steps=1), 10**9)
    assert ledger.charges() == []


def test_no_refusal_says_how_many_examples_there_are(path: Path) -> None:
    said = []
    limited = replace(EXAMPLES, max_epsilon=1e-3)
    for limits, privacy, num_examples in (
        (FREE, limited, 640),
        (Limits(1e-3, 0.01), EXAMPLES, 640),
        (FREE, replace(EXAMPLES, delta=0.002), 640),
        (FREE, EXAMPLES, 0),
    ):
        ledger, account = opened(path, limits)
        with pytest.raises(InvalidError) as refused:
            account.charge(assignment(), plan(privacy), NUM_NUMBERS, num_examples)
        said.append(str(refused.value))
        assert ledger.charges() == []
    assert "above the run's limit" in said[0]
    assert "above the site's own limit" in said[1]
    # Nor a figure that says so to whoever knows the accountant: epsilon hangs on the rate of the coins.
    for text in said[:2]:
        assert re.findall(r"[0-9.e-]*[0-9]", text) == ["0.001", "0.0001"], text
    assert "is not below 1 / the number of this site's examples" in said[2]
    assert not any(str(number) in text for text in said for number in (640, 1 / 640, 8 / 640))
    assert charged(opened(path)[1], EXAMPLES).metrics == {}
    assert charged(opened(path)[1], LOCAL, "a2").metrics == {"privacy.epsilon": local_epsilon(1)}


def test_without_an_accountant_nothing_is_spent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    monkeypatch.setitem(sys.modules, "dp_accounting.rdp.rdp_privacy_accountant", None)
    ledger, account = opened(path)
    with pytest.raises(InvalidError, match=r"has no accountant \(.*\): pip install 'fedstream\[privacy\]'"):
        charged(account, LOCAL)
    assert ledger.charges() == []
