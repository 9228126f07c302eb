"""Checks a payload while its bytes arrive, each byte hashed once, and tells how much of a partial file is good."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from fed_core.errors import CorruptError, PayloadError
from fed_core.payload.frames import CHUNK_BYTES, plan_chunks
from fed_core.payload.limits import PREAMBLE_BYTES
from fed_core.payload.manifest import Manifest, Preamble, SegmentSpan, parse_manifest, parse_preamble

OnManifest = Callable[[Manifest], None]
OnSegment = Callable[[SegmentSpan, memoryview], None]


class SegmentVerifier:
    """Takes the bytes of one payload in order, in chunks of any size, and checks each part as soon as it is whole.

    `on_manifest` is called once, before any segment is taken, and `on_segment` with the bytes of each segment that verified;
    the view is good until the call returns. What they raise ends the verification. Memory: the manifest, and the longest
    segment that arrived in more than one chunk.

    `verified` goes on where an earlier verification stopped: it is what `verify_prefix` returned, and the next byte fed must be
    the one at that offset.
    """

    def __init__(
        self,
        expected_digest: bytes,
        max_total_bytes: int | None = None,
        *,
        on_manifest: OnManifest | None = None,
        on_segment: OnSegment | None = None,
        verified: tuple[int, Manifest | None] = (0, None),
    ) -> None:
        self._expected_digest = expected_digest
        self._max_total_bytes = max_total_bytes
        self._on_manifest = on_manifest
        self._on_segment = on_segment
        self._start = bytearray()  # preamble and manifest, until the manifest is whole
        self._preamble: Preamble | None = None
        self._joined = bytearray()  # a segment that arrives in several chunks
        self._num_joined = 0
        self._is_broken = False
        self.verified_offset, self.manifest = verified
        """End of the last part that verified, 0 before the manifest has; and the manifest, once it has."""
        self._next_segment = 0
        if self.manifest is not None:
            if self.manifest.digest != expected_digest:
                raise CorruptError("the part that is there belongs to another payload; begin anew", offset=0)
            ends = [self.manifest.first_segment] + [span.end for span in self.manifest.segments]
            self._next_segment = ends.index(self.verified_offset)

    @property
    def is_complete(self) -> bool:
        """Whether the whole payload has arrived and verified."""
        return self.manifest is not None and self.verified_offset == self.manifest.total_bytes

    @property
    def num_wanted(self) -> int:
        """Bytes still missing from the part at hand: preamble, manifest or segment; 0 when complete."""
        if self.manifest is None:
            num_manifest = self._preamble.manifest_bytes if self._preamble is not None else 0
            return PREAMBLE_BYTES + num_manifest - len(self._start)
        if self._next_segment == len(self.manifest.segments):
            return 0
        return self.manifest.segments[self._next_segment].length - self._num_joined

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Takes the next bytes.

        Raises CorruptError, whose `offset` is where the bad part begins, on a digest that differs, and PayloadError on anything
        that sending again cannot cure. After an error it takes nothing more.
        """
        if self._is_broken:
            raise PayloadError("this payload has already failed; begin a new verification at the verified offset")
        self._is_broken = True
        view = memoryview(data).cast("B")
        while view:
            view = view[self._take_start(view) if self.manifest is None else self._take_segment(self.manifest, view) :]
        self._is_broken = False

    def finish(self) -> Manifest:
        """The manifest of the payload, all of which has verified. Raises CorruptError where bytes are still missing."""
        if self.manifest is None or not self.is_complete:
            total = self.manifest.total_bytes if self.manifest is not None else "an unknown number of"
            raise CorruptError(
                f"the payload is not whole: {self.verified_offset} of {total} bytes verified",
                offset=self.verified_offset,
            )
        return self.manifest

    def _take_start(self, view: memoryview) -> int:
        num_bytes = min(self.num_wanted, len(view))
        self._start += view[:num_bytes]
        if self.num_wanted:
            return num_bytes
        if self._preamble is None:
            self._preamble = parse_preamble(self._start)
            if self._preamble.digest != self._expected_digest:
                raise CorruptError(
                    f"the payload's digest is {self._preamble.digest.hex()}, expected {self._expected_digest.hex()}",
                    offset=0,
                )
            self._check_total(PREAMBLE_BYTES + self._preamble.manifest_bytes)
            return num_bytes
        manifest = parse_manifest(self._preamble, memoryview(self._start)[PREAMBLE_BYTES:])
        self._check_total(manifest.total_bytes)
        if self._on_manifest is not None:
            self._on_manifest(manifest)
        self._start = bytearray()
        self.manifest, self.verified_offset = manifest, manifest.first_segment
        return num_bytes

    def _check_total(self, total_bytes: int) -> None:
        if self._max_total_bytes is not None and total_bytes > self._max_total_bytes:
            raise PayloadError(f"the payload has {total_bytes} bytes; at most {self._max_total_bytes} are taken here")

    def _take_segment(self, manifest: Manifest, view: memoryview) -> int:
        if self._next_segment == len(manifest.segments):
            raise PayloadError(f"bytes follow the end of the payload at {manifest.total_bytes}")
        span = manifest.segments[self._next_segment]
        part = view[: span.length - self._num_joined]
        segment = part
        if len(part) < span.length:
            # Joined first and hashed whole: the callback wants it in one piece, and BLAKE3 does not mind.
            if len(self._joined) < span.length:
                self._joined = bytearray(span.length)
            segment = memoryview(self._joined)[: span.length]
            segment[self._num_joined : self._num_joined + len(part)] = part
            self._num_joined += len(part)
            if self._num_joined < span.length:
                return len(part)
        if blake3(segment).digest() != span.digest:
            raise CorruptError(
                f"the bytes {span.offset} to {span.end} ({manifest.name_of(span)}) do not match their digest; send them again",
                offset=span.offset,
            )
        if self._on_segment is not None:
            self._on_segment(span, segment)
        self._num_joined = 0
        self._next_segment += 1
        self.verified_offset = span.end
        return len(part)


