"""The data directory: one daemon, files that are whole or absent, nothing left behind."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fed_core.errors import ConfigError, ConflictError, DiskFullError, InvalidError
from fed_server.store.blobs import FORMAT, DataDirectory


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataDirectory]:
    with DataDirectory(tmp_path / "data") as directory:
        yield directory


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


# Opening


def test_a_new_directory_is_private_and_says_its_format(tmp_path: Path) -> None:
    with DataDirectory(tmp_path / "some" / "data") as data:
        assert stat.S_IMODE(data.root.stat().st_mode) == 0o700
        assert (data.root / "format").read_text() == "fedstream-data 2\n"
        assert (data.root / "lock").read_text() == f"{os.getpid()}\n"


def test_an_empty_directory_is_taken_and_made_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "lost+found").mkdir()
    with DataDirectory(tmp_path) as data:
        assert stat.S_IMODE(data.root.stat().st_mode) == 0o700


def test_a_directory_is_opened_again_with_all_that_is_in_it(tmp_path: Path) -> None:
    with DataDirectory(tmp_path / "data") as data:
        write(data.update_path("a1"))
        write(data.root / "join-token")
    with DataDirectory(tmp_path / "data") as data:
        assert data.update_path("a1").exists()


def test_one_whose_making_was_interrupted_is_completed(tmp_path: Path) -> None:
    for name in ("lock", "format.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "uploads").mkdir()
    with DataDirectory(tmp_path) as data:
        assert (data.root / "format").read_text().strip() == FORMAT
        assert (data.root / "payloads").is_dir()


def test_another_format_is_refused_by_both_names_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "format").write_text("fedstream-data 1\n")
    with pytest.raises(ConfigError, match=r"'fedstream-data 1'.*'fedstream-data 2'.*--data-dir"):
        DataDirectory(tmp_path)
    assert os.listdir(tmp_path) == ["format"]


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"not a data directory.*thesis\.tex"):
        DataDirectory(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        DataDirectory(tmp_path / "data")


def test_a_second_daemon_is_refused_with_the_process_that_holds_the_directory(data: DataDirectory) -> None:
    with pytest.raises(ConflictError, match=f"is in use by process {os.getpid()}: stop it"):
        DataDirectory(data.root)


def test_closing_lets_another_daemon_in(data: DataDirectory) -> None:
    data.close()
    data.close()
    DataDirectory(data.root).close()


def test_the_lock_goes_with_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fed_server.store.blobs import DataDirectory\n"
        "held = DataDirectory(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConflictError, match=f"process {holder.pid}"):
            DataDirectory(tmp_path / "data")
        holder.send_signal(signal.SIGKILL)
    DataDirectory(tmp_path / "data").close()


# Places


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "-flag", "a.b", "a\0", "a\n", "x" * 101])
def test_an_id_that_could_lead_elsewhere_is_refused(data: DataDirectory, name: str) -> None:
    of_runs = [
        lambda run_id, of_run=of_run: of_run(run_id, 0)
        for of_run in (data.model_path, data.average_path, data.master_path, data.optimizer_path)
    ]
    for place in (data.upload_path, data.update_path, data.payload_path, *of_runs):
        with pytest.raises(InvalidError, match="is not an id"):
            place(name)


def test_every_kind_of_file_has_its_place(data: DataDirectory) -> None:
    places = [
        data.database_path,
        data.upload_path("a1"),
        data.update_path("a1"),
        data.model_path("r1", 3),
        data.average_path("r1", 3),
        data.master_path("r1", 3),
        data.optimizer_path("r1", 3),
        data.payload_path("ab" * 32),
    ]
    assert [str(place.relative_to(data.root)) for place in places] == [
        "state.sqlite",
        "uploads/a1.part",
        "updates/a1.update",
        "models/r1/3.safetensors",
        "models/r1/3.average.safetensors",
        "masters/r1/3.safetensors",
        "masters/r1/3.optimizer.safetensors",
        f"payloads/{'ab' * 32}.payload",
    ]


# Writing


def test_publishing_gives_a_file_its_name_in_place_of_an_older_one(data: DataDirectory) -> None:
    final = data.model_path("r1", 0)
    for content in (b"old", b"new"):
        temporary = data.temporary(final)
        assert temporary.parent == final.parent
        temporary.write_bytes(content)
        data.publish(temporary, final)
        assert final.read_bytes() == content
    assert os.listdir(final.parent) == [final.name]


def test_temporary_names_differ(data: DataDirectory) -> None:
    final = data.model_path("r1", 0)
    assert data.temporary(final) != data.temporary(final)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_is_a_full_disk_that_says_what_was_being_done(data: DataDirectory, code: int) -> None:
    with (
        pytest.raises(DiskFullError, match="storing an update: no space left in"),
        data.disk_errors("storing an update"),
    ):
        raise OSError(code, os.strerror(code))


def test_other_errors_of_the_system_go_up_as_they_are(data: DataDirectory) -> None:
    with pytest.raises(FileNotFoundError), data.disk_errors("storing an update"):
        data.upload_path("absent").read_bytes()


def test_a_disk_that_is_really_full_is_named_and_the_name_stays_free(tmp_path: Path) -> None:
    place = tmp_path / "tiny"
    place.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a filesystem, so no disk can be filled")
    try:
        with DataDirectory(place / "data") as data:
            data.require_free(100_000, "an update")
            with pytest.raises(DiskFullError, match=r"an update needs 1\.0 MB, but only 0\.\d MB are free"):
                data.require_free(1_000_000, "an update")
            final = data.update_path("a1")
            temporary = data.temporary(final)
            with pytest.raises(DiskFullError, match="storing an update"), data.disk_errors("storing an update"):
                temporary.write_bytes(b"x" * 1_000_000)
            assert not final.exists()
            temporary.unlink()
            temporary.write_bytes(b"x")
            data.publish(temporary, final)
            assert final.read_bytes() == b"x"
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


# Deleting


def test_a_sweep_deletes_what_nobody_needs_and_nothing_else(data: DataDirectory) -> None:
    live = [
        data.update_path("u1"),
        data.upload_path("p1"),
        data.payload_path("aa"),
        data.model_path("r1", 1),
        data.average_path("r1", 1),
        data.master_path("r1", 2),
        data.optimizer_path("r1", 2),
    ]
    dead = [
        data.update_path("u2"),
        data.upload_path("p2"),
        data.payload_path("bb"),
        data.model_path("r1", 0),
        data.average_path("r1", 0),
        data.model_path("r2", 0),
        data.master_path("r1", 1),
        data.master_path("r2", 0),
        data.optimizer_path("r1", 1),
        data.optimizer_path("r2", 0),
    ]
    foreign = [data.root / "join-token", data.root / "updates" / "README", data.database_path]
    for path in (*live, *dead, *foreign):
        write(path)
    assert sorted(data.sweep({"u1"}, {"p1"}, {"aa"}, {("r1", 1)}, {("r1", 2)})) == sorted(dead)
    assert all(path.exists() for path in (*live, *foreign))
    assert not any(path.exists() for path in dead)
    assert not data.model_path("r2", 0).parent.exists()
    assert not data.master_path("r2", 0).parent.exists()


def test_an_update_stays_while_its_upload_is_live(data: DataDirectory) -> None:
    write(data.update_path("a1"))
    assert data.sweep((), {"a1"}, (), (), ()) == []


def test_a_file_that_came_after_the_listing_stays(data: DataDirectory) -> None:
    old = write(data.upload_path("old"))
    listed = data.listing()
    new = write(data.upload_path("new"))
    assert data.sweep((), (), (), (), (), listed=listed) == [old]
    assert new.exists()


def test_a_folder_that_a_sweep_empties_stays_for_whoever_is_about_to_write_there(data: DataDirectory) -> None:
    old = write(data.released_path("r1", 1))
    coming = data.temporary(data.released_path("r1", 2))
    assert data.sweep((), (), (), (), (), listed=data.listing()) == [old]
    coming.touch()
    coming.unlink()
    data.sweep((), (), (), (), ())
    assert not coming.parent.exists()


def test_a_sweep_leaves_the_unfinished_files_of_this_daemon_and_deletes_those_of_a_dead_one(tmp_path: Path) -> None:
    with DataDirectory(tmp_path) as data:
        temporary = data.temporary(data.model_path("r1", 0))
        temporary.touch()
        assert data.sweep((), (), (), (), ()) == []
    with DataDirectory(tmp_path) as data:
        assert data.sweep((), (), (), (), ()) == [temporary]
        assert not temporary.parent.exists()
