"""The trainer process as it is: a real child, real payloads, user code that misbehaves in every way we could think of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fed_client.training.loop import train
from fed_client.training.trainer import (
    MODEL_DAMAGED,
    EvaluateJob,
    Trainer,
    TrainingCancelledError,
    TrainJob,
    TrainResult,
    WorkloadError,
)
from fed_core.batches import reproducible
from fed_core.payload.reader import PayloadReader
from fed_core.payload.writer import write_payload
from fed_core.plan import ObjectivePlan, OptimizerPlan, TrainingPlan
from fed_core.safetensors_tiles import SafetensorsReader
from fed_core.specs import TensorSpec, fingerprint
from fed_core.tensors import difference, load_tensors, model_specs, model_tensors
from fed_core.workload import Site, initial_model, load_workload
from fedstream.v1 import common_pb2

pytestmark = pytest.mark.xdist_group("trainer")  # they share a process that takes seconds to start

# One file does everything, told by the learning rate, so that one warm process serves most tests.
TASK = """
import ctypes, os, signal, subprocess, sys, time
import torch
from torch import nn
from fed_core.workload import Workload

NUM_READS = 0

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("empty", torch.empty(0))
    def forward(self, x):
        return self.tied(self.norm(torch.relu(self.first(x))))

class Task(Workload):
    name = "task"
    version = "7"

    def model(self):
        return Net()

    def train_data(self, site):
        global NUM_READS
        NUM_READS += 1
        print("reading for", site.name, "from", site.data, "the", NUM_READS, "time")
        return torch.randn(24, 4), torch.randn(24, 4)

    def evaluation_data(self, site):
        return None if site.options.get("evaluates") == "no" else tuple(tensor[:10] for tensor in self.train_data(site))

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def training_step(self, model, batch, optimizer):
        do = DEEDS.get(optimizer.param_groups[0]["lr"])
        if do is not None:
            do(model)
        return super().training_step(model, batch, optimizer)

def fail(model):
    raise ValueError("the label 17 is unknown")

def exit_at_once(model):
    print("about to leave")
    os._exit(3)

def crash(model):
    ctypes.string_at(0)

def be_killed(model):
    os.kill(os.getpid(), signal.SIGKILL)

def poison(model):
    model.norm.running_mean[1] = float("nan")

def sleep(model):
    time.sleep(60)

def leave(model):
    sys.exit("enough")

def take_interrupts(model):
    os.kill(os.getpid(), signal.SIGINT)
    os.killpg(os.getpgrp(), signal.SIGINT)

def chatter(model):
    print("x" * 100_000)
    os.write(1, b'{"result": {}}\\n')
    sys.stdin.read()

def leave_someone_behind(model):
    os.fork() or (time.sleep(20), os._exit(0))
    os._exit(4)

DEEDS = {0.0100: fail, 0.0101: exit_at_once, 0.0102: crash, 0.0103: be_killed, 0.0104: poison, 0.0105: sleep, 0.0106: leave,
         0.0107: take_interrupts, 0.0108: chatter, 0.0109: leave_someone_behind}
"""
DEEDS = {
    "fail": 0.0100,
    "exit": 0.0101,
    "crash": 0.0102,
    "be killed": 0.0103,
    "poison": 0.0104,
    "sleep": 0.0105,
    "leave": 0.0106,
    "interrupt": 0.0107,
    "chatter": 0.0108,
    "leave someone": 0.0109,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "task.py").write_text(TASK)
    return folder


@pytest.fixture(scope="module")
def trainer(folder: Path) -> Iterator[Trainer]:
    site = Site("north", folder, {"colour": "blue"})
    with Trainer(str(folder / "task.py"), site=site, device="cpu", log_path=folder / "trainer.log") as trainer:
        yield trainer


@pytest.fixture(scope="module")
def base(folder: Path) -> TrainJob:
    """A job from the workload's own initial model."""
    model = initial_model(load_workload(str(folder / "task.py")), 3)
    values = model_tensors(model)
    return job_from(folder, [(spec, values[spec.name]) for spec in model_specs(model)], "base")


