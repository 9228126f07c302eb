"""Payloads of every codec, kept as they were once written: later versions and other machines must decode them to the same bits.

Each file under golden/ holds an update in one encoding: a line of JSON (for each tensor what it is, how long its parts are, the
BLAKE3 of the decoded values), then the parts.
`UPDATE_GOLDEN=1 pytest tests/core/test_golden_payloads.py` writes those that are missing. One that changes breaks every payload in
the field: delete it by hand, and say so in the commit.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from torch import Tensor

from fed_core.codecs.auto import AutoConfig
from fed_core.codecs.cast import CastConfig
from fed_core.codecs.ectcq import EctcqConfig
from fed_core.codecs.eden import EdenConfig
from fed_core.codecs.fsq import FsqConfig
from fed_core.codecs.lrq import LrqConfig
from fed_core.codecs.mask import MaskConfig
from fed_core.codecs.nested import FsqValues
from fed_core.codecs.powersgd import PowersgdConfig
from fed_core.codecs.randomk import RandomkConfig
from fed_core.codecs.raw import RawConfig
from fed_core.codecs.registry import CODECS, UPLINK_ONLY, EncodingConfig, codec_named
from fed_core.codecs.sign import SignConfig
from fed_core.codecs.ternary import TernaryConfig
from fed_core.codecs.topk import TopkConfig
from fed_core.codecs.uniform import UniformConfig
from fed_core.specs import TensorSpec
from tests.core.coding import Body, decode, encode, memory_of, normal, source_of, spec_of

GOLDEN = Path(__file__).parent / "golden"
MAX_BYTES = 24_000  # a tensor that an encoding leaves larger is for others to keep

ENCODINGS: Mapping[str, EncodingConfig] = {
    "raw": RawConfig(),
    "cast-float16": CastConfig(to="float16"),
    "cast-bfloat16": CastConfig(to="bfloat16"),
    **{f"uniform-{bits}": UniformConfig(bits=bits, block=64) for bits in (2, 3, 4, 5, 6, 7, 8)},
    "uniform-stochastic": UniformConfig(bits=4, rounding="stochastic"),
    "mask-float32": MaskConfig(),
    "mask-float16": MaskConfig(values="float16"),
    "fsq": FsqConfig(),
    "fsq-fine": FsqConfig(target_error=1e-3, match_gain=True),
    "fsq-packed": FsqConfig(coder="packed"),
    "lrq": LrqConfig(),
    "lrq-fine": LrqConfig(target_error=1e-3, match_gain=True),
    "lrq-packed": LrqConfig(coder="packed"),
    "lrq-alone": LrqConfig(residual=False),
    "lrq-residual": LrqConfig(residual=True, target_error=1e-2),
    "auto": AutoConfig(),
    "sign": SignConfig(),
    "ternary": TernaryConfig(),
    "ternary-dense": TernaryConfig(fraction=0.5),
    "topk": TopkConfig(),
    "topk-raw": TopkConfig(fraction=0.01, values=RawConfig()),
    "topk-fsq": TopkConfig(fraction=0.2, values=FsqValues()),
    "randomk": RandomkConfig(),
    "randomk-cast": RandomkConfig(fraction=0.1, unbiased=False, values=CastConfig()),
    "ectcq": EctcqConfig(),
    "ectcq-fine": EctcqConfig(states=8, target_error=1e-3, match_gain=True),
    "ectcq-packed": EctcqConfig(states=256, coder="packed"),
    "eden": EdenConfig(bits=3),
    "powersgd": PowersgdConfig(rank=3),
    "powersgd-half": PowersgdConfig(rank=3, values="float16"),
}


def update() -> dict[str, Tensor]:
    """What a client might send: structure for the codecs to find, and every floating type."""
    low_rank = normal((61, 5), scale=1.0, seed=1) @ normal((5, 83), seed=2)
    return {
        "matrix": low_rank + normal((61, 83), scale=1e-3, seed=3),
        "convolution": normal((12, 8, 3, 3), seed=4) * torch.logspace(-2, 0, 12).view(-1, 1, 1, 1),
        "sparse": torch.where(normal((40, 70), seed=5) > 0.03, normal((40, 70), seed=6), 0.0),
        "bias": normal((83,), seed=7),
        "wild": torch.logspace(-44, 38, 300) * normal((300,), seed=8).sign(),
        "half": normal((33, 29), "float16", seed=9),
        "brain": low_rank[:40].bfloat16(),
        "double": normal((30, 31), "float64", seed=10),
        "long": torch.where(normal((70_003,), seed=11) > 0.04, normal((70_003,), seed=12), 0.0),
    }


def write_golden() -> None:
    """Encodes the update every way and writes the files that are not there yet."""
    GOLDEN.mkdir(exist_ok=True)
    for name, config in ENCODINGS.items():
        path = GOLDEN / f"{name}.golden"
        if path.exists():
            continue
        descriptions: list[dict[str, object]] = []
        parts: list[bytes] = []
        for key, tensor in update().items():
            if name.endswith("-float16"):
                tensor = tensor.clamp(-6e4, 6e4)
            # Each by itself: one step for all would leave nothing of what is small.
            spec = spec_of(tensor, key)
            (plan,) = config.plan([(spec, source_of(tensor))], seed=7)
            bodies = encode(plan, tensor)
            data = (plan.head or b"") + b"".join(body.data for body in bodies)
            if len(data) > MAX_BYTES or (plan.codec == "raw" and name != "raw"):
                continue
            values = decode(codec_named(plan.codec), spec, plan.head, bodies)
            parts.append(data)
            descriptions.append(
                {
                    "name": key,
                    "shape": spec.shape,
                    "dtype": spec.dtype,
                    "codec": plan.codec,
                    "head": None if plan.head is None else len(plan.head),
                    "bodies": [(body.first, body.num_coordinates, len(body.data)) for body in bodies],
                    "blake3": blake3(memory_of(values)).hexdigest(),
                }
            )
        path.write_bytes(json.dumps(descriptions).encode() + b"\n" + b"".join(parts))


def golden_values() -> Iterator[tuple[str, TensorSpec, str, str, Tensor]]:
    """(encoding, spec, codec, digest that was recorded, values that come out here) of every tensor."""
    for path in sorted(GOLDEN.glob("*.golden")):
        line, data = path.read_bytes().split(b"\n", 1)
        for description in json.loads(line):
            spec = TensorSpec(description["name"], tuple(description["shape"]), description["dtype"])
            codec = codec_named(description["codec"])
            head = None
            if description["head"] is not None:
                head, data = data[: description["head"]], data[description["head"] :]
            bodies = []
            for first, num_coordinates, num_bytes in description["bodies"]:
                bodies.append(Body(first, num_coordinates, data[:num_bytes]))
                data = data[num_bytes:]
            yield path.stem, spec, codec.kind, description["blake3"], decode(codec, spec, head, bodies)
        assert not data, path


def read_golden() -> Iterator[tuple[str, str, str, str]]:
    """(encoding and tensor, codec, digest that was recorded, digest that comes out here) of every tensor."""
    for encoding, spec, codec, recorded, values in golden_values():
        yield f"{encoding} {spec.name}", codec, recorded, blake3(memory_of(values)).hexdigest()


def machines() -> dict[str, dict[str, str]]:
    """Environments that send torch and numpy down other code paths, as other processors would."""
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])  # type: ignore[index]
    capabilities = ["default", "avx2", "avx512"]
    best = torch.backends.cpu.get_cpu_capability().lower()
    here = capabilities[: capabilities.index(best) + 1] if best in capabilities else [best]
    environments = {}
    for (index, capability), num_threads in itertools.product(enumerate(here), (1, 2)):
        environment = {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": str(num_threads)}
        name = f"{capability}, {num_threads} threads"
        if (index + num_threads) % 2:
            environment["NPY_DISABLE_CPU_FEATURES"] = " ".join(found)
            name += ", plain numpy"
        if capability == "default":
            environment |= {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}
        environments[name] = environment
    return environments


@pytest.fixture(scope="module", autouse=True)
def _written() -> None:
    if os.environ.get("UPDATE_GOLDEN") == "1":
        write_golden()


def test_every_codec_has_golden_payloads() -> None:
    assert {codec for _, codec, _, _ in read_golden()} == set(CODECS)


@pytest.mark.parametrize("environment", machines().values(), ids=machines().keys())
def test_golden_payloads_decode_to_the_recorded_bits(environment: dict[str, str]) -> None:
    program = f"""
import json, sys
sys.path[:0] = {[path for path in sys.path if path]!r}
import torch
from tests.core.test_golden_payloads import read_golden
print(json.dumps([torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), list(read_golden())]))
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    capability, num_threads, payloads = json.loads(ended.stdout)
    assert capability.lower() == environment["ATEN_CPU_CAPABILITY"]
    assert str(num_threads) == environment["OMP_NUM_THREADS"]
    # Decoding a rotation takes sums of floats, and processors differ in their order; no version of a model travels so.
    exact = [payload for payload in payloads if payload[1] not in UPLINK_ONLY]
    assert [file for file, _, recorded, here in exact if recorded != here] == []
    assert exact


def test_golden_payloads_of_rotations_decode_to_within_rounding() -> None:
    tensors, found = update(), set()
    for _, spec, codec, _, values in golden_values():
        if codec in UPLINK_ONLY:
            found.add(codec)
            exact = tensors[spec.name].double()
            scale = float(exact.abs().max())
            # 3 bits lose 3.6 % of a long tensor; signs or levels of another format would lose all.
            error = float(((values.double() - exact) / scale).square().sum() / (exact / scale).square().sum())
            assert error < 0.1, spec.name
    assert found == set(UPLINK_ONLY)
