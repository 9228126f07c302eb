"""The table of codecs. A new one is a module, a line here, and a run of the contract test over this table."""

from __future__ import annotations

from typing import Final

from fed_core.codecs.base import Codec
from fed_core.codecs.raw import RawCodec
from fed_core.errors import PayloadError

CODECS: Final[dict[str, Codec]] = {codec.kind: codec for codec in (RawCodec(),)}


def codec_named(kind: str) -> Codec:
    """The codec of that name. Raises PayloadError naming the known ones."""
    if kind not in CODECS:
        raise PayloadError(f"unknown codec {kind!r}; this version knows {', '.join(sorted(CODECS))}")
    return CODECS[kind]
