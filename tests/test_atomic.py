"""The output appears whole or not at all, and nothing that is there is lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmerge.io import atomic

MARKER = "marker.json"
FILES = {MARKER: b"{}", "weights": b"new" * 1000}


def write(path, force=False, files=FILES):
    atomic.write_folder(path, files, force=force, marker=MARKER, owned=files)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def everything(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture(params=["unnamed files", "staging folder"])
def either_way(request, monkeypatch):
    """With and without a file system that knows files without a name."""
    if request.param == "staging folder":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return request.param


def test_writes_all_files_and_missing_parents(tmp_path, either_way):
    write(tmp_path / "a" / "b" / "out")
    assert contents(tmp_path / "a" / "b" / "out") == FILES
    assert everything(tmp_path) == ["a", "a/b", "a/b/out", f"a/b/out/{MARKER}", "a/b/out/weights"]


def test_permissions_follow_the_umask(tmp_path, either_way):
    old = os.umask(0o027)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "out" / "weights").stat().st_mode & 0o777 == 0o640


def test_refuses_what_exists(tmp_path, either_way):
    write(tmp_path / "out")
    with pytest.raises(ValueError, match="already exists"):
        write(tmp_path / "out", files={MARKER: b"other"})
    assert contents(tmp_path / "out") == FILES


def test_force_replaces_its_own_kind_and_leaves_what_is_foreign(tmp_path, either_way):
    out = tmp_path / "out"
    write(out)
    (out / "notes.txt").write_text("mine")
    (out / "checkpoint-5").mkdir()
    (out / "checkpoint-5" / "weights").write_text("mine too")
    write(out, force=True, files={MARKER: b"2", "weights": b"2"})
    assert contents(out) == {
        MARKER: b"2", "weights": b"2", "notes.txt": b"mine", "checkpoint-5/weights": b"mine too",
    }  # fmt: skip
    assert everything(tmp_path)[0] == "out"
    assert len(list(tmp_path.iterdir())) == 1


def test_force_removes_files_of_its_kind_that_are_not_written_anew(tmp_path, either_way):
    write(tmp_path / "out")
    atomic.write_folder(tmp_path / "out", {MARKER: b"2"}, force=True, marker=MARKER, owned=FILES)
    assert contents(tmp_path / "out") == {MARKER: b"2"}


def test_force_does_not_replace_a_folder_of_another_kind(tmp_path, either_way):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=MARKER):
        write(tmp_path / "precious", force=True)
    (tmp_path / "file").write_text("years")
    with pytest.raises(ValueError, match="is a file"):
        write(tmp_path / "file", force=True)
    assert contents(tmp_path) == {"precious/thesis.tex": b"years", "file": b"years"}


def test_force_follows_a_link_to_the_folder(tmp_path, either_way):
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", force=True, files={MARKER: b"2", "weights": b"2"})
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == {MARKER: b"2", "weights": b"2"}


def test_a_full_disk_leaves_nothing(tmp_path, either_way, monkeypatch):
    written = 0

    def full(handle, data):
        nonlocal written
        written += len(data)
        if written > 2000:
            raise OSError(28, "No space left on device")
        return real(handle, data)

    real = os.write
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "new" / "out")
    assert error.value.filename == str(tmp_path / "new" / "out")
    assert everything(tmp_path) == []


def test_a_failure_while_replacing_leaves_the_old(tmp_path, either_way, monkeypatch):
    write(tmp_path / "out")
    real = Path.rename

    def fail(self, target):
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)  # As where the system has no such call.
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path / "out", force=True, files={MARKER: b"2"})
    assert contents(tmp_path / "out") == FILES
    assert len(list(tmp_path.iterdir())) == 1


def test_a_killed_process_leaves_nothing(tmp_path):
    program = f"""
import os, sys, time
from pathlib import Path
from jaxmerge.io import atomic
sync = os.fsync
def slow(handle):
    sync(handle)
    print("written", flush=True)
    time.sleep(60)
os.fsync = slow
out = Path({str(tmp_path / "new" / "out")!r})
atomic.write_folder(out, {{"a": b"x" * 10**6}}, force=False, marker="a", owned=["a"])
"""
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(number)
        process.wait(20)
        process.stdout.close()
        time.sleep(0.1)
        assert everything(tmp_path) == []


def test_what_appears_meanwhile_is_not_replaced_without_force(tmp_path, either_way, monkeypatch):
    real = atomic._sync_folder

    def meanwhile(folder):
        monkeypatch.setattr(atomic, "_sync_folder", real)
        write(tmp_path / "out", files={MARKER: b"first"})
        real(folder)

    monkeypatch.setattr(atomic, "_sync_folder", meanwhile)
    with pytest.raises(ValueError, match="already exists"):
        write(tmp_path / "out", files={MARKER: b"second"})
    assert contents(tmp_path) == {f"out/{MARKER}": b"first"}


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not a writable folder"):
        atomic.check_target(tmp_path / "file" / "out", False, MARKER)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="broken link"):
        atomic.check_target(tmp_path / "dangling", True, MARKER)
