"""`fedctl codec try`: what it measures, against the codecs themselves, and what it says of files that it cannot use; and the guide
that goes with it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from fed_core.codecs.base import Encoding
from fed_core.codecs.fsq import FsqConfig
from fed_core.codecs.registry import CODECS_OF
from fed_core.codecs.uniform import UniformConfig
from fed_core.payload.manifest import UpdateInfo
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import Fidelity, Written, write_payload
from fed_core.specs import BUFFER, TensorSpec
from fed_core.tensors import dtype_name
from fed_server.cli import codec_render, operator
from fed_server.cli.codec_try import Candidate, Trial, candidates, read_subject, try_encoding
from fed_server.config import parse_run_config
from fedstream.v1 import common_pb2

GUIDE = Path(__file__).parents[2] / "docs" / "choose-a-codec.md"

Run = Callable[..., tuple[int, str, str]]
Tensors = Sequence[tuple[TensorSpec, Tensor]]


@pytest.fixture
def fedctl(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command where there is no coordinator: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            operator.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert isinstance(exit.value.code, int)
        return exit.value.code, out, err

    return run


def measured(fedctl: Run, *arguments: str | Path) -> dict[str, Any]:
    """What --json says."""
    code, out, err = fedctl("codec", "try", "--json", *arguments)
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


def weights(seed: int, *, scale: float = 1.0) -> dict[str, Tensor]:
    """A small model: two matrices with three strong components each, and a bias."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "first.weight": scale * (normal(96, 3) @ normal(3, 80) + 0.05 * normal(96, 80)),
        "first.bias": scale * normal(96),
        "second.weight": scale * (normal(64, 3) @ normal(3, 96) + 0.05 * normal(64, 96)),
    }


def named(tensors: dict[str, Tensor], buffers: Sequence[str] = ()) -> Tensors:
    return [
        (TensorSpec(name, tuple(t.shape), dtype_name(t.dtype), BUFFER if name in buffers else "parameter"), t)
        for name, t in tensors.items()
    ]


def write_update(path: Path, tensors: Tensors, encoding: Encoding | None = None) -> Written:
    with path.open("wb+") as file:
        return write_payload(
            file,
            kind=common_pb2.PAYLOAD_KIND_UPDATE,
            run_id="1" * 32,
            round=1,
            model_version=0,
            base_digest=bytes(32),
            update=UpdateInfo(assignment_id="2" * 32, num_examples=1),
            tensors=tensors,
            encoding=encoding,
        )


def write_model(path: Path, tensors: Tensors) -> Path:
    with path.open("wb+") as file:
        write_payload(
            file,
            kind=common_pb2.PAYLOAD_KIND_MODEL,
            run_id="1" * 32,
            round=0,
            model_version=3,
            base_digest=b"",
            update=None,
            tensors=tensors,
        )
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(weights(1), path)
    return path


# What is measured


@pytest.mark.parametrize("encoding", [UniformConfig(bits=4, block=128), FsqConfig(target_error=0.1)])
def test_bits_error_and_gain_are_those_of_the_update_that_a_site_would_send(
    tmp_path: Path, encoding: UniformConfig | FsqConfig
) -> None:
    tensors = named(weights(2))
    trial = try_encoding(tensors, Candidate("it", encoding))
    path = tmp_path / "update"
    written = write_update(path, tensors, encoding)
    assert trial.total_bytes == path.stat().st_size == written.total_bytes
    assert trial.bits == 8 * trial.total_bytes / (96 * 80 + 96 + 64 * 96)
    assert trial.fidelity.error == pytest.approx(written.fidelity.error, rel=1e-9)
    assert trial.fidelity.gain == pytest.approx(written.fidelity.gain, rel=1e-9)
    with PayloadReader(path) as reader:
        assert trial.codecs == reader.manifest.codecs
        for of, (spec, x) in zip(trial.tensors, tensors, strict=True):
            left = x.double() - reader.tensor(spec.name).double()
            assert of.fidelity is not None
            assert of.fidelity.error == pytest.approx(float(left.square().sum() / x.double().square().sum()), rel=1e-9)
        assert sum(of.num_bits for of in trial.tensors) <= 8 * reader.manifest.encoded_bytes


