"""Judging: what is in a dataset, what is wrong with it, and whether it may be trained on.

Place in the flow: `examples.to_examples` -> **quality.inspect** -> the report behind `ftf data check` and the guard
`check_threshold` before a run. One pass over the file; memory grows by 8 bytes per row for exact duplicates and by
512 bytes per row for near duplicates, up to `NEAR_LIMIT_ROWS` rows.
"""

from __future__ import annotations

import bisect
import gc
import importlib
import random
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from finetuneflow.data.examples import NOTES, Example, Mapping, Problem, to_examples
from finetuneflow.data.forms import KINDS, Form
from finetuneflow.data.preferences import FormReader
from finetuneflow.data.similarity import Signatures, compared_text, exact_key
from finetuneflow.data.sources import SourceInfo, read_rows, sniff
from finetuneflow.data.streams import Limits
from finetuneflow.errors import DataError

NEAR_LIMIT_ROWS = 200_000
PROBLEMS_SHOWN = 3
LANGUAGE_SAMPLE = 300
LANGUAGE_MIN_CHARS, LANGUAGE_MAX_CHARS = 40, 600
LENGTH_EDGES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

MEASURE_BATCH = 512
GC_ALLOCATIONS = 100_000  # rows are short-lived and hold no cycles; the default of 700 costs a fifth of the time


class Measured(Protocol):
    """Sizes of one example in tokens: all, those in the loss, and those of the latter beyond the length limit."""

    @property
    def total_tokens(self) -> int: ...
    @property
    def supervised_tokens(self) -> int: ...
    @property
    def answer_tokens_lost(self) -> int: ...


Measure = Callable[[Sequence[Example]], Iterable[Measured | Problem]]
"""Sizes of a batch of examples, in order; `tokens.measure` with its template and policy bound is one."""


@dataclass(frozen=True, slots=True)
class TokenReport:
    """Lengths in tokens. `histogram` counts examples up to each edge of `LENGTH_EDGES`, then those above the last."""

    total: int
    supervised: int
    shortest: int
    median: int
    p95: int
    longest: int
    histogram: dict[str, int]
    max_length: int | None
    rows_over: int
    answer_tokens_lost: int

    @property
    def supervised_share(self) -> float:
        return self.supervised / self.total if self.total else 0.0


