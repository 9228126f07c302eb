"""The run config: every option survives, is described, and every mistake is explained."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fed_core.codecs.registry import UPLINK_ONLY
from fed_core.errors import ConfigError
from fed_server.config import (
    MAX_CONFIG_BYTES,
    Table,
    config_schema,
    describe_range,
    example_config,
    option_paths,
    parse_run_config,
    to_toml,
    union_members,
)

DOCS = Path(__file__).parents[2] / "docs" / "run-config.md"
BEGIN, END = "<!-- options -->\n", "<!-- end of options -->"

MINIMAL = """
name = "digits"
workload = "digits"
cohort.size = 3
schedule.max_rounds = 10
"""

# Between them these two set every option of every kind to something else than its default.
EVERY_OPTION = [
    """
name = "all-1"
workload = "mnist"
workload_version = "2 \\"quoted\\" \\u007f é"
seed = 9223372036854775807
cohort.size = 7
cohort.min_clients = 6
cohort.quorum = 4
cohort.over_selection = 1.5
cohort.selection = "round_robin"
cohort.labels = { region = "north", "gpu.kind" = "a100" }
schedule = { max_rounds = 3, deadline_seconds = 12.5, time_budget_seconds = 1e-05, max_failed_rounds = 2 }
evaluation = { at = "both", every = 2, metric = "f1_score", direction = "min", deadline_seconds = 3, batch_size = 8 }
stop = { target = -0.25, patience = 4, max_seconds = 1e7 }
keep = { versions = 9 }
average = { decay = 0.9 }

[training]
local_work = { kind = "epochs", epochs = 2 }
batch_size = 5
overridable = ["batch_size", "learning_rate"]
num_threads = 4
objective = { kind = "fednova", strength = 0.5 }
optimizer = { kind = "sgd", learning_rate = 1, momentum = 0.9, weight_decay = 1e-4, epoch_decay = 0.5 }
schedule = { kind = "step", warmup_rounds = 1, every = 2, factor = 0.1, floor = 0.01 }

[aggregation]
kind = "mean"
weighting = "custom"
importance = { north = 2 }
max_weight = 1000
bound = 16.0
merge = [{ pattern = "*.running_*", rule = "keep" }, { pattern = "steps", rule = "maximum" }]

[server_optimizer]
kind = "sgd"
learning_rate = 0.5
schedule = { kind = "constant", warmup_rounds = 1 }
""",
    MINIMAL
    + """
[training.schedule]
kind = "plateau"
warmup_rounds = 1
metric = "train.loss"
direction = "min"
patience = 3
factor = 0.1
floor = 0.01

[server_optimizer]
kind = "adam"
learning_rate = 0.5
beta1 = 0.5
beta2 = 0.5
tau = 0.01
schedule = { kind = "step", warmup_rounds = 1, every = 2, factor = 0.1, floor = 0.01 }
""",
    MINIMAL
    + """
[training.schedule]
kind = "constant"
warmup_rounds = 1

[server_optimizer]
kind = "yogi"
learning_rate = 0.5
beta1 = 0.5
beta2 = 0.5
tau = 0.01
""",
    MINIMAL
    + """
[training]
local_work = { kind = "steps", steps = 20 }
objective = { kind = "fedprox", strength = 0.5 }
optimizer = { kind = "adam", learning_rate = 0.01, weight_decay = 0.1, epoch_decay = 0.9 }
schedule = { kind = "exponential", warmup_rounds = 1, factor = 0.9, floor = 0.01 }

[server_optimizer]
kind = "momentum"
learning_rate = 0.5
momentum = 0.8
schedule = { kind = "cosine", warmup_rounds = 1, floor = 0.01 }
""",
    MINIMAL
    + """
[training]
optimizer = { kind = "adamw", learning_rate = 0.01, weight_decay = 0.1, epoch_decay = 0.9 }
schedule = { kind = "cosine", warmup_rounds = 1, floor = 0.01 }

