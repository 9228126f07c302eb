"""`fedctl privacy plan`: its answers against the accountant, what it shows, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binom
from typer.testing import CliRunner, Result

from fed_core.errors import ConfigError
from fed_core.privacy import accounting
from fed_core.privacy.accounting import Spend, default_delta, epsilon, epsilon_without_sampling
from fed_core.privacy.mechanism import central_poisson, local
from fed_server.cli import operator, privacy_render
from fed_server.cli.operator import app
from fed_server.cli.privacy import Kind, Plan, Question, make_plan

ALL_OPTIONS = ("--epsilon", "--noise-multiplier", "--rounds")


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid on which guesses are made: a tenth of the time, and the same for the plan and what it is compared to."""
    monkeypatch.setattr(accounting, "INTERVAL", 1e-3)


def fedctl(*arguments: object) -> Result:
    # COLUMNS: an error's box is otherwise as narrow as the terminal, and breaks sentences.
    return CliRunner().invoke(app, ["privacy", "plan", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})


def planned(*arguments: object) -> dict[str, Any]:
    result = fedctl("--json", *arguments)
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


CENTRAL = ("--sampling-rate", 0.05, "--clients", 1000)


def test_the_noise_for_a_budget_is_what_the_accountant_says() -> None:
    plan = planned("--epsilon", 3, "--rounds", 50, *CENTRAL)
    noise = plan["noise_multiplier"]
    assert plan["asks_for"] == "noise multiplier"
    assert float(f"{noise:.5g}") == noise  # nothing is lost to who copies it
    found = epsilon([Spend(central_poisson(1.0, noise, 0.05), 50)], 1e-4)
    assert plan["epsilon"] == {"pld": found.pld, "rdp": found.rdp}
    assert found.reported <= 3 < epsilon([Spend(central_poisson(1.0, noise * 0.999, 0.05), 50)], 1e-4).reported
    assert plan["delta"] == 1e-4
    assert plan["expected_cohort"] == 50
    assert plan["noise_on_mean"] == pytest.approx(noise / 50)
    assert plan["warnings"] == []


def test_the_epsilon_of_a_noise_is_what_the_accountant_says() -> None:
    plan = planned("--noise-multiplier", 1.5, "--rounds", 40, "--delta", 1e-6, *CENTRAL)
    found = epsilon([Spend(central_poisson(1.0, 1.5, 0.05), 40)], 1e-6)
    assert (plan["asks_for"], plan["epsilon"]) == ("epsilon", {"pld": found.pld, "rdp": found.rdp})
    last = plan["projection"][-1]
    assert last == {"round": 40, "pld": pytest.approx(found.pld), "rdp": pytest.approx(found.rdp)}
    assert plan["projection"][0]["round"] == 1


def test_the_rounds_of_a_budget_are_the_most_that_fit() -> None:
    plan = planned("--noise-multiplier", 1.5, "--epsilon", 1, *CENTRAL)
    mechanism, found = central_poisson(1.0, 1.5, 0.05), plan["num_rounds"]
    assert plan["asks_for"] == "rounds"
    assert (
        epsilon([Spend(mechanism, found)], 1e-4).reported <= 1 < epsilon([Spend(mechanism, found + 1)], 1e-4).reported
    )


def test_who_sees_the_cohorts_is_told_of_no_amplification() -> None:
    spends = [Spend(central_poisson(1.0, 1.5, 0.05), 40)]
    plan = planned("--noise-multiplier", 1.5, "--rounds", 40, *CENTRAL)
    most, failure = plan["max_participations"], plan["coin_failure"]
    # The coins name a client more often with a probability that is in delta, and less often would not do.
    assert failure == pytest.approx(1e-6)
    assert binom.sf(most, 40, 0.05) <= failure < binom.sf(most - 1, 40, 0.05)
    assert plan["epsilon_cohorts_seen"]["pld"] == epsilon_without_sampling(spends, most, 1e-4, failure).pld
    assert plan["epsilon_cohorts_seen"]["pld"] > plan["epsilon"]["pld"]
    kept = planned("--noise-multiplier", 1.5, "--rounds", 40, "--max-participations", 3, *CENTRAL)
    assert (kept["max_participations"], kept["coin_failure"]) == (3, 0)
    assert kept["epsilon_cohorts_seen"]["pld"] == epsilon_without_sampling(spends, 3, 1e-4).pld
    everyone = planned("--noise-multiplier", 5, "--rounds", 4, "--clients", 1000)
    assert everyone["epsilon_cohorts_seen"] == everyone["epsilon"]


