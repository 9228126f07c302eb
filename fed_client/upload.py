"""Delivers a spooled update: from the accepted offset, for as long as anyone wants it, until there is a receipt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fed_client.cache import read_manifest
from fed_client.retry import PASSING, Retries
from fed_client.spool import SpooledUpdate
from fed_client.stop import Stop
from fed_client.transport import Progress, SpoolReadError, Transport
from fed_core.errors import CorruptError, FedstreamError, PayloadError
from fed_core.payload.manifest import Manifest
from fed_core.payload.verify import verify_file
from fedstream.v1 import transfer_pb2


class SpoolCorruptError(Exception):
    """The spooled update no longer verifies: the disk let it rot."""


def deliver(
    transport: Transport, spooled: SpooledUpdate, stop: Stop, on_progress: Progress, log: Any
) -> transfer_pb2.Receipt:
    """Uploads an update and returns the receipt; a repeat of one that is already durable returns the first one's.

    Retries what passes by itself without end. Raises SpoolCorruptError, NoLongerNeededError, NotFoundError, InvalidError (the
    coordinator refuses it by name), credential errors, and StoppedError.
    """
    manifest = _read_manifest(spooled)
    retries = Retries(stop, log)
    accepted, bad_offset = -1, -1
    while True:
        stop.check()
        try:
            state = transport.get_upload(spooled.assignment_id, spooled.digest)
            if state.HasField("receipt"):
                return state.receipt
            if state.accepted_offset > accepted >= 0:
                retries.progressed()
                log.info("upload goes on", offset=state.accepted_offset, total=spooled.total_bytes)
            accepted = state.accepted_offset
            return transport.upload(
                spooled.assignment_id, spooled.path, manifest, accepted, stop, on_progress, retries.patience
            )
        except CorruptError as error:
            log.warning("update arrived damaged, sending that part again", error=str(error), offset=error.offset)
            if error.offset == bad_offset:
                # Twice at one place is no accident of the line: look at what we send.
                _verify(spooled)
                retries.wait(error)
            bad_offset = error.offset
        except SpoolReadError as error:
            raise SpoolCorruptError(str(error)) from error
        except PASSING as error:
            retries.wait(error)


def _read_manifest(spooled: SpooledUpdate) -> Manifest:
    try:
        manifest = read_manifest(spooled.path)
        size = Path(spooled.path).stat().st_size
    except (OSError, PayloadError, CorruptError) as error:
        raise SpoolCorruptError(f"the spooled update cannot be read any longer: {error}") from error
    if (manifest.digest, manifest.total_bytes, size) != (spooled.digest, spooled.total_bytes, spooled.total_bytes):
        raise SpoolCorruptError(f"the spooled update has {size} bytes, expected {spooled.total_bytes}, or is another")
    return manifest


def _verify(spooled: SpooledUpdate) -> None:
    try:
        verify_file(spooled.path, spooled.digest)
    except (FedstreamError, OSError) as error:
        raise SpoolCorruptError(f"the spooled update no longer verifies: {error}") from error
