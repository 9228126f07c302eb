"""The tables of codecs and of encodings. A new codec is a module, a line in each, and a run of the contract test over them.

A codec decodes what a manifest names. An encoding is what a run config says: it makes payloads of one or more codecs.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field, TypeAdapter, ValidationError

from fed_core.codecs.auto import AutoConfig
from fed_core.codecs.base import Codec
from fed_core.codecs.cast import CastCodec, CastConfig
from fed_core.codecs.ectcq import EctcqCodec, EctcqConfig
from fed_core.codecs.eden import EdenCodec, EdenConfig
from fed_core.codecs.fsq import FsqCodec, FsqConfig
from fed_core.codecs.lrq import LrqCodec, LrqConfig
from fed_core.codecs.mask import MaskCodec, MaskConfig
from fed_core.codecs.powersgd import PowersgdCodec, PowersgdConfig
from fed_core.codecs.randomk import RandomkCodec, RandomkConfig
from fed_core.codecs.raw import RawCodec, RawConfig
from fed_core.codecs.sign import SignCodec, SignConfig
from fed_core.codecs.ternary import TernaryCodec, TernaryConfig
from fed_core.codecs.topk import TopkCodec, TopkConfig
from fed_core.codecs.uniform import UniformCodec, UniformConfig
from fed_core.errors import InvalidError, PayloadError

CODECS: Final[dict[str, Codec]] = {
    codec.kind: codec
    for codec in (
        RawCodec(),
        CastCodec(),
        UniformCodec(),
        MaskCodec(),
        FsqCodec(),
        LrqCodec(),
        SignCodec(),
        TernaryCodec(),
        TopkCodec(),
        RandomkCodec(),
        EctcqCodec(),
        EdenCodec(),
        PowersgdCodec(),
    )
}

EncodingConfig = Annotated[
    AutoConfig
    | RawConfig
    | CastConfig
    | UniformConfig
    | MaskConfig
    | FsqConfig
    | LrqConfig
    | SignConfig
    | TernaryConfig
    | TopkConfig
    | RandomkConfig
    | EctcqConfig
    | EdenConfig
    | PowersgdConfig,
    Field(discriminator="kind"),
]

MAX_ENCODING_BYTES: Final = 4096

# The codecs that a payload of each encoding may hold, besides raw.
CODECS_OF: Final[dict[str, frozenset[str]]] = {
    "raw": frozenset(),
    "cast": frozenset({"cast"}),
    "uniform": frozenset({"uniform"}),
    "mask": frozenset({"mask"}),
    "fsq": frozenset({"fsq", "uniform"}),
    "lrq": frozenset({"lrq", "fsq", "uniform"}),
    "sign": frozenset({"sign", "uniform"}),
    "ternary": frozenset({"ternary", "uniform"}),
    "topk": frozenset({"topk", "uniform"}),
    "randomk": frozenset({"randomk", "uniform"}),
    "ectcq": frozenset({"ectcq", "uniform"}),
    "eden": frozenset({"eden"}),
    "powersgd": frozenset({"powersgd"}),
    "auto": frozenset({"lrq", "fsq", "uniform"}),
}

# Encodings that a version of the model cannot travel in, and why.
UPLINK_ONLY: Final[dict[str, str]] = {
    "eden": "it rotates in floating point, whose last bits differ between processors, and all clients must have the same version",
}

_ENCODINGS: Final[TypeAdapter[EncodingConfig]] = TypeAdapter(EncodingConfig)


def codec_named(kind: str) -> Codec:
    """The codec of that name. Raises PayloadError naming the known ones."""
    if kind not in CODECS:
        raise PayloadError(f"unknown codec {kind!r}; this version knows {', '.join(sorted(CODECS))}")
    return CODECS[kind]


def encoding_from_json(text: str) -> EncodingConfig:
    """The encoding that the coordinator asks for. Raises InvalidError, which says what is wrong with it."""
    if len(text.encode()) > MAX_ENCODING_BYTES:
        raise InvalidError(f"an encoding of {len(text.encode())} bytes; at most {MAX_ENCODING_BYTES} are read")
    try:
        return _ENCODINGS.validate_json(text)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors()[:5])
        raise InvalidError(
            f"the coordinator asks for an encoding that this version cannot do ({problems}); install the coordinator's version"
        ) from error