[server_optimizer]
kind = "adagrad"
learning_rate = 0.5
beta1 = 0.5
tau = 0.01
schedule = { kind = "exponential", warmup_rounds = 1, factor = 0.9, floor = 0.01 }
""",
]


# Every encoding with every option set to something else than its default: an update's, and a delta's.
ENCODINGS = [
    '{ kind = "auto", feedback = false, target_error = 0.125, max_tensor_error = 0.25, match_gain = true, coder = "packed", '
    "max_bits_per_parameter = 0.5 }",
    '{ kind = "raw" }',
    '{ kind = "cast", to = "float16" }',
    '{ kind = "uniform", feedback = false, bits = 3, block = 64, rounding = "stochastic" }',
    '{ kind = "mask", values = "bfloat16" }',
    '{ kind = "fsq", feedback = false, target_error = 0.125, max_tensor_error = 0.25, match_gain = true, coder = "packed", '
    "contexts = false }",
    '{ kind = "lrq", feedback = false, target_error = 0.125, max_tensor_error = 0.25, match_gain = true, coder = "packed", '
    "max_rank = 3, residual = false }",
    '{ kind = "sign", feedback = false, block = 64 }',
    '{ kind = "ternary", feedback = false, fraction = 0.125 }',
    '{ kind = "topk", feedback = false, fraction = 0.125, values = { kind = "cast", to = "float16" } }',
    '{ kind = "topk", values = { kind = "uniform", bits = 3, block = 64, rounding = "stochastic" } }',
    '{ kind = "topk", values = { kind = "fsq", target_error = 0.125, coder = "packed" } }',
    '{ kind = "randomk", feedback = false, fraction = 0.125, unbiased = false, values = { kind = "raw" } }',
    '{ kind = "ectcq", feedback = false, target_error = 0.125, max_tensor_error = 0.25, match_gain = true, coder = "packed", '
    "states = 8 }",
    '{ kind = "powersgd", rank = 3, values = "float16" }',
]
EVERY_OPTION += [
    f'{MINIMAL}uplink = {encoding}\ndownlink = {{ kind = "delta", encoding = {encoding} }}\n' for encoding in ENCODINGS
]
ROBUST = (
    'num_byzantine = 2, num_byzantine_population = 4, mixing = "nearest", bound = 16.0, '
    'merge = [{ pattern = "b*", rule = "keep" }]'
)
AGGREGATORS = [
    f'{{ kind = "median", {ROBUST} }}',
    f'{{ kind = "trimmed_mean", trim = 0.25, {ROBUST} }}',
    f'{{ kind = "krum", {ROBUST} }}',
    f'{{ kind = "multi_krum", num_averaged = 3, {ROBUST} }}',
    f'{{ kind = "bulyan", {ROBUST} }}',
    f'{{ kind = "geometric_median", iterations = 7, smoothing = 0.5, {ROBUST} }}',
    f'{{ kind = "norm_bounding", clipping_norm = 0.5, {ROBUST} }}',
    f'{{ kind = "centered_clipping", clipping_norm = 0.5, iterations = 7, {ROBUST} }}',
]
EVERY_OPTION += [
    MINIMAL.replace("size = 3", "size = 20") + f"aggregation = {aggregator}\n" for aggregator in AGGREGATORS
]
EVERY_OPTION += [
    f'{MINIMAL}training.objective = {{ kind = "feddyn", strength = 0.5, population = 9 }}\n',
    f'{MINIMAL}training.objective = {{ kind = "scaffold", population = 9 }}\nuplink.kind = "raw"\n',
    f'{MINIMAL}uplink = {{ kind = "eden", bits = 3, unbiased = false }}\n',
    f'{MINIMAL}downlink = {{ kind = "lattice", step = 2.0, finest_step = 0.5, first_error = 0.01 }}\n',
    f'{MINIMAL}downlink = {{ kind = "raw" }}\n',
    f'{MINIMAL}cohort.selection = "importance"\ncohort.equal_part = 0.5\n',
    f'{MINIMAL}aggregation = {{ kind = "mean", weighting = "inverse_loss", smallest_loss = 0.5 }}\n',
    f'{MINIMAL}aggregation = {{ kind = "qfedavg", fairness = 2.0, lipschitz = 5.0, bound = 16.0, '
    'merge = [{ pattern = "b*", rule = "keep" }] }\n',
    f"{MINIMAL}[training.learning_rate_by_site]\nnorth = 0.05\n",
]
EVERY_OPTION += [
    f'{MINIMAL}evaluation.at = "coordinator"\naggregation = {{ kind = "mean", weighting = "uniform" }}\n'
    f'[privacy]\nkind = "{kind}"\nclipping_norm = 0.5\nnoise_multiplier = 4.0\ndelta = 1e-5\nmax_epsilon = 8.0\n'
    'population = "wards"\n'
    for kind in ("local", "examples")
]
CENTRAL = (
    'evaluation.at = "coordinator"\naggregation = { kind = "mean", weighting = "uniform" }\n[privacy]\nkind = "central"\n'
    'sampling_rate = 0.5\nnoise_multiplier = 2.0\ndelta = 1e-5\nmax_epsilon = 8.0\npopulation = "wards"\n'
    'units = { hospital = ["ward-a", "ward-b"] }\n'
)
EVERY_OPTION += [
    f"{MINIMAL}{CENTRAL}{options}"
    for options in (
        'clipping = { kind = "adaptive", initial_norm = 0.5, quantile = 0.9, learning_rate = 0.5 }\n',
        'clipping = { kind = "fixed", norm = 2.0 }\n'
        'correlation = { kind = "tree", max_participations = 2, min_separation = 3 }\n',
        'clipping = { kind = "fixed", norm = 2.0 }\n'
        'correlation = { kind = "banded_inverse", bands = 4, max_participations = 2, min_separation = 3 }\n',
    )
]


BUFFERED = 'aggregation.weighting = "uniform"\naggregation.kind = "mean"\nevaluation.at = "none"\n'
EVERY_OPTION += [
    f'{MINIMAL}{BUFFERED}rounds = {{ kind = "buffered", concurrency = 9, max_staleness = 3, staleness = {staleness} }}\n'
    for staleness in ('{ kind = "constant" }', '{ kind = "polynomial", exponent = 1.5 }')
]


def test_the_example_is_a_config_with_every_default() -> None:
    assert parse_run_config(example_config()) == parse_run_config(MINIMAL)


def test_the_example_shows_every_option_of_the_default_kinds() -> None:
    example = example_config()
    for path, kind, field in option_paths():
        if (
            kind in ("", "epochs", "sgd", "mean", "auto", "lattice", "synchronous")
            and not union_members(field)
            and not re.search(r"merge\.|encoding\.", path)
        ):
            assert f"{path.rsplit('.', 1)[-1]} = " in example, path


@pytest.mark.parametrize("text", EVERY_OPTION)
def test_a_config_survives_the_trip_through_toml(text: str) -> None:
    config = parse_run_config(text)
    assert parse_run_config(to_toml(config)) == config


def test_the_trip_leaves_out_no_option() -> None:
    """Each option, of each kind, is set to something else than its default in one of the configs above, and comes back so."""
    changed = set()
    for text in EVERY_OPTION:
        before, after = (dict(_values(parse_run_config(t))) for t in (text, to_toml(parse_run_config(text))))
        assert before == after
        changed |= {key for key, (value, field) in after.items() if field.is_required() or value != field.default}
    # The name of the only kind, and of the default kind, cannot differ from the default.
    fixed = {(path, kind) for path, kind, _ in option_paths() if path.endswith(".kind")}
    # A delta that says one of these is refused.
    fixed |= {(path, kind) for path, kind, _ in option_paths() if path.startswith("downlink.") and kind in UPLINK_ONLY}
    plain = {(path, kind) for path, kind, field in option_paths() if not union_members(field)}
    assert plain - fixed - changed == set()


def _values(table: Table, prefix: str = "") -> Iterator[tuple[tuple[str, str], tuple[Any, FieldInfo]]]:
    kind = getattr(table, "kind", "")
    for name, field in type(table).model_fields.items():
        value = getattr(table, name)
        yield (f"{prefix}{name}", kind), (value, field)
        for member in value if isinstance(value, tuple) else (value,):
            if isinstance(member, Table):
                yield from _values(member, f"{prefix}{name}.")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        parse_run_config(MINIMAL).name = "other"  # type: ignore[misc]


def test_the_schema_accepts_what_the_parser_accepts_and_refuses_unknown_keys() -> None:
    schema = config_schema()
    for text in (*EVERY_OPTION, example_config()):
        jsonschema.validate(tomllib.loads(text), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tomllib.loads(MINIMAL + "cohort.sise = 3"), schema)


def test_rules_that_compare_updates_say_what_the_cohort_lacks() -> None:
    large = MINIMAL.replace("size = 3", "size = 4096\ncohort.over_selection = 1.5")
    with pytest.raises(
        ConfigError, match=r"aggregation\.kind: krum compares every update .* over_selection is 6,144; lower"
    ):
        parse_run_config(large + 'aggregation = { kind = "krum", num_byzantine = 1 }')
    with pytest.raises(ConfigError, match=r"median compares every update"):
        parse_run_config(large + 'aggregation = { kind = "median", num_byzantine = 1, mixing = "nearest" }')
    parse_run_config(large + 'aggregation = { kind = "median", num_byzantine = 1 }')
    small = MINIMAL.replace("size = 3", "size = 9\ncohort.quorum = 7")
    with pytest.raises(
        ConfigError, match=r"num_averaged: expected at most cohort.quorum - num_byzantine - 2 = 3, got 4; bad"
    ):
        parse_run_config(small + 'aggregation = { kind = "multi_krum", num_byzantine = 2, num_averaged = 4 }')


def test_a_draw_by_importance_is_for_a_mean_whose_weights_are_known_before() -> None:
    importance = MINIMAL + 'cohort.selection = "importance"\n'
    for text, problem in (
        (
            "cohort.over_selection = 1.5",
            r'cohort\.over_selection: expected 1 with selection = "importance", got 1.5; who is slow',
        ),
        (
            'aggregation = { kind = "median", num_byzantine = 1 }\ncohort.quorum = 3',
            r"cohort\.selection: .* median is no mean",
        ),
        ('aggregation = { kind = "mean", weighting = "custom" }', r'aggregation\.weighting: .* take "examples"'),
        (
            'aggregation = { kind = "mean", max_weight = 9 }',
            r"aggregation\.max_weight: has no effect with cohort.selection",
        ),
        ('training.objective.kind = "fednova"', r"training\.objective: fednova needs more than a mean"),
    ):
        with pytest.raises(ConfigError, match=problem):
            parse_run_config(importance + text)
        parse_run_config(MINIMAL + text)
    with pytest.raises(ConfigError, match=r'cohort\.equal_part: has no effect without selection = "importance"'):
        parse_run_config(MINIMAL + "cohort.equal_part = 0.5")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            'aggregation = { kind = "median", num_byzantine = 1 }',
            r"aggregation.kind: median combines updates of one version",
        ),
        (
            'aggregation = { kind = "mean" }',
            r'aggregation.weighting: expected "uniform" in buffered rounds, got "examples"; .* set',
        ),
        (
            'aggregation = { kind = "mean", weighting = "uniform", importance = { north = 2 } }',
            r"aggregation.importance: has no effect in buffered rounds, .*; delete it",
        ),
        ('training.objective = { kind = "fednova" }', r"training.objective: fednova takes it that .*; take \"plain\""),
        ("cohort.over_selection = 1.5", r"cohort.over_selection: has no effect in buffered rounds, .*; delete it"),
        ('cohort.selection = "importance"', r'cohort.selection: "importance" gives updates weights .*; take "random"'),
        (
            'evaluation.at = "clients"',
            r'evaluation.at: expected "coordinator" or "none" in buffered rounds, got "clients"; .* set',
        ),
        ("stop.target = 0.5", r'stop.target: needs a measured metric, .* set evaluation.at to "coordinator"'),
        ("cohort.size = 2049", r"cohort.size: expected at most 2048 in buffered rounds, got 2049; .* lower it"),
    ],
)
def test_what_buffered_rounds_cannot_do_is_refused_with_the_cure(line: str, says: str) -> None:
    lines = {
        "cohort.size": "cohort.size = 3",
        "schedule.max_rounds": "schedule.max_rounds = 10",
        "aggregation": 'aggregation = { kind = "mean", weighting = "uniform" }',
        "evaluation.at": 'evaluation.at = "none"',
        "rounds": 'rounds = { kind = "buffered", concurrency = 9 }',
    }
    base = 'name = "digits"\nworkload = "digits"\n'
    parse_run_config(base + "\n".join(lines.values()))
    with pytest.raises(ConfigError, match=says):
        parse_run_config(base + "\n".join((lines | {line.partition(" = ")[0]: line}).values()))


def test_buffers_may_be_larger_than_the_clients_that_must_be_there() -> None:
    text = f"{MINIMAL}{BUFFERED}cohort.min_clients = 1\n"
    parse_run_config(text + 'rounds = { kind = "buffered", concurrency = 1 }')
    with pytest.raises(
        ConfigError, match=r"cohort.min_clients: expected at least quorum \(2\), got 1; a round would begin"
    ):
        parse_run_config(text)


def test_quorum_and_min_clients_follow_from_the_size() -> None:
    cohort = parse_run_config(MINIMAL.replace("size = 3", "size = 10")).cohort
    assert (cohort.min_clients, cohort.quorum) == (10, 7)


def test_adam_has_no_momentum_to_send() -> None:
    assert parse_run_config(EVERY_OPTION[1]).training.optimizer.momentum == 0.0


# Descriptions


def test_every_option_has_a_description() -> None:
    assert [path for path, _, field in option_paths() if not field.description] == []


def test_the_documentation_lists_every_option_as_it_is() -> None:
    """`UPDATE_DOCS=1 pytest tests/server/test_config.py` writes the table anew."""
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(before + BEGIN + _options_table() + END + after)
        table = _options_table()
    assert table == _options_table()


def _options_table() -> str:
    """What several kinds have in common is one line, and a choice that was listed before is not listed again."""
    lines: list[str] = []
    kinds: dict[str, list[str]] = {}
    listed: dict[tuple[str, ...], str] = {}
    repeated: list[str] = []
    for path, kind, field in option_paths():
        if any(path.startswith(f"{table}.") for table in repeated):
            continue
        members = union_members(field)
        if len(members) > 1 and listed.setdefault(tuple(members), path) != path:
            repeated.append(path)
        if path.endswith(".kind"):
            continue
        is_only = field.annotation in members.values()
        if is_only or (len(members) > 1 and "." not in path):
            only = next(iter(members))
            kind_of = f' `kind = "{only}"`: {members[only].__doc__}' if is_only and only else ""
            lines += ["", f"### `[{path}]`", "", f"{field.description}{kind_of}", ""]
            lines += ["| option | values | default | meaning |", "|---|---|---|---|"]
            if is_only:
                continue
        values = "one of " + ", ".join(members) if len(members) > 1 else describe_range(field) or _type(field)
        seen = f" Its keys are those of `[{listed[tuple(members)]}]`." if path in repeated else ""
        meaning = f"{field.description}{seen}".replace("|", r"\|")
        rest = f" | {values} | {_default(field)} | {meaning} |"
        of_kinds = kinds.setdefault(f"{path}{rest}", [])
        if not of_kinds:
            lines.append(f"{path}{rest}")
        if kind not in of_kinds:
            of_kinds.append(kind)
    for number, line in enumerate(lines):
        if line in kinds:
            path, rest = line.split(" ", 1)
            names = ", ".join(f"`{kind}`" for kind in kinds[line])
            lines[number] = f"| `{path}`" + (f" ({names})" if _is_choice(path) else "") + f" {rest}"
    return "| option | values | default | meaning |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"


def _is_choice(path: str) -> bool:
    table = path.rpartition(".")[0]
    return any(path == table and len(union_members(field)) > 1 for path, _, field in option_paths())


def _type(field: FieldInfo) -> str:
    annotation = str(field.annotation)
    words = {"dict": "table", "tuple": "array of tables", "float": "number", "str": "text", "bool": "true, false"}
    for word, meaning in words.items():
        if word in annotation:
            return meaning
    raise AssertionError(f"name the type of {annotation}")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "see there"
    match field.default:
        case None:
            return "unset"
        case BaseModel():
            return f"`{field.default.kind}`"  # type: ignore[attr-defined]
        case bool():
            return "true" if field.default else "false"
        case str() if not field.default:
            return "empty"
        case str():
            return f"`{field.default}`"
        case tuple() | dict():
            return "empty"
        case _:
            return f"{field.default:g}"


# Mistakes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cohort.sise = 3", "cohort.sise: there is no such key; did you mean 'size'?"),
        ("sed = 1", "sed: there is no such key; did you mean 'seed'?"),
        ("learning_rate = 1", "learning_rate: there is no such key here; did you mean 'training.optimizer.learning_rate'?"),
        ("trainig.batch_size = 3", "trainig: there is no such key; did you mean 'training'?"),
        ("cohort.quorum = 4", "cohort.quorum: expected at most size (3), got 4; no round could close: lower quorum"),
        ("cohort.min_clients = 1", "cohort.min_clients: expected at least quorum (2), got 1; "),
        ("cohort.quorum = -1", "cohort.quorum: expected 1 to 65536, got -1"),
        ('cohort.quorum = "2"', 'cohort.quorum: expected a whole number, 1 to 65536, got "2"'),
        ("cohort.over_selection = true", "cohort.over_selection: expected a number, 1 to 10, got true"),
        ("cohort.over_selection = nan", "cohort.over_selection: expected a finite number, 1 to 10, got nan"),
        ('cohort.labels."a b" = "c"', "cohort.labels.a b: expected only characters of a-zA-Z0-9._-, got"),
        ("schedule.time_budget_seconds = 600", "schedule.time_budget_seconds: expected less than deadline_seconds (600)"),
        ('training.local_work.kind = "step"', 'training.local_work.kind: expected "epochs" or "steps", got "step"; did you mean'),
        ('training.local_work.kind = "steps"', "training.local_work.steps: is missing; write steps = 100 under"),
        ("training.local_work = 3", "training.local_work: expected a table, got 3"),
        ("training.optimizer.momentum = 0.9", 'training.optimizer: has no kind; add kind = "sgd", "adam" or "adamw"'),
        (
            'training.optimizer = { kind = "adam", momentum = 0.9 }',
            "did you mean 'training.optimizer.momentum', which needs kind = \"sgd\"?",
        ),
        ('training.optimizer = { kind = "sgd", momentum = 1 }', "training.optimizer.momentum: expected at least 0, less than 1"),
        ('training.optimizer.kind = "adam"\ntraining.objective.kind = "fednova"', "training.objective: fednova divides updates"),
        ('training.objective = { kind = "fedprox", strength = -1 }', "training.objective.strength: expected 0 to 1000000"),
        ('training.objective.kind = "fedavg"', 'training.objective.kind: expected "plain", "fedprox", "fednova", "feddyn" or "s'),
        ('training.objective.kind = "feddyn"', "training.objective.population: is missing; write population = 10 under"),
        ('training.overridable = ["lr"]', 'training.overridable[0]: expected "batch_size", "learning_rate"'),
        ('training.overridable = ["optimizer", "optimizer"]', "training.overridable: expected each name once"),
        ('aggregation = { kind = "mean", merge = [{ pattern = "x", rule = "men" }] }', 'merge[0].rule: expected "mean", "maxi'),
        ('aggregation = { kind = "mean", merge = [{ patern = "x" }] }', "aggregation.merge[0].patern: there is no such key; did "),
        ('aggregation.weighting = "uniform"', 'aggregation: has no kind; add kind = "mean", "qfedavg", "median", "trimmed_mean", '),
        ('aggregation = { kind = "mean", weighting = "uniform", max_weight = 3 }', "aggregation.max_weight: has no effect with "),
        ('aggregation = { kind = "mean", importance = { "a b" = 2 } }', "aggregation.importance.a b: expected only characters of"),
        ('aggregation = { kind = "mean", importance = { a = 0 } }', "aggregation.importance.a: expected "),
        ('aggregation = { kind = "mean", max_weight = 2, importance = { a = 3 } }', "aggregation.importance: expected at most max"),
        ('aggregation = { kind = "median", weighting = "custom", num_byzantine = 1 }', "aggregation.weighting: there is no such "
         "key here; did you mean 'aggregation.weighting', which needs kind = \"mean\"?"),
        ('aggregation = { kind = "median" }', "aggregation.num_byzantine: is missing; write num_byzantine = 1 under [aggregation]"),
        ('aggregation = { kind = "median", num_byzantine = 1 }', "aggregation.num_byzantine: median needs 2f + 1 = 3 updates, "
         "and a round may close with cohort.quorum = 2; raise the quorum, or lower num_byzantine from 1"),
        ('cohort.quorum = 3\naggregation = { kind = "trimmed_mean", num_byzantine = 1, trim = 0.3 }', "aggregation.trim: "
         "expected at least num_byzantine / cohort.quorum = 0.3333, got 0.3; a round may close with so few updates"),
        ('cohort.quorum = 3\naggregation = { kind = "trimmed_mean", num_byzantine = 1, trim = 0.5 }', "aggregation.trim: "
         "expected more than 0, less than 0.5, got 0.5"),
        ('cohort.quorum = 3\naggregation = { kind = "median", num_byzantine = 1 }\ntraining.objective = { kind = "fednova" }',
         "training.objective: fednova scales what was combined by the mean of what the sites say"),
        ('uplink.kind = "zip"', 'uplink.kind: expected "auto", "raw", "cast", "uniform", "mask", "fsq", "lrq", "sign", '
         '"ternary", "topk", "randomk", "ectcq", "eden" or "powersgd", got "zip"'),
        ("uplink.bits = 3", 'uplink: has no kind; add kind = "auto", "raw"'),
        ('uplink = { kind = "uniform", bits = 9 }', "uplink.bits: expected 2 to 8, got 9"),
        ('uplink = { kind = "uniform", block = 100 }', "uplink.block: expected 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, "),
        ('uplink = { kind = "cast", to = "int8" }', 'uplink.to: expected "float16" or "bfloat16", got "int8"'),
        ('uplink = { kind = "auto", max_bits_per_parameter = 0 }', "max_bits_per_parameter: expected more than 0, at most 32, got"),
        ('uplink = { kind = "lrq", residual = 3 }', "uplink.residual: expected true or false, got 3"),
        ('uplink = { kind = "auto", bits = 3 }', "did you mean 'uplink.bits', which needs kind = \"uniform\" or \"eden\"?"),
        ('downlink = { kind = "lattice", step = 0 }', "downlink.step: expected more than 0, at most 1024, got 0"),
        ('downlink = { kind = "raw", step = 2 }', "did you mean 'downlink.step', which needs kind = \"lattice\"?"),
        ('downlink = { kind = "delta", encoding = { kind = "raw", bit = 3 } }', "downlink.encoding.bit: there is no such key"),
        ('downlink = { kind = "delta", encoding = { kind = "fsq", feedback = true } }', "downlink.encoding.feedback: is for an up"),
        ('downlink = { kind = "delta", encoding = { kind = "eden" } }', 'downlink.encoding.kind: "eden" is for an uplink only: it '
         "rotates in floating point"),
        ('downlink = { kind = "delta", encoding = { bits = 3 } }', 'downlink.encoding: has no kind; add kind = "auto", "raw"'),
        ('server_optimizer.kind = "fedadam"', 'server_optimizer.kind: expected "sgd", "momentum", "adagrad", "adam" or "yogi"'),
        ('server_optimizer = { kind = "sgd", tau = 0.1 }', "did you mean 'server_optimizer.tau', which needs kind = \"adagrad\", "),
        ('server_optimizer = { kind = "adam", beta2 = 1 }', "server_optimizer.beta2: expected at least 0, less than 1, got 1"),
        ('server_optimizer = { kind = "adam", tau = 0 }', "server_optimizer.tau: expected more than 0, at most 1000000, got 0"),
        ('server_optimizer.schedule = { kind = "plateau" }', 'server_optimizer: has no kind; add kind = "sgd", "momentum"'),
        ('server_optimizer = { kind = "sgd", schedule = { kind = "plateau" } }', 'server_optimizer.schedule.kind: expected '
         '"constant", "step", "exponential" or "cosine", got "plateau"'),
        ('training.schedule = { kind = "step" }', "training.schedule.every: is missing; write every = 10 under"),
        ('training.schedule = { kind = "exponential", factor = 1.5 }', "training.schedule.factor: expected more than 0, at most 1"),
        ('training.schedule = { kind = "cosine", floor = 0 }', "training.schedule.floor: expected more than 0, at most 1, got 0"),
        ('training.schedule = { kind = "cosine", warmup_rounds = 10 }', "training.schedule.warmup_rounds: expected less than "
         "schedule.max_rounds (10), got 10; no round would have the whole learning rate: lower it"),
        ('training.schedule = { kind = "plateau", metric = "loss" }', "training.schedule.direction: is missing; say whether more"),
        ('training.schedule = { kind = "plateau", direction = "min" }', "training.schedule.direction: has no effect without"),
        ('training.schedule = { kind = "plateau" }\nevaluation.at = "none"', "training.schedule.metric: needs a measured metric"),
        ('evaluation.at = "none"\nstop.target = 0.9\nstop.patience = 2', "stop.target: needs a measured metric"),
        ('evaluation.at = "none"\nstop.target = 0.9\nstop.patience = 2', "stop.patience: needs a measured metric"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_cure(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run_config(MINIMAL + text)
    assert f"\n  {expected}" in str(caught.value) or expected in str(caught.value)


def test_what_is_missing_is_named_with_what_to_write() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run_config("[cohort]")
    assert str(caught.value).splitlines() == [
        "4 problems in the run config",
        '  name: is missing; write name = "digits" at the top of the file',
        '  workload: is missing; write workload = "digits" at the top of the file',
        "  cohort.size: is missing; write size = 3 under [cohort]",
        "  schedule: is missing; add a table [schedule] with max_rounds",
    ]


def test_what_is_no_toml_is_shown_with_its_place() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run_config('name = "a"\nworkload = digits\n')
    assert str(caught.value) == (
        "the run config is not TOML: line 2, column 12: Invalid value\n  workload = digits\n             ^"
    )


def test_a_config_of_megabytes_is_refused_unread() -> None:
    with pytest.raises(ConfigError, match="longer than 262,144 bytes"):
        parse_run_config("#" * (MAX_CONFIG_BYTES + 1))


_PATHS = [(path, kind) for path, kind, field in option_paths() if "merge." not in path]


@pytest.mark.parametrize(("path", "kind"), _PATHS)
def test_a_misspelt_key_is_recognised_at_every_level(path: str, kind: str) -> None:
    table, _, name = path.rpartition(".")
    wrong = f"{table}.{name}_" if table else f"{name}_"
    line = f"{wrong} = 1\n"
    if kind and _is_choice(path):
        line += f'{table}.kind = "{kind}"\n'
    while table:
        # The tables around it must be of a kind that has it.
        kinds = [of for inner, of, field in option_paths() if inner == table and len(union_members(field)) > 1]
        path, table = table, table.rpartition(".")[0]
        if _is_choice(path):
            line += f'{table}.kind = "{kinds[0]}"\n'
    with pytest.raises(ConfigError) as caught:
        parse_run_config(MINIMAL + line)
    assert f"{wrong}: there is no such key; did you mean {name!r}?" in str(caught.value)


_ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["sgd", "steps", "raw"])
)
_KEYS = st.sampled_from([path.rsplit(".", 1)[-1] for path, _, _ in option_paths()]) | st.text(min_size=1, max_size=4)
_DOCUMENTS = st.recursive(
    _ATOMS.filter(lambda atom: atom is not None),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from([path for path, _, _ in option_paths()]), _DOCUMENTS)
def test_whatever_stands_in_a_file_is_accepted_or_explained(path: str, value: Any) -> None:
    document = tomllib.loads(MINIMAL)
    table = document
    *tables, name = path.split(".")
    for part in tables:
        table = table.setdefault(part, {})
    table[name] = value
    text = _toml(document)
    tomllib.loads(text)
    try:
        config = parse_run_config(text)
    except ConfigError:
        return
    assert parse_run_config(to_toml(config)) == config


def _toml(document: dict[str, Any]) -> str:
    from fed_server.config import _value

    return "\n".join(f"{_value(key)} = {_value(value)}" for key, value in document.items())