def test_local_noise_is_calibrated_to_replacing_and_is_not_amplified() -> None:
    options = ("--kind", "local", "--clients", 1000, "--sampling-rate", 0.1)
    plan = planned("--epsilon", 3, "--rounds", 20, *options)
    noise = plan["noise_multiplier"]
    found = epsilon([Spend(local(1.0, noise), 20)], 1e-4)
    assert plan["epsilon"] == {"pld": found.pld, "rdp": found.rdp}
    assert 2.998 < found.reported <= 3
    # Against adding or removing one the half of it would do: here each update itself is seen.
    assert noise == pytest.approx(2 * accounting.noise_multiplier_for(3, 1e-4, 20, accounting.Everyone()), rel=1e-3)
    assert plan["noise_on_mean"] == pytest.approx(noise / math.sqrt(100))
    few = planned("--epsilon", 3, "--rounds", 20, "--max-participations", 5, *options)
    assert few["noise_multiplier"] == pytest.approx(noise / 2, rel=1e-3)
    assert few["projection"][-1]["round"] == 5
    assert planned("--epsilon", 3, "--noise-multiplier", noise, *options)["num_rounds"] == 20


def test_the_default_delta_is_for_the_clients() -> None:
    plan = planned("--noise-multiplier", 5, "--rounds", 2, "--clients", 3400)
    assert plan["delta"] == default_delta(3400) == 2e-5


def test_the_table_shows_the_answer_both_views_and_the_assumptions() -> None:
    options = ("--noise-multiplier", 1.5, "--rounds", 40, *CENTRAL)
    plan, result = planned(*options), fedctl(*options)
    assert result.exit_code == 0
    shown = " ".join(result.stdout.split())
    figures = dict(re.findall(r"(epsilon|epsilon, cohorts seen) ([0-9.]+) towards", shown))
    # Rounded up: what is shown is a guarantee too.
    for name, key in (("epsilon", "epsilon"), ("epsilon, cohorts seen", "epsilon_cohorts_seen")):
        assert plan[key]["pld"] <= float(figures[name]) <= plan[key]["pld"] * 1.001
    for expected in ("rounds 40", "expected cohort 50", "noise on the mean 0.03", "noise multiplier 1.5", "by RDP"):
        assert expected in shown
    assert plan["claim"] in shown
    for expected in ("adding or removing one", "L2 sensitivity 1", "Poisson sampling", "dp-accounting", "Assumed:"):
        assert expected in plan["claim"]
    assert "•" in result.stdout


def test_the_text_plot_rises_from_the_first_round_to_the_last() -> None:
    lines = str(privacy_render.text_plot(make_plan(question()), 80)).splitlines()
    rows = [line.partition("│")[2] for line in lines if "│" in line]
    tops = [next(index for index, row in enumerate(rows) if row[column] == "•") for column in range(len(rows[0]))]
    assert tops == sorted(tops, reverse=True)
    assert tops[-1] == 0
    assert tops[0] > len(rows) // 2
    assert lines[-1].split() == ["1", "40", "rounds"]


def question(**changes: Any) -> Question:
    given: dict[str, Any] = {
        "kind": Kind.CENTRAL, "epsilon": None, "noise_multiplier": 1.5, "num_rounds": 40, "num_clients": 1000,
        "sampling_rate": 0.05, "delta": 1e-4, "max_participations": None,
    }  # fmt: skip
    return Question(**given | changes)


def test_one_round_has_no_plot() -> None:
    result = fedctl("--noise-multiplier", 3, "--rounds", 1, "--clients", 100)
    assert result.exit_code == 0
    assert "│" not in result.stdout


def test_a_small_cohort_a_large_delta_and_a_large_epsilon_are_warned_of() -> None:
    options = (
        "--noise-multiplier",
        0.49,
        "--rounds",
        120,
        "--sampling-rate",
        0.049,
        "--clients",
        1000,
        "--delta",
        5e-4,
    )
    result = fedctl(*options)
    assert result.exit_code == 0
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 3
    for expected in (
        "expected cohort of 49 clients is small",
        "noise of 0.01 clipping norms",
        "promises little",
        "delta of 0.0005 is large",
    ):
        assert any(expected in line for line in warnings), expected
    assert len(planned(*options)["warnings"]) == 3
    assert "warning" not in result.stdout


def test_warnings_do_not_reach_a_plan_within_bounds() -> None:
    assert make_plan(question()).warnings == []