def test_buffers_and_integers_are_no_part_of_the_error() -> None:
    large = {"running_mean": torch.full((200,), 1000.0), "steps": torch.tensor(7)}
    trials = [
        try_encoding(named(weights(3) | extra, buffers=list(extra)), Candidate("it", UniformConfig(bits=3)))
        for extra in ({}, large)
    ]
    assert trials[0].fidelity == trials[1].fidelity
    assert [of.fidelity for of in trials[1].tensors[-2:]] == [None, None]


def test_all_kinds_are_tried_unless_told_otherwise(fedctl: Run, model: Path) -> None:
    answer = measured(fedctl, model)
    assert {trial["encoding"]["kind"] for trial in answer["trials"]} == set(CODECS_OF)
    by_name = {trial["name"]: trial for trial in answer["trials"]}
    assert {"raw", "cast", "uniform 8", "uniform 4", "mask", "lrq 0.05", "auto 0.02", "auto 0.2"} <= set(by_name)
    assert by_name["raw"]["error"] == by_name["mask"]["error"] == 0
    assert by_name["raw"]["ratio"] == pytest.approx(32 / by_name["raw"]["bits_per_parameter"])
    assert by_name["auto 0.2"]["total_bytes"] < by_name["auto 0.02"]["total_bytes"] < by_name["raw"]["total_bytes"]
    assert by_name["auto 0.05"]["error"] == pytest.approx(0.05, rel=0.1)
    assert all(trial[f"{way}_million_per_second"] > 0 for trial in by_name.values() for way in ("encode", "decode"))


def test_encodings_are_chosen_as_in_a_run_config() -> None:
    chosen = candidates(["auto", "uniform:bits=5,block=64", "lrq:target_error=0.3", "raw", "raw"], [0.1, 0.4])
    assert [candidate.name for candidate in chosen] == [
        "auto 0.1",
        "auto 0.4",
        "uniform bits=5,block=64",
        "lrq target_error=0.3",
        "raw",
    ]
    assert chosen[2].encoding == UniformConfig(bits=5, block=64)
    assert [c.encoding.target_error for c in chosen if hasattr(c.encoding, "target_error")] == [0.1, 0.4, 0.3]


def test_a_base_shows_what_an_update_costs(fedctl: Run, tmp_path: Path) -> None:
    base, step = weights(4, scale=100.0), weights(5, scale=0.01)
    trained = {name: base[name] + step[name] for name in base}
    for name, tensors in (("base", base), ("trained", trained), ("step", {n: trained[n] - base[n] for n in base})):
        save_file(tensors, tmp_path / name)
    options = ("--codec", "auto", "--target-error", "0.1")
    of_base = measured(fedctl, "trained", "--base", "base", *options)
    of_step = measured(fedctl, "step", *options)
    assert of_base["title"] == "trained minus base"
    assert of_base["notices"] == []
    assert "--base" in of_step["notices"][0]
    for name in ("total_bytes", "error", "gain"):
        assert of_base["trials"][0][name] == of_step["trials"][0][name]


def test_a_payload_is_read_and_its_roles_are_kept(fedctl: Run, tmp_path: Path) -> None:
    tensors = weights(6) | {"mean": torch.ones(50)}
    raw = write_model(tmp_path / "v3.payload", named(tensors, buffers=["mean"]))
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, tmp_path / "v4.safetensors")
    for arguments in ([raw], ["v4.safetensors", "--base", raw], [raw, "--base", "v4.safetensors"]):
        trial = measured(fedctl, *arguments, "--codec", "auto", "--tensors")["trials"][0]
        by_name = {tensor["name"]: tensor for tensor in trial["tensors"]}
        assert (by_name["mean"]["codec"], by_name["mean"]["role"], by_name["mean"]["error"]) == ("raw", "buffer", None)
        assert by_name["first.weight"]["error"] > 0


def test_two_versions_of_a_run_are_no_update(fedctl: Run, tmp_path: Path) -> None:
    before = write_model(tmp_path / "v3.payload", named(weights(6)))
    save_file(weights(7), tmp_path / "v4.safetensors", {"run_id": "1" * 32, "version": "4"})
    save_file(weights(7), tmp_path / "trained.safetensors")
    said = [
        measured(fedctl, name, "--base", before, "--codec", "raw")["notices"]
        for name in ("v4.safetensors", "trained.safetensors")
    ]
    assert "two versions of a run" in said[0][0]
    assert said[1] == []


