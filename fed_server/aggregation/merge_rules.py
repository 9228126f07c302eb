"""How each tensor of the updates becomes one: a rule per tensor, chosen on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from fed_core.errors import ConfigError
from fed_core.specs import TensorSpec, is_floating

MergeRule = Literal["mean", "maximum", "keep"]


def default_rule(spec: TensorSpec) -> MergeRule:
    """Weighted mean for floating tensors, parameters and running statistics alike; maximum for counters (an update carries
    their local value); booleans stay as they are."""
    if is_floating(spec.dtype):
        return "mean"
    return "keep" if spec.dtype == "bool" else "maximum"


def merge_rules(specs: Sequence[TensorSpec], overrides: Sequence[tuple[str, MergeRule]]) -> dict[str, MergeRule]:
    """The rule of every tensor by name; the first override whose pattern (fnmatch) matches wins.

    Raises ConfigError for a pattern that matches nothing, or a rule that the dtype does not have.
    """
    rules = {spec.name: default_rule(spec) for spec in specs}
    decided: set[str] = set()
    for pattern, rule in overrides:
        matching = [spec for spec in specs if fnmatchcase(spec.name, pattern)]
        if not matching:
            names = ", ".join(spec.name for spec in specs[:5])
            raise ConfigError(
                f"aggregation.merge: pattern {pattern!r} matches no tensor of the model (it has {names} ...)"
            )
        for spec in matching:
            if rule != "keep" and (rule == "mean") != is_floating(spec.dtype):
                raise ConfigError(
                    f"aggregation.merge: {spec.name!r} is {spec.dtype}, which cannot be merged by {rule!r}; expected "
                    f"{'mean' if is_floating(spec.dtype) else 'maximum'!r} or 'keep'"
                )
            if spec.name not in decided:
                rules[spec.name] = rule
                decided.add(spec.name)
    return rules