@dataclass(frozen=True, slots=True)
class FileReport:
    """Everything `ftf data check` says about one file.

    `rows` = `usable` + the sum of `rejected`; `examples` can be more (a row may hold several) or fewer (linked rows).
    `duplicates` counts examples beyond the first of each group with the same content; `near_duplicates` those beyond
    the first of each group that is alike, exact ones not counted again. `preferences` says how many pairs and rated answers
    can be made, where there are any, ratings included. `error` is set, and everything else empty,
    when the file as a whole is no dataset.
    """

    file: str
    source: SourceInfo | None = None
    shapes: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    preferences: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    usable: int = 0
    examples: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    problems: dict[str, tuple[Problem, ...]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    near_duplicates: int | None = None
    near_duplicates_checked: int = 0
    languages: dict[str, int] = field(default_factory=dict)
    languages_sampled: int = 0
    tokens: TokenReport | None = None
    warnings: tuple[str, ...] = ()
    error: dict[str, Any] | None = None

    @property
    def has_preferences(self) -> bool:
        """Whether pairs or rated answers can be made of some rows: by their kind, a rating, or ranks that a tree may hold."""
        rated = bool({"preference", "unpaired", "rated chat"} & self.kinds.keys())
        return rated or any(shape.startswith("oasst") for shape in self.shapes) or "vote" in self.shapes

    @property
    def rejected_rows(self) -> int:
        return sum(self.rejected.values())

    @property
    def rejected_share(self) -> float:
        return self.rejected_rows / self.rows if self.rows else 0.0

    def to_json(self) -> dict[str, Any]:
        """The object of `ftf data check --json`; plain values only."""
        result: dict[str, Any] = {
            "file": self.file,
            "shapes": self.shapes,
            "kinds": self.kinds,
            "preferences": self.preferences,
            "rows": self.rows,
            "usable": self.usable,
            "rejected": self.rejected,
            "duplicates": self.duplicates,
            "examples": self.examples,
            "near_duplicates": self.near_duplicates,
            "near_duplicates_checked": self.near_duplicates_checked,
            "problems": {code: [_problem_json(problem) for problem in shown] for code, shown in self.problems.items()},
            "notes": self.notes,
            "languages": self.languages,
            "languages_sampled": self.languages_sampled,
            "warnings": list(self.warnings),
        }
        if self.source is not None:
            result |= {name: getattr(self.source, name) for name in ("format", "compression", "encoding", "delimiter")}
        if self.tokens is not None:
            result["tokens"] = {**asdict(self.tokens), "supervised_share": self.tokens.supervised_share}
        return result if self.error is None else result | {"error": self.error}


def _problem_json(problem: Problem) -> dict[str, Any]:
    place = problem.place
    return {"file": place.file, "row": place.row, "line": place.line, "found": problem.found, "hint": problem.hint}


def inspect(
    path: str | Path,
    *,
    mapping: Mapping | None = None,
    tree_paths: Literal["best", "all"] = "best",
    measure: Measure | None = None,
    max_length: int | None = None,
    near_duplicates: bool = True,
    encoding: str | None = None,
    limits: Limits | None = None,
) -> FileReport:
    """Report on one dataset file. Raises `DataError` when the file as a whole is no dataset."""
    source = sniff(path, encoding=encoding, limits=limits)
    rows = read_rows(path, encoding=encoding, limits=limits)
    report = inspect_examples(
        to_examples(rows, mapping, tree_paths=tree_paths),
        file=str(path), source=source, measure=measure, max_length=max_length, near_duplicates=near_duplicates,
    )  # fmt: skip
    if not report.has_preferences:
        return report
    again = partial(read_rows, path, encoding=encoding, limits=limits)
    forms: tuple[Form, ...] = ("pair", "rated")
    counts: dict[str, int] = {form: _count_form(to_examples(again(), mapping, several_answers=True), form) for form in forms}
    return replace(report, preferences=counts if any(counts.values()) else {})


def _count_form(items: Iterable[Example | Problem], form: Form) -> int:
    """How many examples of a form come out with the default settings."""
    kinds = KINDS[form]
    return sum(not isinstance(item, Problem) and item.kind in kinds for item in FormReader(form).read(items))


def inspect_files(paths: Sequence[str | Path], **options: Any) -> list[FileReport]:
    """`inspect` for several files; one that is no dataset gives a report with `error` instead of stopping the others."""
    reports = []
    for path in paths:
        try:
            reports.append(inspect(path, **options))
        except DataError as error:
            reports.append(FileReport(str(path), error=error.to_dict(), warnings=(error.message,)))
    return reports


def inspect_examples(
    items: Iterable[Example | Problem],
    *,
    file: str,
    source: SourceInfo | None = None,
    measure: Measure | None = None,
    max_length: int | None = None,
    near_duplicates: bool = True,
) -> FileReport:
    """Report on examples and problems from anywhere, in the order of their rows."""
    tally = _Tally(near_duplicates)
    with _rare_garbage_collection():
        for item in items if measure is None else _measured(items, measure, tally):
            if isinstance(item, Problem):
                tally.add_problem(item)
            else:
                tally.add_example(item)
        return tally.report(file, source, max_length)


def _measured(items: Iterable[Example | Problem], measure: Measure, tally: _Tally) -> Iterator[Example | Problem]:
    """Pass items through in batches, sizes going to the tally; an example that cannot be tokenized becomes its problem."""
    iterator = iter(items)
    while batch := list(islice(iterator, MEASURE_BATCH)):
        sizes = iter(measure([item for item in batch if isinstance(item, Example)]))
        for item in batch:
            if isinstance(item, Problem):
                yield item
                continue
            size = next(sizes)
            if isinstance(size, Problem):
                yield size
            else:
                tally.add_size(size)
                yield item


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(GC_ALLOCATIONS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Tally:
    """The running counts of one file."""

    def __init__(self, near_duplicates: bool) -> None:
        self._near = Signatures() if near_duplicates else None
        self._near_keys = array("Q")
        self._keys = array("Q")
        self._shapes: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._problems: dict[str, list[Problem]] = {}
        self._notes: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._last_row = -1
        self._rows = 0
        self._lengths = array("Q")
        self._supervised = 0
        self._lost = 0
        self._sample = _TextSample()

    def add_problem(self, problem: Problem) -> None:
        self._count_row(problem.place.row, problem.shape)
        self._rejected[problem.code] += 1
        shown = self._problems.setdefault(problem.code, [])
        if len(shown) < PROBLEMS_SHOWN:
            shown.append(problem)

    def add_example(self, example: Example) -> None:
        self._count_row(example.place.row, example.shape)
        self._notes.update(example.notes)
        self._kinds[example.kind if example.rating is None else f"rated {example.kind}"] += 1
        key = exact_key(example)
        self._keys.append(key)
        if self._near is not None and self._near.count < NEAR_LIMIT_ROWS:
            self._near.add(example)
            self._near_keys.append(key)
        self._sample.add(example)

    def add_size(self, size: Measured) -> None:
        self._lengths.append(size.total_tokens)
        self._supervised += size.supervised_tokens
        self._lost += size.answer_tokens_lost

    def _count_row(self, row: int, shape: str) -> None:
        if row == self._last_row:
            return  # a further example of the same row
        self._last_row = row
        self._rows += 1
        if shape:
            self._shapes[shape] += 1

    def report(self, file: str, source: SourceInfo | None, max_length: int | None) -> FileReport:
        rejected = dict(self._rejected.most_common())
        usable = self._rows - sum(rejected.values())
        return FileReport(
            file=file,
            source=source,
            shapes=dict(self._shapes.most_common()),
            kinds=dict(self._kinds.most_common()),
            rows=self._rows,
            usable=usable,
            examples=len(self._keys),
            rejected=rejected,
            problems={code: tuple(self._problems[code]) for code in rejected},
            notes=dict(self._notes.most_common()),
            duplicates=len(self._keys) - _distinct(self._keys),
            near_duplicates=self._near_duplicates(),
            near_duplicates_checked=self._near.count if self._near is not None else 0,
            languages=self._sample.languages(),
            languages_sampled=len(self._sample.texts),
            tokens=self._tokens(max_length),
            warnings=tuple(_warnings(self._rows, usable, self._notes)),
        )

    def _near_duplicates(self) -> int | None:
        if self._near is None:
            return None
        clusters = self._near.clusters()
        beyond_first = len(clusters) - len(set(clusters))
        exact = len(self._near_keys) - _distinct(self._near_keys)
        return max(0, beyond_first - exact)

    def _tokens(self, max_length: int | None) -> TokenReport | None:
        if not self._lengths:
            return None
        lengths = sorted(self._lengths)
        return TokenReport(
            total=sum(lengths),
            supervised=self._supervised,
            shortest=lengths[0],
            median=lengths[len(lengths) // 2],
            p95=lengths[min(len(lengths) - 1, int(len(lengths) * 0.95))],
            longest=lengths[-1],
            histogram=_histogram(lengths),
            max_length=max_length,
            rows_over=len(lengths) - bisect.bisect_right(lengths, max_length) if max_length else 0,
            answer_tokens_lost=self._lost,
        )


def _distinct(keys: array[int]) -> int:
    import numpy as np

    return len(np.unique(np.frombuffer(keys, dtype=np.uint64))) if keys else 0


def _histogram(lengths: list[int]) -> dict[str, int]:
    counts, below = {}, 0
    for edge in LENGTH_EDGES:
        up_to = bisect.bisect_right(lengths, edge)
        counts[f"<={edge}"] = up_to - below
        below = up_to
    counts[f">{LENGTH_EDGES[-1]}"] = len(lengths) - below
    return counts


def _warnings(rows: int, usable: int, notes: Counter[str]) -> Iterable[str]:
    if not rows:
        yield "The file has no rows; at least 2 usable examples are needed, one of them for evaluation."
    elif not usable:
        yield "No row can be used; see the reasons."
    elif usable == 1:
        yield "Only 1 usable example; at least 2 are needed, one of them for evaluation."
    if notes["placeholder"]:
        yield f"{notes['placeholder']:,} examples hold an unfilled placeholder. {NOTES['placeholder']}"
    if notes["bare_string"]:
        yield f"{notes['bare_string']:,} rows are bare strings. {NOTES['bare_string']}"


class _TextSample:
    """A uniform sample of texts that are long enough for language identification (reservoir, fixed seed)."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._seen = 0
        self._random = random.Random(0)
        self._loading: threading.Thread | None = None

    def add(self, example: Example) -> None:
        slot = self._seen if self._seen < LANGUAGE_SAMPLE else int(self._random.random() * (self._seen + 1))
        if slot >= LANGUAGE_SAMPLE:
            self._seen += 1
            return
        text = compared_text(example)
        if len(text) < LANGUAGE_MIN_CHARS:
            return
        self._start_loading()
        self._seen += 1
        if slot < len(self.texts):
            self.texts[slot] = text[:LANGUAGE_MAX_CHARS]
        else:
            self.texts.append(text[:LANGUAGE_MAX_CHARS])

    def _start_loading(self) -> None:
        """Unpacking the language model takes most of a second and frees the interpreter: it runs beside the reading."""
        if self._loading is None:
            self._loading = threading.Thread(target=_load_language_model, daemon=True)
            self._loading.start()

    def languages(self) -> dict[str, int]:
        """Language code -> number of sampled texts, most frequent first."""
        if self._loading is None:
            return {}
        self._loading.join()
        import py3langid

        return dict(Counter(str(py3langid.classify(text)[0]) for text in self.texts).most_common())


def _load_language_model() -> None:
    importlib.import_module("py3langid").classify("")


def check_threshold(report: FileReport, limit: float = 0.1) -> None:
    """Refuse a dataset of which too much was rejected (`limit` is a share of rows), or nothing is left."""
    if report.error is not None:
        raise DataError(report.error["error_code"], report.error["detail"], where=report.file, context=report.error["context"])
    reasons = ", ".join(f"{code}: {count:,}" for code, count in report.rejected.items())
    first = next((shown[0] for shown in report.problems.values() if shown), None)
    if report.rows and report.rejected_share > limit:
        raise DataError(
            "DATASET_TOO_MANY_REJECTED",
            f"{report.rejected_rows:,} of {report.rows:,} rows ({report.rejected_share:.0%}) cannot be used, more than the limit of {limit:.0%} ({reasons}).",
            where=str(first.place) if first else report.file,
            remedy=f"{first.hint if first else ''} See every reason with `ftf data check {report.file}`, or raise the limit.".strip(),
            context={"rejected": report.rejected, "rows": report.rows, "limit": limit},
        )
    if not report.usable:
        raise DataError(
            "DATASET_NOTHING_USABLE",
            f"{report.file} has no usable example.",
            where=report.file,
            remedy="Give a file with at least 2 examples.",
        )