@pytest.fixture
def job(base: TrainJob, tmp_path: Path) -> TrainJob:
    return replace(base, out_path=tmp_path / "a1.update")


def job_from(folder: Path, tensors: list[tuple[TensorSpec, Any]], name: str) -> TrainJob:
    path = folder / f"{name}.payload"
    with path.open("wb") as file:
        written = write_payload(
            file,
            kind=common_pb2.PAYLOAD_KIND_MODEL,
            run_id="r",
            round=0,
            model_version=4,
            base_digest=b"",
            update=None,
            tensors=tensors,
        )
    return TrainJob(
        assignment_id="a1",
        run_id="r",
        round=5,
        model_version=4,
        model_path=path,
        base_digest=written.digest.hex(),
        plan=TrainingPlan(batch_size=8, optimizer=OptimizerPlan("sgd", 0.1), seed=11, epochs=2),
        fingerprint=fingerprint([spec for spec, _ in tensors]).hex(),
        uplink='{"kind": "raw"}',
        out_path=folder / f"{name}.update",
    )


def doing(job: TrainJob, deed: str) -> TrainJob:
    return replace(job, plan=replace(job.plan, optimizer=OptimizerPlan("sgd", DEEDS[deed])))


def evaluation(job: TrainJob) -> EvaluateJob:
    return EvaluateJob(
        job.assignment_id, job.model_path, job.base_digest, job.fingerprint, batch_size=4, seed=0, num_threads=1
    )


def failure(trainer: Trainer, job: TrainJob) -> WorkloadError:
    """What a job that must fail raises; nothing may be left of it."""
    with pytest.raises(WorkloadError) as caught:
        trainer.train(job)
    assert list(job.out_path.parent.iterdir()) == []
    return caught.value


def test_the_parent_does_not_import_torch() -> None:
    command = (
        "import sys, fed_client.training.trainer, fed_server.evaluation.evaluator; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", command], check=True)


def test_a_workload_describes_itself(trainer: Trainer, base: TrainJob) -> None:
    description = trainer.describe()
    assert (description.name, description.version, description.device) == ("task", "7", "cpu")
    assert description.fingerprint == base.fingerprint
    assert description.num_examples is None
    counted = trainer.describe(reads_data=True)
    assert (counted.num_examples, counted.num_evaluation_examples) == (24, 10)


def test_an_update_is_local_minus_received(trainer: Trainer, job: TrainJob) -> None:
    progress: list[tuple[int, int, Any]] = []
    result = trainer.train(job, lambda done, total, metrics: progress.append((done, total, metrics)))
    assert (result.num_examples, result.num_steps, result.is_partial) == (24, 6, False)
    assert progress[-1] == (6, 6, {"loss": result.metrics["loss"]})
    assert [path.name for path in job.out_path.parent.iterdir()] == ["a1.update"]
    assert job.out_path.stat().st_size == result.total_bytes

    with PayloadReader(job.out_path, bytes.fromhex(result.digest)) as update, PayloadReader(job.model_path) as base:
        manifest = update.manifest
        assert manifest.kind == common_pb2.PAYLOAD_KIND_UPDATE
        assert (manifest.run_id, manifest.round, manifest.model_version) == ("r", 5, 4)
        assert manifest.base_digest.hex() == job.base_digest
        assert manifest.specs == base.manifest.specs
        assert manifest.update is not None
        assert (manifest.update.assignment_id, manifest.update.num_examples) == ("a1", 24)
        assert (manifest.update.num_steps, manifest.update.custom_weight) == (6, 24)
        tensors = update.tensors(verify=True)
    # A tied weight travels once, a counter as its value, everything else as what training changed.
    assert "tied.weight" not in tensors
    assert tensors["norm.num_batches_tracked"] == 6
    assert tensors["first.weight"].abs().max() > 0
    assert tensors["norm.running_mean"].abs().max() > 0