def test_what_was_encoded_before_is_said_to_be(fedctl: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.update"
    write_update(path, named(weights(7)), UniformConfig(bits=2))
    answer = measured(fedctl, path, "--codec", "raw")
    assert answer["title"] == "a.update, update"
    assert "encoded before (uniform 3)" in answer["notices"][0]
    code, _, err = fedctl("codec", "try", path, "--codec", "raw")
    assert code == 0
    assert "encoded before" in err


def test_an_encoding_that_cannot_hold_the_tensors_says_so_beside_the_others(fedctl: Run, tmp_path: Path) -> None:
    save_file(weights(8, scale=1e6), tmp_path / "large")
    options = ("large", "--codec", 'cast:to="float16"', "--codec", "uniform")
    failed, *others = measured(fedctl, *options)["trials"]
    assert "65504" in failed["problem"]
    assert [trial["name"] for trial in others] == ["uniform 8", "uniform 4"]
    code, out, _ = fedctl("codec", "try", *options, "--plot", "plot.png")
    assert code == 0
    assert "65504" in out


# What is refused


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--codec", "zip", "'zip'"),
        ("--codec", "uniform:bits=99", "bits: input should be less than or equal to 8"),
        ("--codec", "uniform:bitz=3", "bitz"),
        ("--codec", "uniform:bits", "cannot be read"),
        ("--target-error", "1", "between 0 and 1, got 1"),
    ],
)
def test_a_wrong_encoding_is_refused_with_the_right_ones(
    fedctl: Run, model: Path, option: str, value: str, expected: str
) -> None:
    code, out, err = fedctl("codec", "try", model, option, value)
    assert (code, out) == (78, "")
    assert expected in err
    if option == "--codec":
        assert "kinds are raw, cast, uniform" in err


def _truncated(folder: Path) -> None:
    whole = write_model(folder / "whole", named(weights(9)))
    (folder / "file").write_bytes(whole.read_bytes()[:-7])


def _rotten(folder: Path) -> None:
    data = bytearray(write_model(folder / "whole", named(weights(9))).read_bytes())
    data[-7] ^= 1
    (folder / "file").write_bytes(data)


def _not_finite(folder: Path) -> None:
    save_file({"w": torch.tensor([1.0, float("nan")])}, folder / "file")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: None, "cannot read file: No such file"),
        (lambda folder: (folder / "file").mkdir(), "cannot read file"),
        (lambda folder: (folder / "file").write_bytes(b"PK" * 500), "not a usable safetensors file"),
        (_truncated, "its manifest says"),
        (_rotten, "has rotted"),
        (_not_finite, "'w' holds 1 values that are NaN"),
        (lambda folder: save_file({"steps": torch.tensor([3])}, folder / "file"), "no floating tensor"),
        (lambda folder: save_file({"w": torch.empty(0, 5)}, folder / "file"), "no floating tensor"),
    ],
)
def test_a_file_that_cannot_be_tried_is_refused_by_name(
    fedctl: Run, tmp_path: Path, make: Callable[[Path], object], expected: str
) -> None:
    make(tmp_path)
    code, out, err = fedctl("codec", "try", "file")
    assert (code, out) == (65, "")
    assert expected in re.sub(r"\s+", " ", err)
    assert "file" in err


def test_a_base_that_does_not_fit_is_refused_by_name(fedctl: Run, tmp_path: Path, model: Path) -> None:
    save_file({"first.weight": torch.zeros(3, 3)}, tmp_path / "other")
    code, _, err = fedctl("codec", "try", model, "--base", "other")
    assert code == 65
    assert "not of one model" in err
    assert "'first.weight' has shape (96, 80), expected (3, 3)" in err
    write_update(tmp_path / "update", named(weights(1)))
    for arguments in (("update", "--base", model), (model, "--base", "update")):
        code, _, err = fedctl("codec", "try", *arguments)
        assert code == 65
        assert "update is an update" in err


# What is shown


@pytest.mark.parametrize("width", [80, 100, 140])
def test_tables_fit_the_screen_and_cut_no_number(model: Path, width: int) -> None:
    subject = read_subject(model, None)
    trials = [try_encoding(subject.tensors, candidate) for candidate in candidates(["auto", "uniform"], [0.2])]
    for shown in (
        codec_render.trials_table(subject, trials, width),
        codec_render.tensors_table(trials[0], width),
        codec_render.text_plot(trials, width),
    ):
        assert shown is not None
        console = Console(file=io.StringIO(), width=width)
        console.print(shown)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert max(map(len, lines)) <= width
        assert not [line for line in lines if re.search(r"\d…", line)]


