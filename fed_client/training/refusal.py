"""What a site does not do, whatever its data and its workload's code are."""

from __future__ import annotations

from fed_core.errors import InvalidError


class CannotDoError(InvalidError):
    """What the coordinator asks for cannot be done here, whatever the workload: an encoding of a newer version, steps that lead
    nowhere, a guarantee that the model does not allow. The message says nothing of the data."""
