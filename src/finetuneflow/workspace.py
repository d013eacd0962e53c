"""The data directory: names, safe joins, atomic writes, locks, free space, hashes.

Everything FineTuneFlow writes lies under one folder, the workspace (`--workspace`, or the
environment variable `FTF_HOME`, or `./ftf-workspace`). This module is the only one that
turns a name from outside into a path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from finetuneflow.errors import StorageError

NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,98}[a-z0-9])?")
# Names Windows reserves: a run made here must be copyable there.
RESERVED_NAMES = frozenset({"con", "prn", "aux", "nul", *(f"com{i}" for i in range(1, 10)), *(f"lpt{i}" for i in range(1, 10))})


def check_name(name: str, *, what: str = "a name") -> str:
    """Return `name` if it is safe as one path part, else raise `STORAGE_BAD_NAME`."""
    plain = NAME_PATTERN.fullmatch(name) and ".." not in name and name.split(".")[0] not in RESERVED_NAMES
    if not plain:
        raise StorageError(
            "STORAGE_BAD_NAME",
            f"{name[:80]!r} cannot be used as {what}.",
            remedy="Use lower-case letters, digits, '.', '_' and '-'; start and end with a letter or digit; at most 100.",
        )
    return name


def safe_join(root: Path, *parts: str) -> Path:
    """Join untrusted relative parts below `root`; the result, links resolved, must stay there."""
    joined = root.joinpath(*parts)
    if any("\0" in part for part in parts) or not joined.resolve().is_relative_to(root.resolve()):
        raise StorageError(
            "STORAGE_BAD_NAME", f"The path {'/'.join(parts)[:120]!r} leaves its folder.", remedy="Use a name inside the folder."
        )
    return joined


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks (constant memory)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON (sorted keys, no blanks)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def source_digest(*rooms: str) -> str:
    """Hash over our own source files in `rooms` (sub-packages): what cached or resumed results depend on."""
    root = Path(__file__).parent
    files = sorted(path for room in rooms for path in (root / room).rglob("*.py"))
    return sha256_json({str(path.relative_to(root)): sha256_file(path) for path in files})


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part; the bytes are on disk on return."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    with translate_os_errors(path, needed_bytes=len(data)):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes it 0600; another user or container may have to read it
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_directory(path.parent)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object that we wrote; empty where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def require_free(out: Path) -> None:
    """Raise `STORAGE_EXISTS` where a new file or folder would replace anything but an empty folder."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise StorageError(
            "STORAGE_EXISTS",
            f"{out} exists already and is not overwritten.",
            where=str(out),
            remedy="Name another one, or remove it first.",
        )


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write files into that becomes `out` when all are there, and vanishes on any error."""
    with translate_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
        try:
            yield stage
            for path in stage.iterdir():
                path.chmod(0o644)  # safetensors makes it 0600; another user or container may have to read it
            stage.chmod(0o755)
            os.replace(stage, out)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        sync_directory(out.parent)


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def translate_os_errors(path: Path, *, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn a full disk or a folder without write access into a `StorageError` that says so."""
    try:
        with _as_os_errors():
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_full(path, needed_bytes=needed_bytes) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StorageError(
                "STORAGE_NOT_WRITABLE",
                f"{path} cannot be written: {error.strerror}.",
                remedy=f"Give this user write access to {path.parent}, or choose another folder with --workspace.",
            ) from error
        raise


# torch ("PytorchStreamWriter failed writing file", "unexpected pos") and safetensors ("(os error 28)": no space,
# 27: file too large, 122: quota) report a full disk in errors of their own, as text.
FULL_DISK_SIGNS = (
    "failed writing file",
    "file write failed",
    "unexpected pos",
    "(os error 28)",
    "(os error 27)",
    "(os error 122)",
)


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Give a full disk that a library tells in words its number back."""
    try:
        yield
    except (OSError, StorageError):
        raise
    except Exception as error:
        if any(sign in str(error) for sign in FULL_DISK_SIGNS):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def disk_full(path: Path, *, needed_bytes: int | None = None) -> StorageError:
    """The error for a disk without room, with what is needed and what is free."""
    free = free_bytes(path)
    needed = f"{needed_bytes / 1e6:,.1f} MB are needed, " if needed_bytes is not None else ""
    return StorageError(
        "STORAGE_DISK_FULL",
        f"The disk is full: {needed}{free / 1e6:,.1f} MB are free.",
        where=str(path),
        remedy="Free some space (old runs: `ftf runs`, then delete their folders) and resume; nothing that was complete is lost.",
        context={"needed_bytes": needed_bytes, "free_bytes": free},
    )


def free_bytes(path: Path) -> int:
    """Bytes free for this user on the file system that holds `path` (which need not exist yet)."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def require_free_bytes(path: Path, needed_bytes: int) -> None:
    """Raise `STORAGE_DISK_FULL` before a write that cannot end well."""
    if free_bytes(path) < needed_bytes:
        raise disk_full(path, needed_bytes=needed_bytes)