def test_tables_show_every_encoding_and_every_tensor(fedctl: Run, model: Path) -> None:
    code, out, _ = fedctl("codec", "try", model, "--codec", "lrq", "--codec", "raw", "--tensors")
    assert code == 0
    assert "model.safetensors, model: 3 tensors, 13,920 parameters, 55.7 kB" in out
    assert re.search(r"^lrq 0\.05 .*lrq 2", out, re.MULTILINE)
    assert len(re.findall(r"^second\.weight +64x96 +float32 +lrq", out, re.MULTILINE)) == 3
    assert "Shannon's bound" in out


def test_the_bound_is_that_of_a_gaussian() -> None:
    assert codec_render.shannon_bits(2.0**-6) == 3
    assert codec_render.shannon_bits(0) == float("inf")
    assert codec_render.shannon_bits(1.5) == 0


def test_the_text_plot_has_a_mark_for_each_lossy_kind_at_its_place() -> None:
    def trial(text: str, bits: float, error: float) -> Trial:
        (candidate,) = candidates([text], [0.1])
        return Trial(candidate, 1000, total_bytes=round(125 * bits), fidelity=Fidelity(1.0, 1.0, error))

    console = Console(file=io.StringIO(), width=80)
    plot = codec_render.text_plot([trial("raw", 32, 0), trial("auto", 0.4, 0.1), trial("cast", 16, 1e-6)], 80)
    assert plot is not None
    console.print(plot)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    rows = [line for line in lines if "│" in line]
    (of_auto,) = [index for index, line in enumerate(rows) if "A" in line]
    (of_cast,) = [index for index, line in enumerate(rows) if "C" in line]
    assert of_auto < of_cast
    assert rows[of_auto].index("A") < rows[of_cast].index("C")
    assert lines[-1].startswith("A auto   C cast")
    assert codec_render.text_plot([trial("raw", 32, 0)], 80) is None


@pytest.mark.parametrize("kinds", [("auto", "raw", "mask"), ("raw",)])
def test_a_picture_is_written(fedctl: Run, model: Path, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    arguments = [argument for kind in kinds for argument in ("--codec", kind)]
    code, out, err = fedctl("codec", "try", model, *arguments, "--plot", "plot.png")
    assert code == 0, err
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote plot.png" in err
    assert "Shannon's bound" not in out


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    fedctl: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code, expected in (("plot.gif", 78, ".png, .svg, .pdf"), ("nowhere/plot.png", 74, "no folder nowhere")):
        assert fedctl("codec", "try", model, "--plot", name)[:2] == (code, "")
        assert expected in fedctl("codec", "try", model, "--plot", name)[2]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = fedctl("codec", "try", model, "--plot", "plot.png")
    assert (code, out) == (78, "")
    assert "fedstream[examples]" in err


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom fed_server.cli.operator import main\ntry: main(['codec', 'try', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'matplotlib'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# The guide

REQUIRED = """
name = "digits"
workload = "digits"
cohort.size = 3
schedule.max_rounds = 10
"""


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", _blocks("toml"))
def test_every_config_in_the_guide_is_one(block: str) -> None:
    is_default = parse_run_config(REQUIRED + block) == parse_run_config(REQUIRED)
    assert is_default == block.startswith("# default")


@pytest.mark.parametrize("line", re.findall(r"`((?:up|down)link = .*?)`", GUIDE.read_text()))
def test_so_is_every_line(line: str) -> None:
    parse_run_config(REQUIRED + line)


def test_the_guide_knows_every_kind() -> None:
    text = GUIDE.read_text()
    for kind in (*CODECS_OF, "lattice", "delta"):
        assert f"`{kind}`" in text, kind


def test_the_commands_in_the_guide_have_options_that_exist(fedctl: Run) -> None:
    _, shown, _ = fedctl("codec", "try", "--help")
    used = re.findall(r"fedctl codec try (.*)", GUIDE.read_text())
    assert used
    for option in {option for line in used for option in re.findall(r"--[a-z-]+", line)}:
        assert option in shown
