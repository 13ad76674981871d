"""Writes that are seen whole or not at all, and what a killed writer leaves behind."""

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import atomic_directory, atomic_file, check_free, read_json, write_json

HOST = socket.gethostname()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "x.json") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert read_json(tmp_path / "x.json", "a test") == {"a": 1} and names(tmp_path) == ["x.json"]


def test_a_failed_write_leaves_no_folder(tmp_path):
    def fail(path):
        with atomic_directory(path) as folder:
            (folder / "half").touch()
            raise ZeroDivisionError

    (tmp_path / "old").mkdir()
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "old" / "a" / "b" / "c")
    assert names(tmp_path) == ["old"] and not names(tmp_path / "old")
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "a" / "b"):
        (tmp_path / "a" / "of another writer").touch()
        raise ZeroDivisionError
    assert names(tmp_path / "a") == ["of another writer"]


def test_the_temporary_name_says_what_who_and_where(tmp_path):
    with atomic_directory(tmp_path / "out") as folder:
        assert folder == tmp_path / f".out.{HOST}.{os.getpid()}.partial" and folder.is_dir()
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]


WRITER = """
    import sys, time
    from flexolmo_megatron.files import atomic_directory, atomic_file

    with atomic_directory(sys.argv[1] + "/out") as folder, atomic_file(sys.argv[1] + "/x.json") as file:
        (folder / "part").write_text("half")
        print("writing", flush=True)
        time.sleep(60)
"""


def test_the_next_write_sweeps_what_a_killed_writer_left(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    left = [f".out.{HOST}.{process.pid}.partial", f".x.json.{HOST}.{process.pid}.partial"]
    with atomic_directory(tmp_path / "out"):
        assert left[0] in names(tmp_path)  # while its writer lives
    (tmp_path / "out").rmdir()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert names(tmp_path) == left

    write_json(tmp_path / "x.json", 1)
    assert names(tmp_path) == [left[0], "x.json"]  # of another destination
    with atomic_directory(tmp_path / "out"):
        assert left[0] not in names(tmp_path)  # before the new one takes its space
    assert names(tmp_path) == ["out", "x.json"]


def test_nothing_else_is_swept(tmp_path, dead):
    kept = [
        f".x.{HOST}.{os.getppid()}.partial",  # a living process
        f".x.{HOST}.1.partial",  # somebody else's living process
        f".x.otherhost.{dead}.partial",
        f".y.{HOST}.{dead}.partial",  # another destination
        f".xx.{HOST}.{dead}.partial",
        f"x.{HOST}.{dead}.partial",
        f".x.{HOST}.{dead}.partial.txt",
        f".x.{HOST}.{dead}",
        f".x.{HOST}.{dead}a.partial",
        f".x.{HOST}.-1.partial",
        f".x.{HOST}.0.partial",
        f".x.{HOST}.{10**30}.partial",  # no process at all
        f".x.{HOST}..partial",
        ".x.partial",
    ]
    for name in kept:
        (tmp_path / name).write_text("mine")
    (tmp_path / f".x.{HOST}.{dead}.partial").mkdir()
    write_json(tmp_path / "x", 1)
    assert names(tmp_path) == sorted({*kept, "x"})  # the parent may be process 1
    assert all((tmp_path / name).read_text() == "mine" for name in kept)


def test_a_swept_link_is_not_followed(tmp_path, dead):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    (tmp_path / f".x.{HOST}.{dead}.partial").symlink_to("precious")
    write_json(tmp_path / "x", 1)
    assert names(tmp_path) == ["precious", "x"] and (tmp_path / "precious" / "file").read_text() == "mine"


def test_a_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(FlexOlmoError, match="cannot write .*/nowhere/x: No such file or directory; nothing was"):
        write_json(tmp_path / "nowhere" / "x", 1)


def test_a_read_only_disk_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_, **__):  # such a disk refuses to remove even what is not there
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(FlexOlmoError, match="cannot write .*/x: Read-only file system; nothing was changed"):
        write_json(tmp_path / "x", 1)


def test_results_need_a_folder_that_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(FlexOlmoError, match="cannot write .*/file/a/b: .*/file is not a folder that can be written"):
        check_free(tmp_path / "file" / "a" / "b")
    check_free(tmp_path / "a" / "b")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(FlexOlmoError, match="cannot write .*/a/b: .* is not a folder that can be written"):
        check_free(tmp_path / "a" / "b")


@pytest.mark.parametrize(("content", "reason"), [
    (b"{", "Expecting property name"), (b"\xff", "'utf-8' codec can't decode"), (b"[" * 100_000, "nested too deeply$"),
    (b"9" * 5000, "Exceeds the limit"),
])
def test_broken_json_is_one_sentence(tmp_path, content, reason):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(FlexOlmoError, match=f"x.json cannot be read as a test: {reason}"):
        read_json(tmp_path / "x.json", "a test")
