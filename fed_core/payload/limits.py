"""Every hard limit of the payload format in one place. A reader refuses what is over one of them before it allocates."""

from __future__ import annotations

from typing import Final

MAGIC: Final = b"FEDSTRM1"
DIGEST_BYTES: Final = 32
PREAMBLE_BYTES: Final = len(MAGIC) + DIGEST_BYTES + 4

MAX_MANIFEST_BYTES: Final = 64 * 2**20
# Fields of all messages in a manifest, counted before protobuf sees it: a few bytes each could otherwise cost a gigabyte.
MAX_MANIFEST_FIELDS: Final = 2**20
MAX_TENSORS: Final = 65_536
# 256 GiB of raw float tensors; bounds the segment table in memory at about 100 MB.
MAX_SEGMENTS: Final = 2**18
MAX_HEAD_BYTES: Final = 16 * 2**20
MAX_BODY_BYTES: Final = 2**20
MAX_BODY_COORDINATES: Final = 2**20

MAX_NAME_BYTES: Final = 512
MAX_DIMENSIONS: Final = 8
MAX_TENSOR_ELEMENTS: Final = 2**38
# A payload that decodes to more is refused, however small it is in the file.
MAX_RAW_BYTES: Final = 2**40

MAX_CODEC_BYTES: Final = 32
MAX_CODECS: Final = 64
# A tensor of at most so many encoded bytes has no segment of its own: its place in the table would cost more than it does.
MAX_BUNDLED_BYTES: Final = 4096
MAX_BUNDLE_BYTES: Final = MAX_BODY_BYTES
# 65,536 specs with long names.
MAX_SPECS_BYTES: Final = 16 * 2**20
MAX_ID_BYTES: Final = 100
MAX_METRICS: Final = 64
MAX_METRIC_NAME_BYTES: Final = 100
MAX_UPDATE_INFO_BYTES: Final = 64 * 2**10
# 65,536 exponents of up to five bytes each.
MAX_PARTIAL_INFO_BYTES: Final = 512 * 2**10
# Exponents of the finest and the coarsest step that float64 has.
MAX_EXPONENT: Final = 1074
# Counts that sites report: far beyond any real one, far below where their sums would leave int64.
MAX_COUNT: Final = 2**48
