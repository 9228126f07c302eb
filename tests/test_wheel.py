"""The wheel carries the stubs: an installed Fedstream needs no protoc and no repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel's contents where an installer would lay them."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_imports_its_stubs_without_the_repository_and_without_protoc(unpacked: Path) -> None:
    program = (
        "import sys; sys.modules['grpc_tools'] = None\n"
        "import fed_core.rpc_status, fed_server, fed_client\n"
        "from fedstream.v1 import participation_pb2_grpc, runs_pb2_grpc, transfer_pb2_grpc\n"
        "print(runs_pb2_grpc.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    ran = subprocess.run([sys.executable, "-c", program], cwd=unpacked, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()).is_relative_to(unpacked)


def test_the_wheel_holds_every_module_of_the_repository_and_nothing_else(unpacked: Path) -> None:
    """Catches a package that the project file forgot, and tests or caches that slipped in."""
    sources = {"fed_core": ROOT, "fed_server": ROOT, "fed_client": ROOT, "fedstream": ROOT / "protos"}
    expected = {path.relative_to(root) for name, root in sources.items() for path in (root / name).rglob("*.py")}
    assert {path.relative_to(unpacked) for path in unpacked.rglob("*.py")} == expected
