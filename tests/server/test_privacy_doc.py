"""The page on privacy says of every feature what the code does with it."""

from __future__ import annotations

import os
from pathlib import Path

from fed_server.config_privacy import FEATURES, Verdict

DOCS = Path(__file__).parents[2] / "docs" / "privacy.md"
BEGIN, END = "<!-- features -->\n", "<!-- /features -->"


def test_the_page_lists_every_feature_in_every_mode_as_it_is() -> None:
    """`UPDATE_DOCS=1 pytest tests/server/test_privacy_doc.py` writes the table anew."""
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(before + BEGIN + _table() + END + after)
        table = _table()
    assert table == _table()


def _table() -> str:
    lines = ["| feature | central | local | examples |", "|---|---|---|---|"]
    for feature in FEATURES:
        verdicts = [_words(feature.verdicts[mode]) for mode in ("central", "local", "examples")]
        if verdicts[1] == verdicts[2]:
            verdicts[2] = "as local"
        lines.append(f"| {feature.name} | {' | '.join(verdicts)} |")
    return "\n".join(lines) + "\n"


def _words(verdict: Verdict) -> str:
    return verdict.text if verdict.is_allowed else f"**refused**: {verdict.text}"
