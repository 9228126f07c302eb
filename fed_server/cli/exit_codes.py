"""What fedctl's exit status says, after sysexits.h where it has a word for it."""

from __future__ import annotations

from fed_core.errors import (
    BusyError,
    ConfigError,
    ConflictError,
    DiskFullError,
    FedstreamError,
    InvalidError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
    WrongPhaseError,
)

EXIT_OK = 0
EXIT_RUN_FAILED = 1
EXIT_USAGE = 2
EXIT_DATA = 65
EXIT_UNAVAILABLE = 69
EXIT_INTERNAL = 70
EXIT_FILE = 74
EXIT_AGAIN = 75
EXIT_PERMISSION = 77
EXIT_CONFIG = 78
EXIT_INTERRUPTED = 130

EXIT_CODES = {
    EXIT_OK: "done, and a watched run finished",
    EXIT_RUN_FAILED: "the watched run failed or was cancelled, or an audit contradicts its claim",
    EXIT_USAGE: "wrong command line",
    EXIT_DATA: "refused: the config, the model or the name, or no such run or version",
    EXIT_UNAVAILABLE: "no coordinator answers",
    EXIT_INTERNAL: "a defect, here or at the coordinator",
    EXIT_FILE: "a local file cannot be written",
    EXIT_AGAIN: "the coordinator is busy or its disk is full, try again later",
    EXIT_PERMISSION: "no operator token, or a wrong one",
    EXIT_CONFIG: "fedctl's own settings (address, token file, certificate)",
    EXIT_INTERRUPTED: "interrupted with Ctrl-C",
}


class SettingError(ConfigError):
    """One of fedctl's own settings, rather than a run config."""


class FileError(DiskFullError):
    """A file on the operator's machine cannot be written."""


# The first class that an error is an instance of decides: its exit code, and its cure where it brings none of its own.
_TABLE: tuple[tuple[type[FedstreamError], int, str], ...] = (
    (UnavailableError, EXIT_UNAVAILABLE, "run the command again in a moment"),
    (BusyError, EXIT_AGAIN, "run the command again in a moment"),
    (FileError, EXIT_FILE, "make room there, or choose another place"),
    (DiskFullError, EXIT_AGAIN, "make room on the coordinator's disk, then run the command again"),
    (
        UnauthenticatedError,
        EXIT_PERMISSION,
        "`fed-server operator-token` prints the token on the coordinator's machine; give it with --operator-token-file FILE",
    ),
    (PermissionDeniedError, EXIT_PERMISSION, "use the operator token, not a client's secret"),
    (SettingError, EXIT_CONFIG, "`fedctl --help` explains the options"),
    (InvalidError, EXIT_DATA, ""),
    (NotFoundError, EXIT_DATA, ""),
    (ConflictError, EXIT_DATA, ""),
    (WrongPhaseError, EXIT_DATA, ""),
    (FedstreamError, EXIT_INTERNAL, "the coordinator's log says more"),
)


def judge(error: FedstreamError) -> tuple[int, str]:
    """Exit code of an error, and what to do about it; the cure may be empty where the message says all."""
    code, cure = next((code, cure) for cls, code, cure in _TABLE if isinstance(error, cls))
    return code, error.details.get("cure") or cure
