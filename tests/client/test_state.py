from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch

from fed_client.cache import ModelCache
from fed_client.durable import SiteDiskFullError, write_durably
from fed_client.spool import Spool
from fed_client.state import Identity, StateDirectory, StateDirectoryLockedError, checked_id
from fed_core.errors import ConfigError, InvalidError
from fed_core.payload.writer import write_payload
from fed_core.specs import TensorSpec
from fedstream.v1 import common_pb2, participation_pb2

MakePayload = Callable[..., tuple[bytes, int]]


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    state = StateDirectory(tmp_path / "state")
    state.create()
    return state


def test_an_identity_survives_and_only_its_user_reads_it(state: StateDirectory) -> None:
    assert state.identity() is None
    identity = Identity("c1", "s1", "site", "host:1")
    state.store_identity(identity)
    assert StateDirectory(state.root).identity() == identity
    assert (state.root / "identity.json").stat().st_mode & 0o777 == 0o600
    assert state.root.stat().st_mode & 0o777 == 0o700


def test_a_secret_is_not_printed() -> None:
    assert "s3cret" not in repr(Identity("c1", "s3cret", "site", "host:1"))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"client_id": "c1"}'])
def test_a_damaged_identity_is_named_with_its_cure(state: StateDirectory, damage: str) -> None:
    (state.root / "identity.json").write_text(damage)
    with pytest.raises(ConfigError, match=r"identity\.json.*enrol anew"):
        state.identity()


def test_an_enrolment_keeps_its_name_until_an_identity_is_stored(state: StateDirectory) -> None:
    first = state.enrollment_request_id()
    assert StateDirectory(state.root).enrollment_request_id() == first
    state.store_identity(Identity("c1", "s1", "site", "host:1"))
    assert state.enrollment_request_id() != first


def test_a_second_daemon_is_refused_by_the_process_id_of_the_first(state: StateDirectory) -> None:
    assert state.daemon_pid() is None
    state.lock()
    assert StateDirectory(state.root).daemon_pid() == os.getpid()
    with pytest.raises(StateDirectoryLockedError, match=f"process {os.getpid()}"):
        StateDirectory(state.root).lock()
    state.unlock()
    StateDirectory(state.root).lock()


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state_dir"):
        StateDirectory(tmp_path / "file" / "state").create()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\0b", ".hidden", "x" * 101, "ä"])
def test_an_assignment_id_that_could_leave_its_folder_is_refused(name: str, state: StateDirectory) -> None:
    with pytest.raises(InvalidError):
        checked_id(name)
    Spool(state.spool).remove(name)


def _assignment(name: str) -> participation_pb2.Assignment:
    return participation_pb2.Assignment(assignment_id=name, run_id="r1", round=3)


def test_a_spooled_update_is_found_after_a_restart(state: StateDirectory) -> None:
    spool = Spool(state.spool)
    for name in ("a2", "a1"):
        spool.path(name).write_bytes(b"update")
        spool.add(_assignment(name), b"d" * 32, 6)
    os.utime(state.spool / "a1.json", (2e9, 2e9))
    found = Spool(state.spool).scan()
    assert [each.assignment_id for each in found] == ["a2", "a1"]
    assert found[0].assignment == _assignment("a2")
    assert (found[0].digest, found[0].total_bytes, found[0].path) == (b"d" * 32, 6, spool.path("a2"))


def test_what_a_crash_left_half_done_is_swept(state: StateDirectory) -> None:
    spool = Spool(state.spool)
    spool.path("unvouched").write_bytes(b"update")
    spool.path("a1").write_bytes(b"update")
    spool.add(_assignment("a1"), b"d" * 32, 6)
    spool.path("gone").write_bytes(b"update")
    spool.add(_assignment("gone"), b"d" * 32, 6)
    spool.path("gone").unlink()
    (state.spool / "bad.json").write_text("{")
    (state.spool / "x.update.tmp123").write_bytes(b"half")
    (state.spool / "renamed.json").write_bytes((state.spool / "a1.json").read_bytes())
    assert [each.assignment_id for each in spool.scan()] == ["a1"]
    assert sorted(path.name for path in state.spool.iterdir()) == ["a1.json", "a1.update"]


