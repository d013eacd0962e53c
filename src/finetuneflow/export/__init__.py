"""A finished run becomes files that work elsewhere: an adapter, whole weights or an archive, each checked by loading it again.

    record (read the run) -> adapter | merged (weights, tokenizer, check) -> package (documents) -> bundle (manifest, archive, move into place)

Importing this room loads no torch; `write_report` and `plot_loss` need none.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finetuneflow.errors import StorageError
from finetuneflow.export.bundle import ARCHIVE, ExportedFile, list_files, seal, staged, write_archive
from finetuneflow.export.plot import plot_loss
from finetuneflow.export.record import RunRecord, read_run, require_weights
from finetuneflow.export.redact import Redactor
from finetuneflow.export.report import write_report
from finetuneflow.export.verify import Check, Dtype, require_passed
from finetuneflow.workspace import lock_owner

Target = Literal["adapter", "merged", "zip"]

__all__ = ["Check", "Dtype", "ExportResult", "ExportedFile", "Target", "export", "plot_loss", "write_report"]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Where an export lies, its files with size and hash, and how its check went."""

    dir: Path
    target: Target
    files: tuple[ExportedFile, ...]
    check: Check

    def to_dict(self) -> dict[str, Any]:
        return {
            "dir": str(self.dir),
            "target": self.target,
            "files": [asdict(f) for f in self.files],
            "check": self.check.to_dict(),
        }


def export(
    run_dir: Path | str, to: Target = "adapter", *, name: str | None = None, overwrite: bool = False, dtype: Dtype = "auto"
) -> ExportResult:
    """Export a finished run to `exports/<name>/` of its directory (`name` is the target by default).

    - "adapter": the reference package, with everything in `finetuneflow_export.zip` beside it;
    - "merged": the complete model, for full fine-tuning the trained one; `dtype` is the stored type ("auto": the base's own);
    - "zip": only the archive of the package, the adapter's or, for full fine-tuning, the model's.

    Raises `ExportError` (`EXPORT_NO_RUN`, `EXPORT_NO_WEIGHTS`, `EXPORT_UNSUPPORTED`, `EXPORT_CHECK_FAILED`, …),
    `StorageError` (`STORAGE_EXISTS`, `STORAGE_DISK_FULL`, `RUN_BUSY`) or what loading the model raises.
    In every such case nothing new is left in place and an older export is as it was.
    """
    record = read_run(Path(run_dir))
    require_weights(record)
    _require_idle(record)
    redactor = Redactor()
    exports_dir = record.run_dir / "exports"
    with staged(exports_dir, name or to, overwrite=overwrite) as stage:
        check = _build(record, stage, to, redactor, dtype)
    final = exports_dir / (name or to)
    return ExportResult(final, to, list_files(final), check)


def _build(record: RunRecord, stage: Path, to: Target, redactor: Redactor, dtype: Dtype) -> Check:
    from finetuneflow.export.adapter import build_adapter
    from finetuneflow.export.merged import build_merged
    from finetuneflow.export.package import write_documents
    from finetuneflow.export.scoring import build_scoring
    from finetuneflow.export.trained import own_module
    from finetuneflow.models.own import pack_module

    whole = to == "merged" or not (to == "adapter" or record.config.method.is_adapter)
    if record.config.training.objective == "reward":
        check = require_passed(build_scoring(record, stage, redactor, whole=whole, dtype=dtype))
    else:
        check = require_passed(build_merged(record, stage, dtype=dtype) if whole else build_adapter(record, stage, redactor))
    module = pack_module(own_module(record), stage)
    write_documents(record, stage, check, redactor, files_kind="model" if whole else "adapter")
    facts = {"run": record.name, "target": to, "method": record.method, "check": check.to_dict()}
    seal(stage, facts | ({"module": module} if module else {}))
    if to != "merged":
        write_archive(stage, stage / ARCHIVE)
    if to == "zip":
        for path in stage.iterdir():
            if path.name != ARCHIVE:
                path.unlink()
    return check


def _require_idle(record: RunRecord) -> None:
    if (owner := lock_owner(record.run_dir)) is not None:
        raise StorageError(
            "RUN_BUSY",
            f"The run {record.name} is still being worked on (process {owner.pid}).",
            where=str(record.run_dir),
            remedy="Wait until it has ended, or stop it with `ftf stop`.",
        )
