"""What to do with a round now, and why: pure, and the only place that knows the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from fed_server.store.base import AssignmentState


class Verdict(StrEnum):
    """What to do with a round."""

    WAIT = "wait"
    CLOSE = "close"
    FAIL = "fail"


@dataclass(frozen=True)
class Decision:
    """A verdict with its reason: logs, status pages and tests all use the sentence."""

    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Member:
    """One client's part in the round as it stands."""

    name: str
    state: AssignmentState
    is_alive: bool = True
    silent_seconds: float = 0.0
    doing: str = ""
    reason: str = ""


@dataclass(frozen=True)
class RoundView:
    """A round as it stands. `elapsed_seconds` counts the coordinator's uptime since the cohort was told; `deadline_seconds` of 0 is
    no deadline."""

    elapsed_seconds: float
    deadline_seconds: float
    goal: int
    quorum: int
    members: Sequence[Member]


def decide(view: RoundView) -> Decision:
    """Whether a round that takes updates goes on, closes or fails."""
    received = [m for m in view.members if m.state is AssignmentState.RECEIVED]
    pending = [m for m in view.members if m.state is AssignmentState.OPEN]
    failed = [m for m in view.members if m.state is AssignmentState.FAILED]
    count = f"{len(received)} of {view.goal} updates"
    if len(received) >= view.goal:
        return Decision(Verdict.CLOSE, f"goal reached: {count}")
    if len(received) + len(pending) < view.quorum:
        return Decision(Verdict.FAIL, f"quorum of {view.quorum} out of reach: {count}, {list_failures(failed)}")
    if not pending:
        return Decision(Verdict.CLOSE, f"nobody left to wait for: {count}, {list_failures(failed)}")
    if 0 < view.deadline_seconds <= view.elapsed_seconds:
        late = f"{count} at the deadline of {view.deadline_seconds:g} s; missing: {list_missing(pending)}"
        return Decision(Verdict.CLOSE if len(received) >= view.quorum else Verdict.FAIL, late)
    if len(received) >= view.quorum and not any(m.is_alive for m in pending):
        return Decision(Verdict.CLOSE, f"{count}, and the rest is gone: {list_missing(pending)}")
    return Decision(Verdict.WAIT, f"{count}; waiting for {list_missing(pending)}")


def decide_private(view: RoundView) -> Decision:
    """Whether a private round goes on or closes. It waits for all that were drawn, whether they are there or not, and never fails:
    who is late or absent counts as zero."""
    pending = [m for m in view.members if m.state is AssignmentState.OPEN]
    received = sum(m.state is AssignmentState.RECEIVED for m in view.members)
    count = f"{received} of {len(view.members)} updates"
    if not pending:
        return Decision(Verdict.CLOSE, f"nobody left to wait for: {count}")
    if 0 < view.deadline_seconds <= view.elapsed_seconds:
        return Decision(Verdict.CLOSE, f"{count} at the deadline of {view.deadline_seconds:g} s")
    return Decision(Verdict.WAIT, f"{count}; waiting for {list_missing(pending)}")


def decide_evaluation(view: RoundView) -> Decision:
    """Whether an evaluation goes on or closes. It never fails: what was measured is used."""
    pending = [m for m in view.members if m.state is AssignmentState.OPEN]
    received = sum(m.state is AssignmentState.RECEIVED for m in view.members)
    count = f"evaluated by {received} of {len(view.members)}" if view.members else ""
    if not any(m.is_alive for m in pending):
        return Decision(Verdict.CLOSE, count if not pending else f"{count}; gone: {list_missing(pending)}")
    if 0 < view.deadline_seconds <= view.elapsed_seconds:
        return Decision(Verdict.CLOSE, f"{count} at the deadline; missing: {list_missing(pending)}")
    return Decision(Verdict.WAIT, f"{count}; waiting for {list_missing(pending)}")


def list_missing(members: Sequence[Member], most: int = 4) -> str:
    """Whom one waits for, and what each is doing."""

    def describe(member: Member) -> str:
        if not member.is_alive:
            return f"{member.name} (not heard of for {member.silent_seconds:.0f} s)"
        return f"{member.name} ({member.doing})" if member.doing else member.name

    return _cut([describe(m) for m in members], most)


def list_failures(members: Sequence[Member], most: int = 3) -> str:
    """Who failed, and why."""
    if not members:
        return "no failures"
    return "failed: " + _cut([f"{m.name} ({m.reason})" for m in members], most)


def _cut(items: list[str], most: int) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
