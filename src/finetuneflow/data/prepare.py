"""Prepare: files become tokens on disk, once; every later run with the same inputs finds them there.

    files -> read_rows -> to_examples -> split -> tokenize -> Arrow files in the cache

What a row holds depends on the form the objective asks for (`forms.COLUMNS`): conversations and documents, pairs, rated
answers, or prompts. The cache folder is named by a hash over everything that shapes its content (file hashes, mapping, split,
template, tokenizer, policy and our own code), and appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import psutil

from finetuneflow.data.examples import Example, Mapping, Problem, for_other_objectives, to_examples, write_canonical
from finetuneflow.data.forms import KINDS, Form, prompt_fields, schema, side_fields, tokenize_prompts, tokenize_sides
from finetuneflow.data.preferences import (
    SET_ASIDE,
    FormReader,
    Pairing,
    PairTally,
    pair_findings,
    rated_facts,
    rated_findings,
)
from finetuneflow.data.sources import read_rows
from finetuneflow.data.splits import leaks, split
from finetuneflow.data.spool import Concatenation, Selection, Spool
from finetuneflow.data.templates import Template
from finetuneflow.data.tokens import MASKED, Policy, TokenizeStats, audit, tokenize_many
from finetuneflow.errors import DataError
from finetuneflow.events import Emit
from finetuneflow.knowledge.run_warnings import WARNINGS
from finetuneflow.knowledge.values import many
from finetuneflow.workspace import sha256_file, sha256_json, source_digest, translate_os_errors, write_json

ROWS_PER_BATCH = 1_000
PROBLEMS_KEPT = 10_000  # written to problems.jsonl; more would say nothing new
BUILDING = ".building-"  # beginning of the name of a folder that is being filled; the process id follows

Warn = Callable[[str, str], None]  # (code, message): what a build has to say, kept with the tokens for later runs


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to read and how: the part of a run's configuration that shapes its tokens.

    `form` says what the rows are made of (`forms.KINDS`). `rated_weights` are those of good and bad answers, `by_token` says
    that answers are compared per token; both shape no token, but a warning. `replay_share` of the training examples come from
    the `replay` files (supervised rows only).
    """

    train: tuple[str, ...]
    eval: tuple[str, ...] = ()
    eval_fraction: float = 0.1
    eval_limit: int = 1000
    mapping: dict[str, str] = field(default_factory=dict)
    tree_paths: Literal["best", "all"] = "best"
    encoding: str | None = None
    limit: int | None = None
    reject_threshold: float = 0.1
    policy: Policy = field(default_factory=Policy)
    seed: int = 42
    form: Form = "supervised"
    pairing: Pairing = field(default_factory=Pairing)
    rated_weights: tuple[float, float] = (1.0, 1.0)
    by_token: bool = False
    replay: tuple[str, ...] = ()
    replay_share: float = 0.1


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokens ready to train on. `train` and `eval` are memory-mapped `datasets.Dataset`s with the columns of the recipe's
    form (`forms.COLUMNS`); `digest` names their content."""

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
            for entry in (*self.manifest["train"], *self.manifest["eval"], *self.manifest.get("replay", {}).get("files", ()))
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
    files = {name: _fingerprint(Path(name)) for name in (*recipe.train, *recipe.eval, *recipe.replay)}
    shaping = {k: v for k, v in asdict(recipe).items() if k not in ("train", "eval", "replay", "rated_weights", "by_token")}
    digest = sha256_json(
        {
            # by name too: manifest and row places name the files
            "train": [[name, files[name]["sha256"]] for name in recipe.train],
            "eval": [[name, files[name]["sha256"]] for name in recipe.eval],
            "replay": [[name, files[name]["sha256"]] for name in recipe.replay],
            "recipe": shaping,
            "template": template.digest,
            "tokenizer": tokenizer_digest,
            "code": source_digest("data"),
        }
    )
    folder = cache_dir / digest[:32]
    found = _open(folder, digest)
    if found is None:
        _build(recipe, files, template, folder)
        found = _open(folder, digest)
    if found is None:
        raise DataError(
            "DATASET_UNREADABLE", "The tokens just written cannot be read back.", where=str(folder), remedy="Check the disk."
        )
    if recipe.form != "supervised" and recipe.policy.overlong == "split":
        reason = "Pairs, rated answers and prompts cannot be parted: those that are too long are cut."
        emit("decision", setting="data.overlong", value="cut", reason=reason)
    # Weights shape no token, so what is said of them belongs to this run and not to the cache.
    found.manifest["warnings"] += _preference_warnings(found.manifest, recipe)
    for warning in found.manifest["warnings"]:
        emit("warning", **warning)
    return found


def require_files(names: Iterable[str]) -> None:
    """Raise `DATASET_NOT_FOUND` for the first file that is not there."""
    for name in names:
        if not Path(name).is_file():
            raise DataError(
                "DATASET_NOT_FOUND",
                f"There is no file {name!r}.",
                where="data.train / data.eval / data.replay",
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
    facts: dict[str, Any] = field(default_factory=dict)  # about ratings

    def reject(self, problem: Problem) -> None:
        (self.unsuited if problem.code in SET_ASIDE else self.rejected)[problem.code] += 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(problem)


def _build(recipe: Recipe, files: dict[str, dict[str, Any]], template: Template, folder: Path) -> None:
    """Fill a temporary folder and rename it: a killed build leaves no half cache."""
    warnings: list[dict[str, str]] = []

    def warn(code: str, message: str) -> None:
        warnings.append(_warning(code, message))

    train_read = _read(recipe.train, recipe, folder.parent)
    eval_read = _read(recipe.eval, recipe, folder.parent) if recipe.eval else None
    for read in (train_read, eval_read):
        if read is not None:
            _check_threshold(read, recipe, warn)
    own, held_out = _divide(train_read.examples, eval_read.examples if eval_read else None, recipe, warn)
    train, replayed = _with_replay(own, held_out, recipe, folder.parent, warn)
    with translate_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{BUILDING}{os.getpid()}-"))
        try:
            stats = _write_tokens(train, template, recipe, temporary / "train.arrow")
            _report_audit(stats, template, recipe.form, warn)
            eval_stats = _write_tokens(held_out, template, recipe, temporary / "eval.arrow")
            _report_held_out(eval_stats, warn)
            problems = [*train_read.problems, *(eval_read.problems if eval_read else [])]
            write_canonical(chain(held_out, problems), temporary / "eval.jsonl", problems_path=temporary / "problems.jsonl")
            manifest = _manifest(recipe, files, template, train_read, eval_read, train, held_out, stats, eval_stats)
            manifest["warnings"] = warnings
            if recipe.replay and recipe.form == "supervised":
                manifest["replay"] = {"files": [files[name] for name in recipe.replay], **replayed}
            write_json(temporary / "manifest.json", manifest)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _warning(code: str, message: str, advice: str | None = None) -> dict[str, str]:
    return {"code": code, "message": message, "advice": advice or WARNINGS[code].advice}


def _remove_leftovers(cache_dir: Path) -> None:
    """Delete what builds left behind whose process was killed."""
    for path in cache_dir.glob(f"{BUILDING}*"):
        pid = path.name.removeprefix(BUILDING).split("-")[0]
        if not (pid.isdigit() and psutil.pid_exists(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _read(names: Sequence[str], recipe: Recipe, spool_dir: Path) -> _Read:
    """All usable examples of some files, up to `limit`; kinds the objective cannot use are counted apart."""
    found = _Read(names, Spool(spool_dir))
    reader = FormReader(recipe.form, recipe.pairing, folder=spool_dir)
    for item in reader.read(_items(names, recipe)):
        if isinstance(item, Problem):
            found.reject(item)
        elif item.kind in KINDS[recipe.form]:
            found.examples.append(item)
        else:
            found.unsuited[item.kind] += 1
        if recipe.limit is not None and len(found.examples) >= recipe.limit:
            break
    found.facts = reader.facts
    return found


def _items(names: Sequence[str], recipe: Recipe) -> Iterator[Example | Problem]:
    mapping = Mapping(**recipe.mapping) if recipe.mapping else None
    several = recipe.form in ("pair", "rated")
    for name in names:
        rows = read_rows(Path(name), encoding=recipe.encoding)
        yield from to_examples(rows, mapping, tree_paths=recipe.tree_paths, several_answers=several)


def _check_threshold(read: _Read, recipe: Recipe, warn: Warn) -> None:
    """Raises where nothing, or too little, of the files can be used; warns of what is left out."""
    others, objective = for_other_objectives(read.unsuited)
    aside = [f"{code} {count:,}" for code, count in read.unsuited.items() if code in SET_ASIDE]
    if not read.examples:
        counts = [f"{many(read.rejected.total(), 'row')} rejected", *(f"{reason} set aside" for reason in aside), others]
        raise DataError(
            "TRAINING_NO_DATA",
            f"No example in {', '.join(read.names)} can be used: {', '.join(filter(None, counts))}.",
            where=str(read.problems[0].place) if read.problems else None,
            remedy=objective + (f"{read.problems[0].hint} " if read.problems else "") + "`ftf data check` shows every reason.",
        )
    rejected = read.rejected.total()
    share = rejected / (rejected + len(read.examples))
    reasons = [f"{code} {count:,}" for code, count in read.rejected.most_common()]
    if share > recipe.reject_threshold:
        raise DataError(
            "DATASET_TOO_MANY_REJECTED",
            f"{rejected:,} of {many(rejected + len(read.examples), 'row')} of {', '.join(read.names)} ({share:.1%}) cannot be used: "
            f"{', '.join(reasons[:3])}; the limit is {recipe.reject_threshold:.0%}.",
            where=str(read.problems[0].place),
            remedy="Look at them with `ftf data check`, mend the file, or raise data.reject_threshold.",
        )
    if left_out := rejected + read.unsuited.total():
        why = ", ".join(filter(None, [*reasons, *aside, others]))
        warn("ROWS_REJECTED", f"{many(left_out, 'row')} of {', '.join(read.names)} left out ({why}).")


def _divide(
    examples: Sequence[Example], given: Sequence[Example] | None, recipe: Recipe, warn: Warn
) -> tuple[Sequence[Example], Sequence[Example]]:
    """(training, held out): the given evaluation examples, or a seeded share in which no duplicate straddles."""
    by_prompt = recipe.form != "supervised"  # then a prompt seen in training would give its answers away
    if given is not None:
        if shared := leaks(examples, given, by_prompt=by_prompt):
            warn(
                "EVAL_LEAK",
                f"{many(len(shared), 'evaluation example')} {'is' if len(shared) == 1 else 'are'} also in the training data "
                f"(exactly or nearly{', or by their prompt' if by_prompt else ''}): the evaluation will look too good.",
            )
        return examples, given
    fraction = min(recipe.eval_fraction, recipe.eval_limit / len(examples))
    if fraction > 0 and len(examples) < 2:
        warn(
            "NO_EVALUATION",
            "There is 1 example, so none can be held out: nothing will show whether the model learned more than this one by heart.",
        )
    if fraction == 0 or len(examples) < 2:
        return examples, []
    parts = split(examples, eval_fraction=fraction, seed=recipe.seed, by_prompt=by_prompt)
    for text in parts.warnings:
        warn("SPLIT", text)
    return Selection(examples, parts.train_indices), Selection(examples, parts.eval_indices)


def _with_replay(
    own: Sequence[Example], held_out: Sequence[Example], recipe: Recipe, spool_dir: Path, warn: Warn
) -> tuple[Sequence[Example], dict[str, Any]]:
    """The training examples with general ones behind them, and how many those are, for the manifest.

    Rehearsal of general data is the plainest remedy against forgetting. A general example that is also held out, exactly
    or nearly, is not replayed.
    """
    if not recipe.replay or recipe.form != "supervised":
        return own, {}
    general = _read(recipe.replay, replace(recipe, limit=None, mapping={}), spool_dir)
    _check_threshold(general, recipe, warn)
    seen = {leak.eval_index for leak in leaks(held_out, general.examples)} if held_out else set()
    usable = [index for index in range(len(general.examples)) if index not in seen]
    wanted = replay_count(len(own), recipe.replay_share)
    chosen = sorted(random.Random(recipe.seed).sample(usable, min(wanted, len(usable))))
    if len(chosen) < wanted:
        warn(
            "REPLAY_TOO_SMALL",
            f"data.replay holds {many(len(chosen), 'usable example')}, but a share of {recipe.replay_share:.0%} needs {wanted:,}: all are used once.",
        )
    counts = {
        "available": len(general.examples),
        "held_out_too": len(seen),
        "examples": len(chosen),
        "share": len(chosen) / (len(own) + len(chosen)),
        "rejected": dict(general.rejected),
    }
    return Concatenation(own, Selection(general.examples, chosen)), counts


def replay_count(own: int, share: float) -> int:
    """Replayed examples beside `own` ones such that they are `share` of all."""
    return max(1, round(own * share / (1 - share)))


@dataclass(slots=True)
class _Written:
    """What became of a set of examples: their token statistics, the rows that were written, and facts about preferences."""

    stats: TokenizeStats = field(default_factory=TokenizeStats)
    rows: int = 0
    pairs: PairTally = field(default_factory=PairTally)
    labels: Counter[bool] = field(default_factory=Counter)

    def facts(self, form: Form) -> dict[str, Any]:
        """For the manifest."""
        if form == "pair":
            return {"pairs": self.pairs.to_dict()}
        return {"rated": rated_facts(self.labels[True], self.labels[False])} if form == "rated" else {}


def _write_tokens(examples: Sequence[Example], template: Template, recipe: Recipe, path: Path) -> _Written:
    """Tokenize into an Arrow stream file; memory holds one batch."""
    import pyarrow as pa

    written = _Written()
    columns = schema(recipe.form)
    rows = ({"index": index, **row} for index, row in enumerate(_rows(examples, template, recipe, written)))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, columns) as writer:
        for batch in _batched(rows, ROWS_PER_BATCH):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=columns))
            written.rows += len(batch)
    return written


def _rows(examples: Sequence[Example], template: Template, recipe: Recipe, written: _Written) -> Iterator[dict[str, Any]]:
    """The columns of each row, index aside; what cannot be used is counted in `written`."""
    if recipe.form == "supervised":
        return _supervised_rows(examples, template, recipe.policy, written.stats)
    if recipe.form == "prompt":
        return _prompt_rows(examples, template, recipe.policy, written.stats)
    return _side_rows(examples, template, recipe, written)


def _supervised_rows(
    examples: Sequence[Example], template: Template, policy: Policy, stats: TokenizeStats
) -> Iterator[dict[str, Any]]:
    for result in tokenize_many(examples, template, policy, stats=stats):
        if isinstance(result, Problem):
            continue  # counted in `stats`
        for tokens in result:
            # Nothing predicts a row's first token: a row supervised there alone (the one-token rest of a document) has no loss.
            if any(label != MASKED for label in tokens.labels[1:]):
                yield {
                    "input_ids": tokens.ids,
                    "labels": tokens.labels,
                    "length": len(tokens.ids),
                    "place": str(tokens.place),
                }


def _side_rows(examples: Sequence[Example], template: Template, recipe: Recipe, written: _Written) -> Iterator[dict[str, Any]]:
    results = tokenize_sides(examples, template, recipe.policy, stats=written.stats)
    for example, result in zip(examples, results, strict=True):
        if isinstance(result, Problem):
            continue  # counted in the statistics
        if recipe.form == "pair":
            written.pairs.add(example, result)
        else:
            written.labels[bool(example.label)] += 1
        yield side_fields(example, result)


def _prompt_rows(
    examples: Sequence[Example], template: Template, policy: Policy, stats: TokenizeStats
) -> Iterator[dict[str, Any]]:
    results = tokenize_prompts(examples, template, policy, stats=stats)
    for example, result in zip(examples, results, strict=True):
        if not isinstance(result, Problem):
            yield prompt_fields(example, result)


def _batched(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _report_audit(written: _Written, template: Template, form: Form, warn: Warn) -> None:
    """Raises for what would waste the run; says the rest."""
    for finding in audit(written.stats, template, labelled=form != "prompt"):
        if finding.code != "TEMPLATE_NOTE":  # said when the template was chosen
            warn(finding.code, finding.message)
    if not written.rows and form == "prompt":
        reasons = ", ".join(f"{code} {count:,}" for code, count in written.stats.problems.most_common())
        raise DataError(
            "TRAINING_NO_DATA",
            f"None of {many(written.stats.examples, 'prompt')} can be used ({reasons}).",
            remedy="Raise data.max_length, or look at the rows with `ftf data preview --form prompt`.",
        )
    if not written.rows:
        raise DataError(
            "TRAINING_NO_SUPERVISED_TOKENS",
            f"Every row ({written.stats.rows:,}) is one token long: there is no next token to learn.",
            remedy="Raise data.max_length, or give longer texts.",
        )


def _report_held_out(written: _Written, warn: Warn) -> None:
    """Held-out examples that cannot be measured are no reason to stop, but never left out in silence."""
    stats = written.stats
    reasons = ", ".join(f"{code} {count:,}" for code, count in stats.problems.most_common())
    if stats.examples and not written.rows:
        warn(
            "NO_EVALUATION",
            f"None of {many(stats.examples, 'held-out example')} can be measured ({reasons}): there will be no evaluation, and the last weights are kept.",
        )
    elif stats.dropped:
        warn(
            "EVAL_ROWS_DROPPED",
            f"{stats.dropped:,} of {many(stats.examples, 'held-out example')} left out ({reasons}).",
        )


def _preference_warnings(manifest: dict[str, Any], recipe: Recipe) -> list[dict[str, str]]:
    """What the pairs or labels would teach besides what is meant."""
    findings: Iterable[tuple[str, str, str]] = ()
    if recipe.form == "pair":
        findings = pair_findings(manifest["pairs"], by_token=recipe.by_token)
    elif recipe.form == "rated":
        findings = rated_findings(manifest["rated"], recipe.rated_weights)
    return [_warning(*finding) for finding in findings]


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
        "form": recipe.form,
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
        **written.facts(recipe.form),
        **({"ratings": train_read.facts} if train_read.facts else {}),
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