@pytest.mark.parametrize(
    ("arguments", "option", "cure"),
    [
        (("--epsilon", 3, "--clients", 9), " / ".join(ALL_OPTIONS), "give two of the three"),
        (("--epsilon", 3, "--rounds", 9, "--noise-multiplier", 1, "--clients", 9), " / ".join(ALL_OPTIONS), "give two"),
        (("--epsilon", 3, "--rounds", 9), "--clients", "Missing option"),
        (("--epsilon", 0, "--rounds", 9, "--clients", 9), "--epsilon", "above 0"),
        (("--epsilon", "nan", "--rounds", 9, "--clients", 9), "--epsilon", "above 0"),
        (("--noise-multiplier", -1, "--rounds", 9, "--clients", 9), "--noise-multiplier", "above 0"),
        (("--noise-multiplier", "inf", "--rounds", 9, "--clients", 9), "--noise-multiplier", "finite"),
        (("--epsilon", 3, "--rounds", 0, "--clients", 9), "--rounds", "or equal to 1"),
        (("--epsilon", 3, "--rounds", 9, "--clients", 0), "--clients", "or equal to 1"),
        (("--epsilon", 3, "--rounds", 9, "--clients", 9, "--sampling-rate", 0), "--sampling-rate", "above 0, at most 1"),
        (("--epsilon", 3, "--rounds", 9, "--clients", 9, "--sampling-rate", 1.5), "--sampling-rate", "above 0, at most 1"),
        (("--epsilon", 3, "--rounds", 9, "--clients", 50, "--delta", 0.02), "--delta", "less than 1/50, better 0.002"),
        (("--epsilon", 3, "--rounds", 9, "--clients", 50, "--delta", 0), "--delta", "above 0"),
        (("--epsilon", 3, "--rounds", 9, "--clients", 9, "--max-participations", 0), "--max-participations", "or equal to 1"),
        (("--epsilon", 3, "--rounds", 9, "--clients", 9, "--kind", "example"), "--kind", "'central', 'local'"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named_with_what_it_should_be(arguments: tuple[object, ...], option: str, cure: str) -> None:
    result = fedctl(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    shown = " ".join(re.sub("[│|]", " ", result.stderr).split())
    assert option in shown
    assert cure in shown


def test_a_budget_that_no_round_fits_is_refused_with_the_cure(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--epsilon", "0.01", "--noise-multiplier", "1", "--clients", "1000"]
    with pytest.raises(SystemExit) as exit:
        operator.main(["privacy", "plan", *arguments])
    shown = capsys.readouterr()
    assert exit.value.code == 65
    assert shown.out == ""
    assert "not one round fits" in shown.err
    assert "larger --noise-multiplier" in shown.err


def test_a_budget_that_all_rounds_fit_is_refused_with_the_cure() -> None:
    with pytest.raises(ConfigError, match="more than 1,000,000 rounds fit") as error:
        make_plan(question(kind=Kind.LOCAL, noise_multiplier=1e6, num_rounds=None, epsilon=3.0))
    assert "give --rounds" in error.value.details["cure"]


def test_hardly_any_noise_is_shown_as_no_privacy() -> None:
    options = ("--noise-multiplier", 0.001, "--rounds", 10, *CENTRAL)
    assert planned(*options)["epsilon"] == {"pld": None, "rdp": None}
    result = fedctl(*options)
    assert result.exit_code == 0
    assert "infinite" in result.stdout
    assert "No differential privacy" in " ".join(result.stdout.split())
    assert "│" not in result.stdout


# Pictures


@pytest.mark.parametrize("options", [("--noise-multiplier", 2), ("--epsilon", 3), ("--noise-multiplier", 0.001)])
def test_a_picture_is_written(tmp_path: Path, options: tuple[object, ...]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    result = fedctl(*options, "--rounds", 5, "--clients", 100, "--plot", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {path}" in result.stderr
    assert "•" not in result.stdout


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    def compute(*_: object) -> Plan:
        raise AssertionError("computed")

    monkeypatch.setattr("fed_server.cli.privacy.make_plan", compute)
    for name, code, expected in (("plan.gif", 78, ".png, .svg, .pdf"), ("nowhere/plan.png", 74, "no folder")):
        with pytest.raises(SystemExit) as exit:
            operator.main(
                ["privacy", "plan", "--epsilon", "3", "--rounds", "5", "--clients", "9", "--plot", str(tmp_path / name)]
            )
        assert exit.value.code == code
        assert expected in capsys.readouterr().err


def test_help_loads_no_accountant() -> None:
    code = (
        "import sys\n"
        "from fed_server.cli import operator\n"
        "try: operator.main(['privacy', 'plan', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'scipy', 'dp_accounting', 'matplotlib'} & sys.modules.keys()))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"
    assert "--sampling-rate" in shown.stdout
