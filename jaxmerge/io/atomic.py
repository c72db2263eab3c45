"""Folders that appear whole or not at all.

On Linux every file is written without a name (``O_TMPFILE``) and flushed to disk before it is linked into the
file system, so that a process killed while it writes leaves nothing behind; and a folder that is replaced is
exchanged for the new one in one step. Elsewhere a hidden staging folder beside the target is cleaned up on the way
out, and a replacement takes two renames.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmerge.memory import release

# Of a file: bytes, or what gives bytes piece by piece.
Contents = bytes | Sequence[Any]


def one_line(error: BaseException) -> str:
    """What an error says, in one line of bearable length."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def check_target(path: Path, force: bool, marker: str | None) -> None:
    """Refuses a target that may not be written.

    Args:
        path: The folder to be.
        force: Whether a folder that holds the marker may be replaced.
        marker: The file by which a folder of the right kind is known; None if that is known already.

    Raises:
        ValueError: If something is there that may not be replaced, or the place cannot be written to.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path}: is a broken link")
    if path.exists():
        if not force:
            raise ValueError(f"{path}: already exists (--force replaces an adapter)")
        if not path.is_dir():
            raise ValueError(f"{path}: is a file, not an adapter folder; it is left alone")
        if marker is not None and not (path / marker).is_file() and any(path.iterdir()):
            raise ValueError(f"{path}: is not an adapter (no {marker} in it), so --force does not replace it")
    place = existing_ancestor(path.parent if not path.exists() else path)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: cannot be written, {place} is not a writable folder")


def write_folder(
    path: Path, files: Mapping[str, Contents], *, force: bool, marker: str, owned: Collection[str]
) -> None:
    """Writes a folder of files, atomically.

    Args:
        path: The folder; missing parents are made.
        files: Name -> contents, whole or in pieces.
        force: Replace a folder of the same kind.
        marker: The file by which that kind is known.
        owned: The names that belong to the kind. What else lies in a replaced folder stays there.

    Raises:
        ValueError: If the target may not be written.
        OSError: If the disk fails or is full; nothing is left then.
    """
    check_target(path, force, marker)
    path = path.resolve()
    with _named(path), contextlib.ExitStack() as stack:
        handles = _write_unnamed(existing_ancestor(path.parent), files, stack)
        made = _make_parents(path.parent)
        staging = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
        try:
            staging.mkdir()
            for name, data in files.items():
                if handles is None or not _link(handles[name], staging / name):
                    _write_named(staging / name, data)
            _sync_folder(staging)
            put_in_place(staging, path, owned, force)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise
        _sync_folder(path.parent)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors name what is written, and not the files that it is made of on the way."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or one_line(error), str(path)) from error


def check_file_target(path: Path, force: bool) -> None:
    """Refuses a file that may not be written.

    Args:
        path: The file to be.
        force: Whether a file may be replaced.

    Raises:
        ValueError: If something is there that may not be replaced, or the place cannot be written to.
    """
    if path.is_dir() or (path.is_symlink() and not path.exists()):
        raise ValueError(f"{path}: is {'a folder' if path.is_dir() else 'a broken link'}; it is left alone")
    if path.exists() and not force:
        raise ValueError(f"{path}: already exists (--force replaces an adapter)")
    place = existing_ancestor(path.parent)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: cannot be written, {place} is not a writable folder")


def write_file(path: Path, data: Contents, *, force: bool) -> None:
    """Writes a file, atomically.

    Args:
        path: The file; missing parents are made.
        data: Its contents.
        force: Replace a file.

    Raises:
        ValueError: If the target may not be written.
        OSError: If the disk fails or is full; nothing is left then.
    """
    check_file_target(path, force)
    path = path.resolve()
    with _named(path), contextlib.ExitStack() as stack:
        handles = _write_unnamed(existing_ancestor(path.parent), {path.name: data}, stack)
        _make_parents(path.parent)
        staging = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
        try:
            if handles is None or not _link(handles[path.name], staging):
                _write_named(staging, data)
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
        _sync_folder(path.parent)


def existing_ancestor(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _make_parents(folder: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that were missing, innermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _write_unnamed(folder: Path, files: Mapping[str, Contents], stack: contextlib.ExitStack) -> dict[str, int] | None:
    """Writes files that have no name yet; None where the file system does not know such files."""
    flag = getattr(os, "O_TMPFILE", None)
    if flag is None:
        return None
    handles = {}
    for name, data in files.items():
        try:
            handle = os.open(folder, flag | os.O_WRONLY, 0o666)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                return None
            raise
        stack.callback(os.close, handle)
        _write_all(handle, data)
        handles[name] = handle
    return handles


def _link(handle: int, target: Path) -> bool:
    """Gives an unnamed file its name; False where /proc is not there to do it through."""
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        # With a folder handle Python calls linkat and follows the link in /proc; without one it does not.
        os.link(f"/proc/self/fd/{handle}", target.name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        return False
    finally:
        os.close(folder)
    return True


def _write_named(path: Path, data: Contents) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(handle, data)
    finally:
        os.close(handle)


def _write_all(handle: int, data: Contents) -> None:
    for piece in [data] if isinstance(data, bytes) else data:
        view = memoryview(piece)
        while view:
            # One call writes at most 2 GiB.
            view = view[os.write(handle, view[: 2**30]) :]
        release(piece)
    os.fsync(handle)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Some file systems cannot sync a folder; the files are synced.
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def put_in_place(staging: Path, path: Path, owned: Collection[str], force: bool) -> None:
    """Moves a finished folder to its place; of one that it replaces, what is not owned moves into the new one."""
    if not force or not path.exists():
        if path.exists():  # It was not there when the work began.
            raise ValueError(f"{path}: already exists (--force replaces an adapter)")
        staging.rename(path)
        return
    old = staging if _exchange(staging, path) else _replace(staging, path)
    for entry in old.iterdir():
        if entry.name not in owned:
            entry.rename(path / entry.name)
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _replace(staging: Path, path: Path) -> Path:
    """Puts a folder in the place of another, which is moved aside; returns where to."""
    old = path.parent / f".{path.name}.{secrets.token_hex(4)}.replaced"
    path.rename(old)
    try:
        staging.rename(path)
    except BaseException:
        old.rename(path)
        raise
    return old
