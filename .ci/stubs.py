"""Write the Python stubs of protos/, or with --check say where the committed ones differ from what the .proto files give.

Runs in the generator's own environment: `make proto` and `make check` do.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent / "protos"
WELL_KNOWN_TYPES = Path(grpc_tools.__file__).parent / "_proto"
STUBS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(target: Path) -> None:
    """Write the stubs of every .proto file under `target`, in the folders of their packages."""
    protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{target}" for kind in ("mypy", "mypy_grpc")]
    plugin = Path(sys.executable).parent
    plugins = [f"--plugin={name}={plugin / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    status = protoc.main(["protoc", f"-I{ROOT}", f"-I{WELL_KNOWN_TYPES}", *plugins, *outputs, *protos])
    if status != 0:
        sys.exit(status)


def stubs(root: Path) -> set[Path]:
    return {path.relative_to(root) for pattern in STUBS for path in root.rglob(pattern)}


def differences(committed: Path, fresh: Path) -> list[str]:
    """One line for each stub that is missing, out of date, or left over from a .proto file that is gone."""
    lines = []
    for path in sorted(stubs(committed) | stubs(fresh)):
        if not (committed / path).exists():
            lines.append(f"{path}: missing")
        elif not (fresh / path).exists():
            lines.append(f"{path}: no .proto file gives it")
        elif not filecmp.cmp(committed / path, fresh / path, shallow=False):
            lines.append(f"{path}: out of date")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the committed stubs differ")
    if not parser.parse_args().check:
        for path in stubs(ROOT):
            (ROOT / path).unlink()
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        lines = differences(ROOT, Path(folder))
    if lines:
        print(
            "The stubs under protos/ are not those of the .proto files; `make proto` writes them anew:",
            *lines,
            sep="\n  ",
        )
        sys.exit(1)
    print(f"The {len(stubs(ROOT))} stubs are those of the .proto files.")


if __name__ == "__main__":
    main()
