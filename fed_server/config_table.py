"""What all tables of a run config have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_COHORT = 65_536
# Site names, labels and run names share one alphabet: it is safe in file names, URLs and metrics.
WORD = r"^[a-zA-Z0-9._-]+$"

LabelWord = Annotated[str, Field(min_length=1, max_length=63, pattern=WORD)]


class ConfigTable(BaseModel):
    """One table of the TOML file: frozen, unknown keys refused, no number read out of a string, no NaN or infinity.

    The tables of encodings (`fed_core.codecs`) are like these and stand beside them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def refuse(problems: Mapping[str, str]) -> None:
    """Raises one error that carries every (field, sentence) found by a cross-field check; nothing where there is none."""
    if problems:
        raise PydanticCustomError("cross_field", "fields contradict each other", {"problems": dict(problems)})
