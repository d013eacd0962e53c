"""A package on disk: built aside, checked, then moved into place in one step; its manifest, checksums and archive.

An export that is interrupted or refused leaves nothing behind but a hidden `.<name>.partial-…` folder,
which the next export removes; an older export of that name stays as it was until the new one is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuneflow.errors import ExportError, StorageError
from finetuneflow.workspace import (
    check_name,
    directory_lock,
    sha256_file,
    sync_directory,
    translate_os_errors,
    write_atomic,
    write_json,
)

ARCHIVE = "finetuneflow_export.zip"
CHECKSUMS = "SHA256SUMS"
MANIFEST = "manifest.json"
MEMBER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
STORED_SUFFIXES = (".safetensors", ".png")  # weights and pictures do not shrink; storing them is many times faster
ARCHIVE_TIME = (1980, 1, 1, 0, 0, 0)  # the same content gives the same archive, byte for byte


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One file of a package: its name inside, its size and hash."""

    name: str
    bytes: int
    sha256: str


@contextlib.contextmanager
def staged(exports_dir: Path, name: str, *, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder to build in; on success it becomes `exports_dir/name`, on any error it vanishes.

    Raises `STORAGE_BAD_NAME`, `STORAGE_EXISTS` (unless `overwrite`), `RUN_BUSY` when another export is under way.
    """
    target = exports_dir / check_export_name(name)
    with translate_os_errors(exports_dir):
        exports_dir.mkdir(parents=True, exist_ok=True)
    with directory_lock(exports_dir):
        _clear_leftovers(exports_dir, name)
        if (target.exists() or target.is_symlink()) and not overwrite:
            raise StorageError(
                "STORAGE_EXISTS",
                f"The export {name!r} exists already.",
                where=str(target),
                remedy="Choose another name with --name, or replace it with --overwrite.",
            )
        with translate_os_errors(exports_dir):
            stage = Path(tempfile.mkdtemp(prefix=f".{name}.partial-", dir=exports_dir))
        try:
            with translate_os_errors(stage):
                yield stage
                _settle(stage)
                _publish(stage, target)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


def check_export_name(name: str) -> str:
    """`name` if it may become a folder of `exports/`; "lock" is the name of the lock file there."""
    if check_name(name, what="an export name") == "lock":
        raise StorageError(
            "STORAGE_BAD_NAME", "'lock' cannot be used as an export name.", remedy="Choose another name with --name."
        )
    return name


def _clear_leftovers(exports_dir: Path, name: str) -> None:
    """Remove what an interrupted export left; put the older export back if it was interrupted between its two renames."""
    for old in sorted(exports_dir.glob(f".{name}.old-*")):
        if (exports_dir / name).exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, exports_dir / name)
    for partial in exports_dir.glob(f".{name}.partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _settle(stage: Path) -> None:
    """Make every file readable for others (safetensors writes 0600) and force it to disk before the rename."""
    for path in member_paths(stage):
        os.chmod(path, 0o644)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    os.chmod(stage, 0o755)
    sync_directory(stage)


def _publish(stage: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.old-{stage.name.rsplit('-', 1)[-1]}")
    if target.exists() or target.is_symlink():
        os.rename(target, aside)
    os.rename(stage, target)
    sync_directory(target.parent)
    if aside.is_symlink() or aside.is_file():
        aside.unlink()
    else:
        shutil.rmtree(aside, ignore_errors=True)


def member_paths(directory: Path) -> list[Path]:
    """The files of a flat package in name order. A link, a sub-folder or an odd name is refused, never followed."""
    paths = sorted(directory.iterdir(), key=lambda path: path.name)
    for path in paths:
        if path.is_symlink() or not path.is_file() or not MEMBER_NAME.fullmatch(path.name) or ".." in path.name:
            raise ExportError(
                "EXPORT_BAD_MEMBER",
                f"{path.name[:100]!r} cannot be part of a package: only plain files with plain names are.",
                where=str(directory),
                remedy="Remove it from the run's folder and export again.",
            )
    return paths


def list_files(directory: Path) -> tuple[ExportedFile, ...]:
    """Name, size and hash of every file of a package."""
    return tuple(ExportedFile(path.name, path.stat().st_size, sha256_file(path)) for path in member_paths(directory))


def seal(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write `manifest.json` (what is in the package and how it was checked) and `SHA256SUMS` for `sha256sum -c`."""
    files = [{"name": f.name, "bytes": f.bytes, "sha256": f.sha256} for f in list_files(directory)]
    write_json(directory / MANIFEST, {"format": 1, **facts, "files": files})
    write_atomic(directory / CHECKSUMS, "".join(f"{f.sha256}  {f.name}\n" for f in list_files(directory)))


def write_archive(directory: Path, path: Path) -> Path:
    """Zip the package's files (flat, fixed times, so equal content gives equal bytes), read it back and compare."""
    members = [member for member in member_paths(directory) if member.name != path.name]
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            _add(archive, member)
    _check_archive(path, members)
    return path


def _add(archive: zipfile.ZipFile, member: Path) -> None:
    info = zipfile.ZipInfo(member.name, ARCHIVE_TIME)
    info.compress_type = zipfile.ZIP_STORED if member.suffix in STORED_SUFFIXES else zipfile.ZIP_DEFLATED
    info.create_system = 3  # Unix: the permissions below mean what they say
    info.external_attr = 0o100644 << 16
    info.file_size = member.stat().st_size  # lets zipfile switch to 64-bit sizes in time
    with member.open("rb") as source, archive.open(info, "w") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def _check_archive(path: Path, members: list[Path]) -> None:
    with zipfile.ZipFile(path) as archive:
        same_names = archive.namelist() == [member.name for member in members]
        if not same_names or any(_member_digest(archive, member.name) != sha256_file(member) for member in members):
            raise ExportError(
                "EXPORT_CHECK_FAILED",
                f"{path.name}, read back, differs from its files.",
                remedy="Check the disk and export again.",
            )


def _member_digest(archive: zipfile.ZipFile, name: str) -> str:
    with archive.open(name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # ZipExtFile reads like any file