def test_what_an_encoding_loses_is_carried_to_the_next_update(trainer: Trainer, job: TrainJob, tmp_path: Path) -> None:
    exact = tensors_of(job.out_path, trainer.train(job))
    job = replace(job, uplink='{"kind": "uniform", "bits": 2, "feedback": true}', carry_to=tmp_path / "run" / "a1")
    first = trainer.train(job)
    assert first.carried is not None
    assert (list(first.carried), first.not_carried) == (["residual"], [])
    path, arrived = tmp_path / "run" / "a1.residual", tensors_of(job.out_path, first)
    next_job = replace(job, carried={"residual": (path, first.carried["residual"])}, carry_to=tmp_path / "run" / "a2")
    second = trainer.train(next_job)
    with SafetensorsReader(tmp_path / "run" / "a2.residual") as left:
        for name in ("first.weight", "first.bias", "norm.weight"):
            sent = arrived[name] + tensors_of(job.out_path, second)[name]
            assert not torch.equal(arrived[name], exact[name])
            assert torch.allclose(sent + left.tensor(name), 2 * exact[name], atol=1e-6)
        assert "norm.running_mean" not in [spec.name for spec in left.specs]

    path.write_bytes(b"rotten")
    damaged = trainer.train(next_job)
    assert damaged.not_carried[0].startswith("the residual cannot be read: a1.residual is not a usable")
    assert tensors_of(job.out_path, damaged)["first.weight"].equal(arrived["first.weight"])
    assert damaged.carried == first.carried


def test_the_variates_correct_the_gradients_and_the_next_is_what_they_were(
    trainer: Trainer, job: TrainJob, base: TrainJob, tmp_path: Path
) -> None:
    """SCAFFOLD's second option, with everything that is on the way: c from a payload, h from a file, h' to another."""
    plan = replace(job.plan, objective=ObjectivePlan("scaffold"), epochs=None, steps=1)
    job = replace(job, plan=plan, carry_to=tmp_path / "run" / "a1")
    plain = trainer.train(job)
    slope = tensors_of(job.out_path, plain)["first.bias"] / -0.1
    assert plain.carried is not None
    with SafetensorsReader(tmp_path / "run" / "a1.variate") as left:
        assert torch.allclose(left.tensor("first.bias"), slope, atol=1e-6)
        specs = list(left.specs)
    assert "norm.running_mean" not in [spec.name for spec in specs]

    with (tmp_path / "common").open("wb") as file:
        common = write_payload(
            file,
            kind=common_pb2.PAYLOAD_KIND_VARIATE,
            run_id="r",
            round=0,
            model_version=4,
            base_digest=b"",
            update=None,
            tensors=[(spec, torch.full(spec.shape, 0.5)) for spec in specs],
        )
    variate = (tmp_path / "common", common.digest.hex())
    next_job = replace(
        job,
        carried={"variate": (tmp_path / "run" / "a1.variate", plain.carried["variate"])},
        carry_to=tmp_path / "run" / "a2",
        variate=variate,
    )
    result = trainer.train(next_job)
    assert result.not_carried == []
    # g - h + c is c alone, for g is the same again.
    assert torch.allclose(tensors_of(job.out_path, result)["first.bias"], torch.full((4,), -0.05), atol=1e-6)
    with SafetensorsReader(tmp_path / "run" / "a2.variate") as left:
        assert torch.allclose(left.tensor("first.bias"), slope, atol=1e-6)

    (tmp_path / "common").write_bytes(b"rotten")
    job.out_path.unlink()
    with pytest.raises(WorkloadError) as caught:
        trainer.train(next_job)
    assert caught.value.kind == MODEL_DAMAGED
    with pytest.raises(WorkloadError, match="the common variate is another model's: ") as caught:
        trainer.train(replace(next_job, variate=(base.model_path, base.base_digest)))


def test_without_feedback_nothing_is_carried(trainer: Trainer, job: TrainJob, tmp_path: Path) -> None:
    result = trainer.train(replace(job, carry_to=tmp_path / "run" / "a1"))
    assert (result.carried, result.not_carried) == (None, [])
    assert not (tmp_path / "run").exists()


