"""What a site that protects its data by itself lets out besides its update: next to nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fed_client.cli import app
from fed_client.privacy import Limits, PrivacyLedger, SiteAccount
from fed_client.settings import load_settings
from fed_client.training.trainer import WorkloadError
from fed_client.upload import SpoolCorruptError
from fed_client.work import Held, WorkTable
from fed_client.worker import verdict_of
from fed_core.errors import InvalidError
from fed_core.plan import PrivacyPlan
from fedstream.v1 import participation_pb2
from tests.client.site_jobs import LOCAL, plan


def held(privacy: PrivacyPlan | None) -> Held:
    return Held(participation_pb2.Assignment(assignment_id="a1", run_id="r", plan=plan(privacy).to_proto()))


WORKLOAD = WorkloadError("WORKLOAD", "the label 17 of patient Ann is unknown", "Traceback: patient Ann")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (WORKLOAD, participation_pb2.FAILURE_KIND_WORKLOAD),
        (WorkloadError("NOT_FINITE", "17 of Ann"), participation_pb2.FAILURE_KIND_NOT_FINITE),
        (WorkloadError("TRAINER_DIED", "it printed: Ann", "Ann"), participation_pb2.FAILURE_KIND_TRAINER_DIED),
        (ValueError("Ann"), participation_pb2.FAILURE_KIND_REFUSED_BY_SITE),
    ],
)
def test_what_code_said_of_the_data_stays_at_the_site(error: Exception, kind: int) -> None:
    verdict = verdict_of(held(LOCAL), error)
    assert verdict.kind == kind
    assert "Ann" not in verdict.message + verdict.traceback
    assert "17" not in verdict.message
    assert "in the site's log alone" in verdict.message
    assert "Ann" in verdict_of(held(None), error).message


@pytest.mark.parametrize(
    "error",
    [
        InvalidError("privacy budget: above the site's own limit"),
        WorkloadError("REFUSED_BY_SITE", "DP-SGD cannot train layers of this model"),
        WorkloadError("FINGERPRINT_MISMATCH", "install the version of the workload"),
        SpoolCorruptError("the spooled update no longer verifies"),
    ],
)
def test_refusals_of_our_own_are_passed_on_with_their_cure(error: Exception) -> None:
    assert verdict_of(held(LOCAL), error).message == str(error)


def test_an_assignment_that_asked_for_it_once_cannot_take_it_back() -> None:
    table = WorkTable()
    mine = held(LOCAL)
    table.add(mine)
    table.refresh(held(None).assignment, ends_wait=False)
    assert not mine.assignment.plan.HasField("privacy")
    assert mine.protects_data
    assert "Ann" not in verdict_of(mine, WORKLOAD).message


def test_the_settings_of_the_site_can_be_given_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "site.toml"
    path.write_text("require_privacy = true\nmax_epsilon = 3.0\nmax_delta = 1e-5\n")
    monkeypatch.setenv("FED_CLIENT_MAX_EPSILON", "2.0")
    settings = load_settings({"server": "127.0.0.1:1"}, path)
    assert (settings.require_privacy, settings.max_epsilon, settings.max_delta) == (True, 2.0, 1e-5)


def shown(folder: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["privacy", "--state-dir", str(folder), *options])
    return result.exit_code, result.output


def test_the_account_is_shown_and_one_that_cannot_be_read_is_not_taken_for_empty(tmp_path: Path) -> None:
    assert shown(tmp_path) == (0, "nothing was spent: no run asked this site to protect its data by itself\n")
    account = SiteAccount(PrivacyLedger(tmp_path / "privacy.json"), Limits(None, 0.01))
    charge = account.charge(held(LOCAL).assignment, plan(LOCAL), 10)
    code, text = shown(tmp_path)
    assert code == 0
    for part in ("default", "whole site", "0.001", "-differential privacy over 1 release", "replacing one"):
        assert part in text
    [found] = json.loads(shown(tmp_path, "--json")[1])
    assert (found["unit"], found["epsilon"], found["num_charged"]) == ("client", charge.epsilon, 1)
    (tmp_path / "privacy.json").write_text("{}")
    code, text = shown(tmp_path)
    assert code != 0
    assert "restore it from a backup" in " ".join(text.split())
    code, text = shown(tmp_path / "other")
    assert code != 0
    assert "does not exist; give the folder of a daemon" in " ".join(text.split())
