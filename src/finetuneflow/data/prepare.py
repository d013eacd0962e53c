"""Prepare: files become tokens on disk, once; every later run with the same inputs finds them there.

    files -> read_rows -> to_examples -> split -> tokenize -> Arrow files in the cache

The cache folder is named by a hash over everything that shapes its content (file hashes, mapping, split,
template, tokenizer, policy and our own code), and appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import psutil

from finetuneflow.data.examples import Example, Kind, Mapping, Problem, to_examples, write_canonical
from finetuneflow.data.sources import read_rows
from finetuneflow.data.splits import leaks, split
from finetuneflow.data.spool import Selection, Spool
from finetuneflow.data.templates import Template
from finetuneflow.data.tokens import MASKED, Policy, TokenizeStats, audit, tokenize_many
from finetuneflow.errors import DataError
from finetuneflow.events import Emit
from finetuneflow.workspace import sha256_file, sha256_json, source_digest, translate_os_errors, write_json

ROWS_PER_BATCH = 1_000
PROBLEMS_KEPT = 10_000  # written to problems.jsonl; more would say nothing new
BUILDING = ".building-"  # beginning of the name of a folder that is being filled; the process id follows


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to read and how: the part of a run's configuration that shapes its tokens."""

    train: tuple[str, ...]
    eval: tuple[str, ...] = ()
    eval_fraction: float = 0.1
    eval_limit: int = 1000
    mapping: dict[str, str] = field(default_factory=dict)
    tree_paths: Literal["best", "all"] = "best"
    encoding: str | None = None
    limit: int | None = None
    reject_threshold: float = 0.1
    takes: frozenset[Kind] = frozenset({"chat", "text"})
    policy: Policy = field(default_factory=Policy)
    seed: int = 42


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokens ready to train on. `train` and `eval` are memory-mapped `datasets.Dataset`s with the columns
    index, input_ids, labels, length, place; `digest` names their content."""

    folder: Path
    train: Any
    eval: Any | None
    manifest: dict[str, Any]
    digest: str

    @property
    def files(self) -> dict[str, str]:
        """What each data file held: name -> size and hash, in words."""
        return {
            entry["file"]: f"{entry['bytes']:,} bytes, SHA-256 {entry['sha256'][:16]}"
            for entry in (*self.manifest["train"], *self.manifest["eval"])
        }

    def place(self, index: int) -> str:
        """File and row a training row came from."""
        return str(self.train[index]["place"])

    def copy_held_out(self, target: Path) -> None:
        """Copy the held-out examples (canonical JSONL) into a run directory."""
        source = self.folder / "eval.jsonl"
        if source.exists():
            with translate_os_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)


def prepare(recipe: Recipe, tokenizer_digest: str, template: Template, cache_dir: Path, emit: Emit) -> Prepared:
    """The tokens of `recipe`, from the cache or made now. Raises `DataError` where nothing could be trained on."""
    files = {name: _fingerprint(Path(name)) for name in (*recipe.train, *recipe.eval)}
    shaping = {k: v for k, v in asdict(recipe).items() if k not in ("train", "eval", "takes")}
    digest = sha256_json(
        {
            # by name too: manifest and row places name the files
            "train": [[name, files[name]["sha256"]] for name in recipe.train],
            "eval": [[name, files[name]["sha256"]] for name in recipe.eval],
            "recipe": shaping,
            "takes": sorted(recipe.takes),
            "template": template.digest,
            "tokenizer": tokenizer_digest,
            "code": source_digest("data"),
        }
    )
    folder = cache_dir / digest[:32]
    found = _open(folder, digest)
    if found is None:
        _build(recipe, files, template, folder, emit)
        found = _open(folder, digest)
    if found is None:
        raise DataError(
            "DATASET_UNREADABLE", "The tokens just written cannot be read back.", where=str(folder), remedy="Check the disk."
        )
    return found


def require_files(names: Iterable[str]) -> None:
    """Raise `DATASET_NOT_FOUND` for the first file that is not there."""
    for name in names:
        if not Path(name).is_file():
            raise DataError(
                "DATASET_NOT_FOUND",
                f"There is no file {name!r}.",
                where="data.train / data.eval",
                remedy="Check the spelling; the path counts from the folder the command runs in.",
            )


def _fingerprint(path: Path) -> dict[str, Any]:
    require_files([str(path)])
    return {"file": str(path), "bytes": path.stat().st_size, "sha256": sha256_file(path)}


# --- building ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Read:
    """What some files hold: usable examples, problems (all counted, the first ones kept), and examples of kinds the objective cannot use."""

    names: Sequence[str]
    examples: Spool
    problems: list[Problem] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    unsuited: Counter[str] = field(default_factory=Counter)

    def reject(self, problem: Problem) -> None:
        self.rejected[problem.code] += 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(problem)


def _build(recipe: Recipe, files: dict[str, dict[str, Any]], template: Template, folder: Path, emit: Emit) -> None:
    """Fill a temporary folder and rename it: a killed build leaves no half cache."""
    train_read = _read(recipe.train, recipe, folder.parent)
    eval_read = _read(recipe.eval, recipe, folder.parent) if recipe.eval else None
    for read in (train_read, eval_read):
        if read is not None:
            _check_threshold(read, recipe)
    train, held_out = _divide(train_read.examples, eval_read.examples if eval_read else None, recipe, emit)
    with translate_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{BUILDING}{os.getpid()}-"))
        try:
            stats = _write_tokens(train, template, recipe.policy, temporary / "train.arrow")
            _report_audit(stats, template, emit)
            eval_stats = _write_tokens(held_out, template, recipe.policy, temporary / "eval.arrow")
            _report_held_out(eval_stats, emit)
            problems = [*train_read.problems, *(eval_read.problems if eval_read else [])]
            write_canonical(chain(held_out, problems), temporary / "eval.jsonl", problems_path=temporary / "problems.jsonl")
            manifest = _manifest(recipe, files, template, train_read, eval_read, train, held_out, stats, eval_stats)
            write_json(temporary / "manifest.json", manifest)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _remove_leftovers(cache_dir: Path) -> None:
    """Delete what builds left behind whose process was killed."""
    for path in cache_dir.glob(f"{BUILDING}*"):
        pid = path.name.removeprefix(BUILDING).split("-")[0]
        if not (pid.isdigit() and psutil.pid_exists(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _read(names: Sequence[str], recipe: Recipe, spool_dir: Path) -> _Read:
    """All usable examples of some files, up to `limit`; kinds the objective cannot use are counted apart."""
    found = _Read(names, Spool(spool_dir))
    mapping = Mapping(**recipe.mapping) if recipe.mapping else None
    for name in names:
        for item in to_examples(read_rows(Path(name), encoding=recipe.encoding), mapping, tree_paths=recipe.tree_paths):
            if isinstance(item, Problem):
                found.reject(item)
            elif item.kind in recipe.takes:
                found.examples.append(item)
            else:
                found.unsuited[item.kind] += 1
            if recipe.limit is not None and len(found.examples) >= recipe.limit:
                return found
    return found


def _check_threshold(read: _Read, recipe: Recipe) -> None:
    if not read.examples:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in read.unsuited.items())
        raise DataError(
            "TRAINING_NO_DATA",
            f"No example in {', '.join(read.names)} can be used: {read.rejected.total():,} rows were rejected"
            + (f", and {kinds} examples are for other objectives." if kinds else "."),
            where=str(read.problems[0].place) if read.problems else None,
            remedy=(f"{read.problems[0].hint} " if read.problems else "") + "`ftf data check` shows every reason.",
        )
    rejected = read.rejected.total()
    share = rejected / (rejected + len(read.examples))
    if share > recipe.reject_threshold:
        reasons = read.rejected.most_common(3)
        raise DataError(
            "DATASET_TOO_MANY_REJECTED",
            f"{rejected:,} of {rejected + len(read.examples):,} rows of {', '.join(read.names)} ({share:.1%}) cannot be used: "
            + ", ".join(f"{code} {count:,}" for code, count in reasons)
            + f"; the limit is {recipe.reject_threshold:.0%}.",
            where=str(read.problems[0].place),
            remedy="Look at them with `ftf data check`, mend the file, or raise data.reject_threshold.",
        )


def _divide(
    examples: Sequence[Example], given: Sequence[Example] | None, recipe: Recipe, emit: Emit
) -> tuple[Sequence[Example], Sequence[Example]]:
    """(training, held out): the given evaluation examples, or a seeded share in which no duplicate straddles."""
    if given is not None:
        if shared := leaks(examples, given):
            emit(
                "warning",
                code="EVAL_LEAK",
                message=f"{len(shared):,} evaluation examples are also in the training data (exactly or nearly): the evaluation will look too good.",
                advice="Remove them from one side, or drop data.eval and let a clean share be held out.",
            )
        return examples, given
    fraction = min(recipe.eval_fraction, recipe.eval_limit / len(examples))
    if fraction > 0 and len(examples) < 2:
        emit(
            "warning",
            code="NO_EVALUATION",
            message="There is 1 example, so none can be held out: nothing will show whether the model learned more than this one by heart.",
            advice="Give at least 2 different examples, or a file of its own as data.eval.",
        )
    if fraction == 0 or len(examples) < 2:
        return examples, []
    parts = split(examples, eval_fraction=fraction, seed=recipe.seed)
    for text in parts.warnings:
        emit("warning", code="SPLIT", message=text, advice="")
    return Selection(examples, parts.train_indices), Selection(examples, parts.eval_indices)


@dataclass(slots=True)
class _Written:
    """What became of a set of examples: their token statistics, and the rows that were written."""

    stats: TokenizeStats = field(default_factory=TokenizeStats)
    rows: int = 0


def _write_tokens(examples: Sequence[Example], template: Template, policy: Policy, path: Path) -> _Written:
    """Tokenize into an Arrow stream file; memory holds one batch."""
    import pyarrow as pa

    written = _Written()
    schema = pa.schema(
        [
            ("index", pa.int64()),
            ("input_ids", pa.list_(pa.int32())),
            ("labels", pa.list_(pa.int32())),
            ("length", pa.int32()),
            ("place", pa.string()),
        ]
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in _batched(_token_rows(examples, template, policy, written.stats), ROWS_PER_BATCH):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            written.rows += len(batch)
    return written


def _token_rows(
    examples: Sequence[Example], template: Template, policy: Policy, stats: TokenizeStats
) -> Iterator[dict[str, Any]]:
    index = 0
    for result in tokenize_many(examples, template, policy, stats=stats):
        if isinstance(result, Problem):
            continue  # counted in `stats`
        for tokens in result:
            # Nothing predicts a row's first token: a row supervised there alone (the one-token rest of a document) has no loss.
            if any(label != MASKED for label in tokens.labels[1:]):
                yield {
                    "index": index,
                    "input_ids": tokens.ids,
                    "labels": tokens.labels,
                    "length": len(tokens.ids),
                    "place": str(tokens.place),
                }
                index += 1


def _batched(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _report_audit(written: _Written, template: Template, emit: Emit) -> None:
    """Raises for what would waste the run; says the rest."""
    for finding in audit(written.stats, template):
        if finding.code != "TEMPLATE_NOTE":  # said when the template was chosen
            emit("warning", code=finding.code, message=finding.message, advice="")
    if not written.rows:
        raise DataError(
            "TRAINING_NO_SUPERVISED_TOKENS",
            f"All {written.stats.rows:,} rows are one token long: there is no next token to learn.",
            remedy="Raise data.max_length, or give longer texts.",
        )


def _report_held_out(written: _Written, emit: Emit) -> None:
    """Held-out examples that cannot be measured are no reason to stop, but never left out in silence."""
    stats = written.stats
    reasons = ", ".join(f"{code} {count:,}" for code, count in stats.problems.most_common())
    if stats.examples and not written.rows:
        emit(
            "warning",
            code="NO_EVALUATION",
            message=f"None of {stats.examples:,} held-out examples can be measured ({reasons}): there will be no evaluation, and the last weights are kept.",
            advice="Raise data.max_length, or give other examples as data.eval.",
        )
    elif stats.dropped:
        emit(
            "warning",
            code="EVAL_ROWS_DROPPED",
            message=f"{stats.dropped:,} of {stats.examples:,} held-out examples are left out ({reasons}).",
            advice="",
        )


def _manifest(
    recipe: Recipe,
    files: dict[str, dict[str, Any]],
    template: Template,
    train_read: _Read,
    eval_read: _Read | None,
    train: Sequence[Example],
    held_out: Sequence[Example],
    written: _Written,
    eval_written: _Written,
) -> dict[str, Any]:
    stats = written.stats
    return {
        "train": [files[name] for name in recipe.train],
        "eval": [files[name] for name in recipe.eval],
        "shapes": dict(Counter(example.shape for example in (*train, *held_out))),
        "template": {"name": template.name, "digest": template.digest},
        "train_examples": len(train),
        "eval_examples": len(held_out),
        "rejected": dict(train_read.rejected + (eval_read.rejected if eval_read else Counter())),
        "not_for_this_objective": dict(train_read.unsuited),
        "train_rows": written.rows,
        "eval_rows": eval_written.rows,
        "avg_tokens": stats.tokens / max(stats.rows, 1),
        "supervised_share": stats.supervised / max(stats.tokens, 1),
        "tokens": stats.to_dict(),
    }


def _open(folder: Path, digest: str) -> Prepared | None:
    """What the cache holds, or None where it is not there, or not whole any more."""
    import pyarrow as pa
    from datasets import Dataset

    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        train, held_out = (Dataset.from_file(str(folder / f"{name}.arrow")) for name in ("train", "eval"))
        whole = (len(train), len(held_out)) == (manifest["train_rows"], manifest["eval_rows"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    return Prepared(folder, train, held_out if len(held_out) else None, manifest, digest) if whole else None