def tensors_of(path: Path, result: TrainResult) -> dict[str, torch.Tensor]:
    with PayloadReader(path, bytes.fromhex(result.digest)) as update:
        return update.tensors(verify=True)


def test_the_update_is_that_of_the_same_training_in_this_process(trainer: Trainer, job: TrainJob) -> None:
    trainer.train(job)
    workload = load_workload(str(Path(trainer.workload_source)))
    model = initial_model(workload, 0)
    with PayloadReader(job.model_path) as payload:
        received = payload.tensors()
    load_tensors(model, received)
    with reproducible(0, 1):
        data = workload.train_data(Site())
    train(workload, model, data, job.plan, torch.device("cpu"))
    with PayloadReader(job.out_path) as update:
        for name, local in model_tensors(model).items():
            assert torch.equal(update.tensor(name), difference(local, received[name])), name


def test_a_second_job_gives_the_same_bits_fast_without_reading_again(
    trainer: Trainer, job: TrainJob, folder: Path
) -> None:
    first = trainer.train(job)
    reads = (folder / "trainer.log").read_text().count("reading for north")
    pid = trainer.pid
    begin = time.monotonic()
    again = trainer.train(job)
    elapsed = time.monotonic() - begin
    # training_seconds is in the manifest, so digests differ; what was learnt may not.
    assert replace_times(again) == replace_times(first)
    assert trainer.pid == pid
    assert (folder / "trainer.log").read_text().count("reading for north") == reads
    assert elapsed < 2


def replace_times(result: TrainResult) -> TrainResult:
    return replace(result, seconds=0.0, digest="")


def test_prints_go_to_the_log_and_not_into_the_answers(trainer: Trainer, job: TrainJob, folder: Path) -> None:
    assert trainer.train(doing(job, "chatter")).num_steps == 6
    log = (folder / "trainer.log").read_text()
    assert f"reading for north from {folder}" in log
    assert "x" * 100_000 in log


def test_interrupts_are_not_the_trainers_business(trainer: Trainer, job: TrainJob) -> None:
    assert trainer.train(doing(job, "interrupt")).num_steps == 6


def test_code_that_raises_is_reported_with_its_traceback(trainer: Trainer, job: TrainJob) -> None:
    error = failure(trainer, doing(job, "fail"))
    assert error.kind == "WORKLOAD"
    assert str(error) == "ValueError: the label 17 is unknown"
    assert "task.py" in error.traceback
    assert "in fail" in error.traceback
    pid = trainer.pid
    assert trainer.train(job).num_steps == 6
    assert trainer.pid == pid


def test_sys_exit_is_an_error_like_any_other(trainer: Trainer, job: TrainJob) -> None:
    error = failure(trainer, doing(job, "leave"))
    assert (error.kind, str(error)) == ("WORKLOAD", "the code called sys.exit('enough')")


@pytest.mark.parametrize(
    ("deed", "said", "last_words"),
    [
        ("exit", "exited with status 3", "about to leave"),
        ("crash", "was killed by SIGSEGV", "in crash"),
        ("be killed", "was killed by SIGKILL, perhaps because the machine ran out of memory", ""),
        ("leave someone", "exited with status 4", ""),
    ],
)
def test_a_trainer_that_dies_says_how_and_the_next_job_starts_another(
    trainer: Trainer, job: TrainJob, deed: str, said: str, last_words: str
) -> None:
    error = failure(trainer, doing(job, deed))
    assert error.kind == "TRAINER_DIED"
    assert said in str(error)
    assert last_words in error.traceback
    trainer.train(job)
    fresh = values_of(job)
    trainer.train(job)
    warm = values_of(job)
    assert all(torch.equal(fresh[name], value) for name, value in warm.items())


def values_of(job: TrainJob) -> dict[str, torch.Tensor]:
    with PayloadReader(job.out_path) as update:
        return update.tensors()


def test_a_tensor_that_is_not_finite_is_named(trainer: Trainer, job: TrainJob) -> None:
    error = failure(trainer, doing(job, "poison"))
    assert error.kind == "NOT_FINITE"
    assert "norm.running_mean" in str(error)


