"""What a late update says of statistics and counters, once it is to be added to a later version."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fed_core.payload.writer import write_payload
from fed_core.safetensors_tiles import SafetensorsReader, SafetensorsWriter
from fed_core.specs import BUFFER, PARAMETER, TensorSpec
from fed_core.tensors import dtype_name
from fed_server.aggregation.rebased import RebasedUpdate
from fedstream.v1 import common_pb2

ROLES = {"w": PARAMETER, "steps": PARAMETER}
LENGTH = 2**20 + 3  # several bodies


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(n, tuple(t.shape), dtype_name(t.dtype), ROLES.get(n, BUFFER)) for n, t in tensors.items()]


def model_file(path: Path, tensors: dict[str, Tensor]) -> Path:
    with path.open("wb+") as file:
        writer = SafetensorsWriter(file, specs_of(tensors), {})
        for name, tensor in tensors.items():
            writer.write_tile(name, 0, tensor.reshape(-1))
        writer.finish()
    return path


def state(scale: float, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {
        "w": scale * torch.rand(4, 5, generator=generator),
        "var": scale * torch.rand(LENGTH, generator=generator),
        "half": (scale * torch.rand(7, generator=generator)).half(),
        "wave": torch.complex(torch.rand(3, generator=generator), torch.rand(3, generator=generator)),
        "count": torch.tensor(count),
        "steps": torch.tensor([count, 10]),
        "is_on": torch.tensor([True, False]),
    }


def test_statistics_lead_to_what_the_site_had_and_counters_never_fall(tmp_path: Path) -> None:
    base, newest, local = state(8.0, 3), state(2.0, 9), state(1.0, 5)
    change = {name: local[name] if name in ("count", "steps", "is_on") else local[name] - base[name] for name in local}
    path = tmp_path / "update"
    with path.open("wb+") as file:
        write_payload(
            file, kind=common_pb2.PAYLOAD_KIND_MODEL, run_id="", round=0, model_version=0, base_digest=b"", update=None,
            tensors=[(spec, change[spec.name]) for spec in specs_of(change)],
        )  # fmt: skip
    with (
        SafetensorsReader(model_file(tmp_path / "base", base)) as began_with,
        SafetensorsReader(model_file(tmp_path / "newest", newest)) as added_to,
        RebasedUpdate(path, began_with, added_to) as update,
    ):
        found: dict[str, Tensor] = {}
        for name in change:
            tiles = [(first, tile.clone()) for first, tile in update.iter_tiles(name)]
            assert [first for first, _ in tiles] == [sum(len(t) for _, t in tiles[:n]) for n in range(len(tiles))]
            found[name] = torch.cat([tile for _, tile in tiles])
            assert (len(tiles) > 1) == (name == "var")
    assert found["w"].equal(change["w"].reshape(-1)), "a parameter's change is added as it is"
    for name, kind in (("var", torch.float64), ("half", torch.float64), ("wave", torch.complex128)):
        exact = change[name].to(kind) + (base[name].to(kind) - newest[name].to(kind))
        assert found[name].equal(exact)
        torch.testing.assert_close(newest[name].to(kind) + found[name], local[name].to(kind), rtol=0, atol=2e-2)
    assert found["count"].tolist() == [9]
    assert found["steps"].tolist() == [9, 10]
    assert found["is_on"].tolist() == [True, False]
