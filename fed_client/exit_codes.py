"""Exit codes of fed-client, from sysexits.h, so that a supervisor can tell "try again" from "do not"."""

from __future__ import annotations

from enum import IntEnum

from fed_core.errors import (
    ConflictError,
    DiskFullError,
    FedstreamError,
    InvalidError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)


class ExitCode(IntEnum):
    """What the caller's shell sees."""

    OK = 0
    """Done, or stopped by a signal."""
    FAILED = 1
    """`doctor` found something."""
    USAGE = 2
    """An option that does not exist."""
    UNAVAILABLE = 69
    """The coordinator does not answer (`enroll`; `run` waits for ever)."""
    SOFTWARE = 70
    """A bug; the log has the traceback."""
    TEMPORARY = 75
    """Another daemon has the state directory, or its disk is full: try again later."""
    NO_PERMISSION = 77
    """The coordinator does not accept this site's token or identity."""
    CONFIG = 78
    """A setting is missing or wrong; the message names it."""


_CODES: list[tuple[type[FedstreamError], ExitCode]] = [
    (UnauthenticatedError, ExitCode.NO_PERMISSION),
    (PermissionDeniedError, ExitCode.NO_PERMISSION),
    (UnavailableError, ExitCode.UNAVAILABLE),
    (DiskFullError, ExitCode.TEMPORARY),
    (ConflictError, ExitCode.CONFIG),
    (InvalidError, ExitCode.CONFIG),
]


def exit_code_of(error: FedstreamError) -> ExitCode:
    """The code that an error ends the command with."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.SOFTWARE)