def test_another_model_is_explained(trainer: Trainer, folder: Path, base: TrainJob, tmp_path: Path) -> None:
    with PayloadReader(base.model_path) as payload:
        tensors = [
            (replace(spec, shape=(5, 4)), torch.ones(5, 4))
            if spec.name == "first.weight"
            else (spec, payload.tensor(spec.name))
            for spec in payload.manifest.specs
        ]
    job = replace(job_from(folder, tensors, "wide"), out_path=tmp_path / "wide.update")
    error = failure(trainer, job)
    assert error.kind == "FINGERPRINT_MISMATCH"
    assert "'first.weight' has shape (4, 4), expected (5, 4)" in str(error)
    with pytest.raises(WorkloadError, match="not the run's"):
        trainer.evaluate(evaluation(job))


@pytest.mark.parametrize("at", [0, 50, -1], ids=["preamble", "manifest", "values"])
def test_a_damaged_model_is_not_trained_on(trainer: Trainer, job: TrainJob, tmp_path: Path, at: int) -> None:
    damaged = bytearray(job.model_path.read_bytes())
    damaged[at] ^= 1
    path = tmp_path.parent / f"{tmp_path.name}.payload"
    path.write_bytes(damaged)
    error = failure(trainer, replace(job, model_path=path))
    assert error.kind == MODEL_DAMAGED
    assert "rotted" in str(error)
    with pytest.raises(WorkloadError, match="rotted"):
        trainer.evaluate(evaluation(replace(job, model_path=path)))


def test_a_model_that_is_gone_is_named(trainer: Trainer, job: TrainJob, tmp_path: Path) -> None:
    assert failure(trainer, replace(job, model_path=tmp_path / "nothing")).kind == MODEL_DAMAGED


def test_an_update_is_encoded_as_asked_and_says_what_that_cost(trainer: Trainer, job: TrainJob) -> None:
    exact = trainer.train(job)
    assert (exact.error, exact.gain, exact.codecs) == (0.0, 1.0, {"raw": 8})
    raw = values_of(job)
    result = trainer.train(replace(job, uplink='{"kind": "uniform", "bits": 4}'))
    # Integers and what is empty stay raw.
    assert result.codecs == {"uniform": 6, "raw": 2}
    assert result.raw_bytes == exact.raw_bytes
    with PayloadReader(job.out_path, bytes.fromhex(result.digest)) as update:
        assert update.manifest.update is not None
        assert (update.manifest.update.error, update.manifest.update.gain) == (result.error, result.gain)
        assert update.manifest.codecs == result.codecs
        lossy = [name for name in raw if update.entry(name).codec == "uniform"]
        decoded = update.tensors(verify=True)
    assert torch.equal(decoded["norm.num_batches_tracked"], raw["norm.num_batches_tracked"])
    before = torch.cat([raw[name].flatten() for name in lossy]).double()
    after = torch.cat([decoded[name].flatten() for name in lossy]).double()
    assert result.error == pytest.approx(float((before - after).square().sum() / before.square().sum()))
    assert result.gain == pytest.approx(float(before @ after / before.square().sum()))
    assert 0 < result.error < 0.1


def test_one_seed_gives_the_same_bits_and_another_does_not(trainer: Trainer, job: TrainJob) -> None:
    job = replace(job, uplink='{"kind": "uniform", "bits": 3, "rounding": "stochastic"}')
    trainer.train(job)
    first = values_of(job)
    trainer.cancel()
    trainer.train(job)
    again = values_of(job)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    trainer.train(replace(job, plan=replace(job.plan, seed=12)))
    other = values_of(job)
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("uplink", "words"),
    [
        ('{"kind": "telepathy"}', "telepathy"),
        ('{"kind": "uniform", "bits": 99}', "bits"),
        ("", "install the coordinator's version"),
    ],
    ids=["codec", "setting", "nothing"],
)
def test_an_unknown_encoding_is_refused_before_anything_is_done(
    trainer: Trainer, job: TrainJob, uplink: str, words: str
) -> None:
    began: list[Any] = []
    with pytest.raises(WorkloadError, match=words) as caught:
        # A training that could not be overlooked.
        trainer.train(replace(doing(job, "exit"), uplink=uplink), lambda *progress: began.append(progress))
    assert caught.value.kind == "REFUSED_BY_SITE"
    assert began == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(trainer: Trainer, job: TrainJob, tmp_path: Path) -> None:
    (tmp_path / "a1.update.tmp").symlink_to("/dev/full")
    error = failure(trainer, job)
    assert error.kind == "DISK_FULL"
    assert str(tmp_path) in str(error)