def test_a_removed_update_is_gone(state: StateDirectory) -> None:
    spool = Spool(state.spool)
    spool.path("a1").write_bytes(b"update")
    spool.add(_assignment("a1"), b"d" * 32, 6)
    spool.remove("a1")
    spool.remove("a1")
    assert list(state.spool.iterdir()) == []


def put_model(cache: ModelCache, run: str, version: int, used_at: float) -> bytes:
    spec = TensorSpec("w", (3,), "float32")
    file = BytesIO()
    written = write_payload(
        file, kind=common_pb2.PAYLOAD_KIND_MODEL, run_id=run, round=0, model_version=version, base_digest=b"", update=None,
        tensors=[(spec, torch.zeros(3))],
    )  # fmt: skip
    cache.part(written.digest).write_bytes(file.getvalue())
    os.utime(cache.complete_model(written.digest), (used_at, used_at))
    return written.digest


def test_the_cache_keeps_what_is_in_use_and_the_newest_version_of_each_run(state: StateDirectory) -> None:
    cache = ModelCache(state.cache, keep=2)
    # A run whose old version was evaluated last, and one that this site takes part in rarely.
    used_at = {("a", 1): 8e8, ("a", 2): 1e9, ("a", 3): 9e8, ("b", 7): 1e8, ("b", 6): 2e8, ("c", 1): 1e7}
    digests = {key: put_model(cache, *key, time) for key, time in used_at.items()}
    best_first = [("a", 3), ("b", 7), ("c", 1), ("a", 2), ("b", 6), ("a", 1)]
    assert cache.digests() == [digests[key] for key in best_first]
    cache.trim(in_use={digests["a", 1]})
    kept = {digests[key] for key in (("a", 1), ("a", 3), ("b", 7))}
    assert {path.name for path in state.cache.iterdir()} == {cache.path(digest).name for digest in kept}
    assert set(cache.digests()) == kept
    # The same after a restart, in which the files say what they are.
    again = ModelCache(state.cache, keep=2)
    again.verify()
    assert again.digests() == cache.digests()


def test_a_model_is_kept_whatever_the_settings_say(state: StateDirectory) -> None:
    cache = ModelCache(state.cache, keep=0)
    old, new = put_model(cache, "a", 1, 1e9), put_model(cache, "a", 2, 1e8)
    assert cache.trim(in_use=set()) == [cache.path(old)]
    assert cache.digests() == [new]


def test_the_cache_forgets_steps_that_nobody_needs_and_keeps_the_newest_parts(state: StateDirectory) -> None:
    cache = ModelCache(state.cache, keep=1)
    digests = [bytes([number]) * 32 for number in range(4)]
    for age, digest in enumerate(digests):
        for path in (cache.part(digest), cache.step(digest)):
            path.write_bytes(b"bytes")
            os.utime(path, (1e9 - age, 1e9 - age))
    state.cache.joinpath(f"{digests[1].hex()}.payload.tmp").write_bytes(b"half")
    cache.trim(in_use={digests[3]})
    kept = (cache.part(digests[0]), cache.part(digests[3]), cache.step(digests[3]))
    assert {path.name for path in state.cache.iterdir()} == {path.name for path in kept}


def test_a_model_whose_file_went_away_is_not_spoken_of(state: StateDirectory) -> None:
    cache = ModelCache(state.cache, keep=1)
    digest = put_model(cache, "a", 1, 1e9)
    cache.path(digest).unlink()
    assert cache.digests() == []
    assert not cache.has_model(digest)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", path], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"may not mount a small disk here: {made.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_is_named_and_the_old_file_stays(small_disk: Path) -> None:
    write_durably(small_disk / "file", b"old")
    with pytest.raises(SiteDiskFullError, match="no space left"):
        write_durably(small_disk / "file", bytes(2**17))
    assert [path.name for path in small_disk.iterdir()] == ["file"]
    assert (small_disk / "file").read_bytes() == b"old"