# --- who is working on what ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, safely: pids are recycled, so the start time (seconds since the epoch) counts too."""

    pid: int
    started: float

    @classmethod
    def current(cls) -> ProcessIdentity:
        process = psutil.Process()
        return cls(process.pid, process.create_time())

    def is_alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 0.5 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@contextlib.contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process; a second holder gets `RUN_BUSY` with the owner's pid.

    The kernel drops an `flock` when its holder dies, so a killed process never leaves a stale lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(200).strip() or "unknown"
            raise StorageError(
                "RUN_BUSY",
                f"Another process is working on {directory.name} ({owner}).",
                where=str(directory),
                remedy="Wait for it, stop it with `ftf stop`, or start a new run.",
            ) from error
        identity = asdict(ProcessIdentity.current())
        file.seek(0)
        file.truncate()
        file.write(json.dumps(identity))
        file.flush()
        try:
            yield
        finally:
            file.seek(0)
            file.truncate()


def lock_owner(directory: Path) -> ProcessIdentity | None:
    """Who holds `directory` now, or None."""
    try:
        owner = ProcessIdentity(**json.loads((directory / "lock").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return owner if owner.is_alive() else None


# --- the folder of all runs -----------------------------------------------------------------


class Workspace:
    """The data directory. Cheap to make; creates folders only when something is written."""

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(os.path.expanduser(root or os.environ.get("FTF_HOME") or "ftf-workspace"))

    @property
    def runs_dir(self) -> Path:
        return self.root / "runs"

    @property
    def cache_dir(self) -> Path:
        return self.root / "cache"

    @property
    def pipelines_dir(self) -> Path:
        return self.root / "pipelines"

    def new_run_dir(self, name: str) -> Path:
        """Create and return a fresh run folder `<name>-<date>-<n>` under `runs/`."""
        return _new_dir(self.runs_dir, name)

    def new_pipeline_dir(self, name: str, *, taken: Container[str] = ()) -> Path:
        """Create and return a fresh pipeline folder `<name>-<date>-<n>` under `pipelines/`, of a name that is not in `taken`."""
        return _new_dir(self.pipelines_dir, name, taken)

    def run_dir(self, name_or_path: str | Path) -> Path:
        """The folder of an existing run: its name, a unique beginning of it, `latest`, or a path to it."""
        path = Path(name_or_path)
        if (path / "run.yaml").is_file():
            return path
        names = self.run_names()
        name = str(name_or_path)
        if name == "latest" and names:
            return self.runs_dir / names[-1]
        matches = [n for n in names if n == name] or [n for n in names if n.startswith(name)]
        if len(matches) == 1:
            return self.runs_dir / matches[0]
        known = ", ".join(matches or names[-5:]) or "none yet"
        raise StorageError(
            "RUN_NOT_FOUND",
            f"{name!r} fits several runs: {known}." if matches else f"There is no run {name!r} in {self.runs_dir}.",
            remedy=f"Name one of: {known}. `ftf runs` lists all.",
        )

    def run_names(self) -> list[str]:
        """All runs, oldest first (by creation, as told by their first file)."""
        return _by_age(self.runs_dir, "run.yaml")

    def find_pipeline_dir(self, name_or_path: str | Path) -> Path | None:
        """The folder of an existing pipeline: by path, by name, or by a beginning that only one has; else None."""
        path = Path(name_or_path)
        if (path / "pipeline.yaml").is_file():
            return path
        name, names = str(name_or_path), self.pipeline_names()
        matches = [n for n in names if n == name] or [n for n in names if name and n.startswith(name)]
        return self.pipelines_dir / matches[0] if len(matches) == 1 else None

    def pipeline_names(self) -> list[str]:
        """All pipelines, oldest first."""
        return _by_age(self.pipelines_dir, "pipeline.yaml")


def _by_age(folder: Path, first_file: str) -> list[str]:
    """Names of the folders in `folder` that hold `first_file`, by when that was written."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if (path / first_file).is_file()]
    return [path.name for path in sorted(found, key=lambda path: ((path / first_file).stat().st_mtime_ns, path.name))]


def _new_dir(folder: Path, name: str, taken: Container[str] = ()) -> Path:
    """A fresh folder `<name>-<date>-<n>`; two that start at once get different numbers."""
    check_name(name, what="a run name")
    stamp = datetime.now(UTC).strftime("%Y%m%d")
    with translate_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, 10_000):
            candidate = folder / f"{name}-{stamp}-{number:03d}"
            if candidate.name in taken:
                continue
            try:
                candidate.mkdir()
                return candidate
            except FileExistsError:
                continue
    raise StorageError("STORAGE_EXISTS", f"10,000 runs are named {name} today.", remedy="Choose another run name.")