def test_an_evaluation_is_repeatable(trainer: Trainer, job: TrainJob) -> None:
    result = trainer.evaluate(evaluation(job))
    assert result.num_examples == 10
    assert result.metrics == trainer.evaluate(evaluation(job)).metrics
    assert result.metrics["loss"] > 0


def test_cancel_ends_the_job_and_the_next_one_runs(trainer: Trainer, job: TrainJob) -> None:
    timer = threading.Timer(0.5, trainer.cancel)
    timer.start()
    begin = time.monotonic()
    error = failure(trainer, doing(job, "sleep"))
    timer.join()
    assert isinstance(error, TrainingCancelledError)
    assert time.monotonic() - begin < 30
    assert trainer.train(job).num_steps == 6


def test_cancel_without_a_job_does_nothing(trainer: Trainer, job: TrainJob) -> None:
    trainer.describe()
    pid = trainer.pid
    trainer.cancel()
    assert trainer.train(job).num_steps == 6
    assert trainer.pid == pid


def test_what_a_progress_callback_raises_ends_the_job(trainer: Trainer, job: TrainJob) -> None:
    def stop(done: int, total: int, metrics: Any) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError):
        trainer.train(job, stop)
    assert trainer.train(job).num_steps == 6


def test_a_trainer_that_died_in_its_sleep_is_replaced(trainer: Trainer, job: TrainJob) -> None:
    trainer.describe()
    assert trainer.pid is not None
    os.kill(trainer.pid, signal.SIGKILL)
    os.waitid(os.P_PID, trainer.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent has not looked yet
    assert trainer.train(job).num_steps == 6


def test_a_site_without_evaluation_data_has_no_examples(folder: Path, base: TrainJob) -> None:
    with Trainer(str(folder / "task.py"), site=Site(options={"evaluates": "no"}), device="cpu") as trainer:
        assert trainer.evaluate(evaluation(base)).num_examples == 0
        assert trainer.describe(reads_data=True).num_evaluation_examples == 0


def test_a_workload_that_does_not_load_says_so_every_time(folder: Path) -> None:
    with Trainer(f"{folder}/missing.py", site=Site(), device="cpu") as trainer:
        for _ in range(2):
            with pytest.raises(WorkloadError, match="there is no file") as caught:
                trainer.describe()
            assert caught.value.kind == "WORKLOAD"


DAEMON = """
import sys, threading, time
from pathlib import Path
from fed_client.training.trainer import Trainer
from fed_core.workload import Site
trainer = Trainer(sys.argv[1], site=Site(), device="cpu")
trainer.describe()
print(trainer.pid, flush=True)
time.sleep(60)
"""


def test_the_trainer_does_not_outlive_the_daemon(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(folder / "task.py")], stdout=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        child = psutil.Process(int(daemon.stdout.readline()))
        os.kill(daemon.pid, signal.SIGKILL)
        child.wait(10)


def test_a_closed_trainer_takes_no_jobs(folder: Path, base: TrainJob) -> None:
    trainer = Trainer(str(folder / "task.py"), site=Site(), device="cpu")
    trainer.describe()
    assert trainer.pid is not None
    child = psutil.Process(trainer.pid)
    trainer.close()
    trainer.close()
    assert not child.is_running()
    with pytest.raises(TrainingCancelledError):
        trainer.train(base)