def verify_prefix(
    path: Path,
    expected_digest: bytes,
    max_total_bytes: int | None = None,
    *,
    on_manifest: OnManifest | None = None,
    on_segment: OnSegment | None = None,
) -> tuple[int, Manifest | None]:
    """How much of a partial file verifies: the end of the last good part (0 where not even the manifest is) and the manifest.

    What the callbacks raise is passed on, but for PayloadError and CorruptError, which only end the good part.
    """
    verifier = SegmentVerifier(expected_digest, max_total_bytes, on_manifest=on_manifest, on_segment=on_segment)
    with suppress(CorruptError, PayloadError):  # the offset tells it all
        _feed_file(verifier, path)
    return verifier.verified_offset, verifier.manifest


def verify_file(
    path: Path,
    expected_digest: bytes,
    max_total_bytes: int | None = None,
    *,
    on_manifest: OnManifest | None = None,
    on_segment: OnSegment | None = None,
) -> Manifest:
    """Verifies a whole file and returns its manifest. Raises CorruptError or PayloadError."""
    verifier = SegmentVerifier(expected_digest, max_total_bytes, on_manifest=on_manifest, on_segment=on_segment)
    _feed_file(verifier, path)
    return verifier.finish()


def _feed_file(verifier: SegmentVerifier, path: Path) -> None:
    """Feeds a file in reads that end with its segments, so that none has to be joined."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while verifier.manifest is None:
            num_bytes = file.readinto(buffer[: min(verifier.num_wanted, CHUNK_BYTES)])
            if not num_bytes:
                return
            verifier.feed(buffer[:num_bytes])
        for _, length in plan_chunks(verifier.manifest, verifier.verified_offset):
            num_bytes = file.readinto(buffer[:length])
            if not num_bytes:
                return
            verifier.feed(buffer[:num_bytes])
        verifier.feed(file.read(1))
