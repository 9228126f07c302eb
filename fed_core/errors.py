"""The error tree that both sides share.

Classes know nothing of gRPC; `fed_core.rpc_status` holds the one table that maps them to status codes and back. A message says
what was wrong, what was expected, and what to do. `reason` is the stable name that travels and that scripts may match.

    FedstreamError
    ├── InvalidError            what was sent can never be right: do not send it again
    │   ├── PayloadError        a payload file's manifest, segment table or values are not what they must be
    │   ├── NotFiniteError      a tensor holds NaN or infinity
    │   ├── UpdateRefusedError  an update is a valid payload, but not for this assignment
    │   └── ConfigError         a run config, setting or flag
    ├── NotFoundError           no such run, round, version, assignment or payload
    ├── ConflictError           the name is taken by something else
    ├── UnauthenticatedError    no credential, or one that is not known
    ├── PermissionDeniedError   a good credential, but not for this
    ├── NoLongerNeededError     goal reached, deadline passed, run ended: discard it and poll
    ├── WrongPhaseError         a right call at the wrong moment: read the state again
    ├── OffsetError             a transfer was opened at another offset than the accepted one
    ├── BusyError               too many transfers: come again within `retry_after_seconds`
    ├── DiskFullError           no space on a disk
    ├── UnavailableError        draining, or not reachable: back off and retry
    ├── CorruptError            a digest differs: resend from `offset`
    └── InternalError           anything else: report the id, the log has the rest
"""

from __future__ import annotations

from typing import ClassVar


class FedstreamError(Exception):
    """Root of the tree. `str(error)` is for people, `reason` for programs, `details` travels with it as text."""

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.details: dict[str, str] = {key: str(value) for key, value in details.items()}


class InvalidError(FedstreamError):
    """What was sent can never be right; sending it again cannot help."""

    reason = "INVALID"


class PayloadError(InvalidError):
    """A payload's manifest, segment table, limits or values are not what they must be."""

    reason = "PAYLOAD_INVALID"


class NotFiniteError(InvalidError):
    """A tensor holds NaN or infinity; the message names it."""

    reason = "NOT_FINITE"


class UpdateRefusedError(InvalidError):
    """An update is a valid payload but not what its assignment asked for: specs, base, bound, weight."""

    reason = "UPDATE_REFUSED"


class ConfigError(InvalidError):
    """A run config, a setting or a flag; the message names the field, what was expected and the cure."""

    reason = "CONFIG_INVALID"


class NotFoundError(FedstreamError):
    """No such run, round, version, assignment or payload."""

    reason = "NOT_FOUND"


class ConflictError(FedstreamError):
    """The name is already taken by something else."""

    reason = "CONFLICT"


class UnauthenticatedError(FedstreamError):
    """No credential, or one that nobody knows."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(FedstreamError):
    """A good credential, but not for this."""

    reason = "PERMISSION_DENIED"


class NoLongerNeededError(FedstreamError):
    """The work came too late: goal reached, deadline passed, run ended. Discard it and poll."""

    reason = "NO_LONGER_NEEDED"


class WrongPhaseError(FedstreamError):
    """A right call at the wrong moment; read the state again."""

    reason = "WRONG_PHASE"


class OffsetError(FedstreamError):
    """A transfer was opened at another offset than the accepted one; `offset` is the one to use."""

    reason = "WRONG_OFFSET"

    def __init__(self, message: str, *, offset: int = 0, **details: object) -> None:
        super().__init__(message, offset=offset, **details)

    @property
    def offset(self) -> int:
        """Offset to go on from, in bytes."""
        return int(self.details["offset"])


class BusyError(FedstreamError):
    """Too many transfers at once; come again within `retry_after_seconds`."""

    reason = "BUSY"

    def __init__(self, message: str, *, retry_after_seconds: float = 1.0, **details: object) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds, **details)

    @property
    def retry_after_seconds(self) -> float:
        """Upper end of the window in which to come again."""
        return float(self.details["retry_after_seconds"])


class DiskFullError(FedstreamError):
    """No space left on a disk; nothing was half-written."""

    reason = "DISK_FULL"


class UnavailableError(FedstreamError):
    """Draining, or not reachable; back off and retry."""

    reason = "UNAVAILABLE"


class CorruptError(FedstreamError):
    """A digest differs; everything before `offset` is good."""

    reason = "CORRUPT"

    def __init__(self, message: str, *, offset: int = 0, **details: object) -> None:
        super().__init__(message, offset=offset, **details)

    @property
    def offset(self) -> int:
        """Everything before this byte verified; resend from here."""
        return int(self.details["offset"])


class InternalError(FedstreamError):
    """Anything else; the peer gets an id, the log has the rest."""

    reason = "INTERNAL"
