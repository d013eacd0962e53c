"""A dataset in figures from a sample of its rows: a plan cannot wait for the whole of a large file."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from finetuneflow.config import Data
from finetuneflow.data.examples import Example, Message, Problem, endings_of, for_other_objectives, prompt_of, to_examples
from finetuneflow.data.examples import Mapping as Columns
from finetuneflow.data.forms import KINDS, Form, reference_answer
from finetuneflow.data.preferences import SET_ASIDE, FormReader, Pairing
from finetuneflow.data.similarity import exact_key
from finetuneflow.data.sources import Row, read_rows, sniff
from finetuneflow.data.streams import BLOCK_BYTES
from finetuneflow.errors import DataError
from finetuneflow.knowledge.values import DataFacts, many

SAMPLE_SECONDS = 0.15
SAMPLE_ROWS = 100  # of each file are read however long it takes
SIZE_SECONDS = 0.05  # for finding out how large a compressed file is
SPLIT_EXAMPLES = 2_000  # up to here the split is made as the run will make it: a tenth of a second
SAMPLE_CHARS = 200_000  # as many are put through the tokenizer: less than a tenth of a second
SAMPLE_LENGTHS = 20_000  # examples whose characters are counted
TOKENIZER_BYTES = 12_000_000  # a larger tokenizer.json takes longer to load than a plan may take
TURN_TOKENS = 5  # what a chat template writes around a turn: 4 to 6 in the common ones
CHARS_PER_TOKEN = 4.0  # English prose with vocabularies of 32k to 150k; French and code have fewer

HAND_FORMATS = {
    "### Instruction:": "Alpaca",
    "[INST]": "Llama 2",
    "<|im_start|>": "ChatML",
    "<|start_header_id|>": "Llama 3",
    "\nAssistant:": "User: / Assistant:",
    "USER: ": "Vicuna",
}


@dataclass(slots=True)
class _Part:
    """What was read of one file. `share`: of its bytes or rows."""

    examples: list[Example] = field(default_factory=list)
    rejected: int = 0
    unsuited: Counter[str] = field(default_factory=Counter)
    share: float = 1.0
    hint: str = ""  # of the first row that was rejected

    def in_all(self, count: int) -> int:
        """A number of the part, for the whole file."""
        return round(count / self.share)


@dataclass(frozen=True, slots=True)
class _Sample:
    """What was read of some files."""

    parts: tuple[_Part, ...]
    limit: int | None

    @property
    def examples(self) -> list[Example]:
        return [example for part in self.parts for example in part.examples]

    @property
    def estimated_examples(self) -> int:
        total = sum(part.in_all(len(part.examples)) for part in self.parts)
        return total if self.limit is None else min(total, self.limit)

    @property
    def is_whole(self) -> bool:
        return all(part.share == 1 for part in self.parts)

    def spread(self, most: int) -> list[Example]:
        """At most so many examples, evenly over each file (files are often sorted), from each by its size."""
        sizes = [part.in_all(len(part.examples)) for part in self.parts]
        share = min(most / max(sum(sizes), 1), *(part.share for part in self.parts))
        chosen: list[Example] = []
        for part, size in zip(self.parts, sizes, strict=True):
            count = min(len(part.examples), max(1, round(size * share)))
            chosen += [part.examples[index * len(part.examples) // count] for index in range(count)]
        return chosen


def look_at_data(
    data: Data, tokenizer: Any = None, *, supervise: str | None = None, seed: int = 42, form: Form = "supervised"
) -> tuple[DataFacts | None, tuple[str, ...]]:
    """Figures of a run's training data, replayed examples among them, from a sample, and notes on what was assumed; None
    where no file is named.

    `tokenizer`: of the `tokenizers` library; without one, lengths come from characters. `supervise`: what enters the
    loss, where it is not what `data` says. `seed`: of the split. `form`: what the objective makes of an example; only those
    count that it can be made from, ratings made into pairs or labels first.
    Raises `DataError` for a file that is missing or is no dataset, and for data that cannot be split.
    """
    if not data.train:
        return None, ()
    train = _sample(data.train, data, SAMPLE_SECONDS, form)
    held_out = _sample(data.eval, data, SAMPLE_SECONDS / 3, form) if data.eval else None
    examples = train.examples
    unsuited: Counter[str] = sum((part.unsuited for part in train.parts), Counter())
    rejected = sum(part.in_all(part.rejected) for part in train.parts)
    others, objective = for_other_objectives(unsuited)
    if not examples:
        raise DataError(
            "DATASET_NOTHING_USABLE",
            f"No example can be used{_WANTED[form]} in what was read of {', '.join(data.train)} ({many(rejected, 'row')} rejected"
            + (f", {others})." if others else ")."),
            remedy=f"{objective}{''.join(part.hint for part in train.parts[:1])}See why: ftf data check {data.train[0]}",
        )
    num_train, num_eval = _divided(train, held_out, data, seed, form)
    lengths = _lengths(train, tokenizer, supervise or data.supervise, form)
    notes: tuple[str, ...] = ()
    if data.replay and form == "supervised":
        from finetuneflow.data.prepare import replay_count

        general = _sample(data.replay, data.model_copy(update={"limit": None, "mapping": {}}), SAMPLE_SECONDS / 3, form)
        replayed = min(replay_count(num_train, data.replay_share), general.estimated_examples)
        lengths = lengths.mixed(_lengths(general, tokenizer, supervise or data.supervise, form), replayed / num_train)
        num_train += replayed
        notes = (f"Of the examples, {replayed:,} are replayed ones (data.replay).",)
    if tokenizer is None:
        notes = (
            *notes,
            f"Tokens are estimated from characters ({CHARS_PER_TOKEN:g} per token); `ftf data check --model` counts them.",
        )
    if not train.is_whole:
        share = len(examples) / max(sum(part.in_all(len(part.examples)) for part in train.parts), 1)
        notes = (
            *notes,
            f"{many(len(examples), 'example')} read, {_percent(share)} of the files; the number of all is estimated.",
        )
    if others:
        notes = (*notes, f"Left out ({others}).")
    keys = {exact_key(example) for example in examples}
    shown = train.spread(SAMPLE_LENGTHS)
    return (
        DataFacts(
            examples=num_train,
            eval_examples=num_eval,
            mean_tokens=_mean(lengths.rows),
            length_percentiles=_percentiles(lengths.rows),
            supervised_share=None if form == "prompt" else lengths.supervised_share,
            counted=tokenizer is not None,
            kinds=tuple(sorted({example.kind for example in examples})),
            turns_mean=sum(len(example.messages) for example in shown) / len(shown),
            duplicate_share=1 - len(keys) / len(examples),
            eval_overlap=sum(exact_key(example) in keys for example in held_out.examples) if held_out else None,
            rejected=rejected,
            hand_formatted=_hand_format(train.spread(200)),
            form=form,
            good_share=sum(bool(example.label) for example in examples) / len(examples) if form == "rated" else None,
            **({} if form == "supervised" else lengths.of_answers(form)),
        ),
        notes,
    )


_WANTED: dict[Form, str] = {"supervised": "", "pair": " as a pair", "rated": " as a rated answer", "prompt": " as a prompt"}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"


def _divided(train: _Sample, held_out: _Sample | None, data: Data, seed: int, form: Form) -> tuple[int, int]:
    """Examples that train and that are held out, as `data.prepare` divides them."""
    total = train.estimated_examples
    if held_out is not None:
        return total, held_out.estimated_examples
    fraction = min(data.eval_fraction, data.eval_limit / total)
    if fraction <= 0 or total < 2:
        return total, 0
    if train.is_whole and total <= SPLIT_EXAMPLES:
        from finetuneflow.data.splits import split

        parts = split(train.examples, eval_fraction=fraction, seed=seed, by_prompt=form != "supervised")
        return len(parts.train_indices), len(parts.eval_indices)
    num_eval = max(1, round(total * fraction))
    return total - num_eval, num_eval


def _sample(names: Sequence[str], data: Data, seconds: float, form: Form) -> _Sample:
    """Read for `seconds`, an equal time for each file; no further than `data.limit` goes."""
    for name in names:
        if not os.path.isfile(name):
            raise DataError(
                "DATASET_NOT_FOUND",
                f"There is no file {name!r}.",
                where="data.train / data.eval / data.replay",
                remedy="Check the spelling; the path counts from the folder the command runs in.",
            )
    found = _Sample((), data.limit)
    for name in names:
        left = None if data.limit is None else data.limit - found.estimated_examples
        if left is not None and left <= 0:
            break
        found = _Sample((*found.parts, _sample_file(Path(name), data, left, seconds / len(names), form)), data.limit)
    return found


def _sample_file(path: Path, data: Data, limit: int | None, seconds: float, form: Form) -> _Part:
    """The usable examples among the first rows of a file."""
    part, reading = _Part(), _Reading(path, data.encoding, time.monotonic() + seconds)
    mapping = Columns(**data.mapping) if data.mapping else None
    several = form in ("pair", "rated")
    items = to_examples(reading.rows(), mapping, tree_paths=data.tree_paths, several_answers=several)
    for item in FormReader(form, Pairing.of(data)).read(items):
        if isinstance(item, Problem):
            part.rejected += item.code not in SET_ASIDE
            part.hint = part.hint or f"{item.hint} "
        elif item.kind in KINDS[form]:
            part.examples.append(item)
        else:
            part.unsuited[item.kind] += 1
        if limit is not None and len(part.examples) >= limit:
            return part  # the run reads no further either
    part.share = reading.share()
    return part


@dataclass(slots=True)
class _Reading:
    """The rows of a file until a moment, and then what share of the file that was."""

    path: Path
    encoding: str | None
    deadline: float
    count: int = 0
    first: Row | Problem | None = None
    next: Row | Problem | None = None  # the first row that was not given out
    on_first_line: list[Any] = field(default_factory=list)

    def rows(self) -> Iterator[Row | Problem]:
        for row in read_rows(self.path, encoding=self.encoding):
            if self.count >= SAMPLE_ROWS and time.monotonic() > self.deadline:
                self.next = row
                return
            self.first = self.first or row
            if isinstance(row, Row) and row.place.line == self.first.place.line:
                self.on_first_line.append(row.fields)
            self.count += 1
            yield row

    def share(self) -> float:
        if self.next is None or self.first is None:
            return 1.0
        source = sniff(self.path, encoding=self.encoding)
        if source.format == "parquet":
            return self.count / max(_parquet_rows(self.path, source.compression), self.count)
        line, first_line = self.next.place.line or 1, self.first.place.line or 1
        before, whole, escaped, compact = _plain_bytes(self.path, source.compression, line)
        if line == first_line:  # a list on one line: as long as its rows when they are written again
            style: dict[str, Any] = {"ensure_ascii": escaped, "separators": (",", ":") if compact else (", ", ": ")}
            texts = (json.dumps(fields, default=str, **style) for fields in self.on_first_line)
            before = sum(len(text.encode("utf-8", "replace")) + (1 if compact else 2) for text in texts)
        return min(1.0, max(before, 1) / max(whole, 1))


def _parquet_rows(path: Path, compression: str | None) -> int:
    """Rows of a Parquet file by its own footer; 0 where the file itself is compressed."""
    import pyarrow.parquet as pq

    return 0 if compression else int(pq.ParquetFile(path).metadata.num_rows)


def _plain_bytes(path: Path, compression: str | None, line: int) -> tuple[int, float, bool, bool]:
    """(bytes before a line, bytes of the whole file, whether its beginning escapes letters, and is without spaces).

    A compressed file is unpacked for `SIZE_SECONDS`; what is left is taken to pack as well as what was unpacked.
    """
    size, deadline = path.stat().st_size, time.monotonic() + SIZE_SECONDS
    before, read, lines, found = 0, 0, 1, line <= 1
    escaped = compact = False
    with path.open("rb") as file, contextlib.suppress(EOFError, OSError, zlib.error):
        source = _unpacked(file, compression)
        while block := source.read(BLOCK_BYTES):
            if read == 0:
                escaped, compact = b"\\u" in block, block.count(b'": ') * 2 < block.count(b'":')
            if not found and lines + (ends := block.count(b"\n")) < line:
                lines += ends
            elif not found:
                at = 0
                for _ in range(line - lines):
                    at = block.index(b"\n", at) + 1
                before, found = read + at, True
            read += len(block)
            if found and (compression is None or time.monotonic() > deadline):
                rest = size - file.tell()
                return before, size if compression is None else read * size / max(size - rest, 1), escaped, compact
    return before if found else read, float(read), escaped, compact


def _unpacked(file: IO[bytes], compression: str | None) -> IO[bytes]:
    if compression == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if compression == "zstd":
        import zstandard

        return cast(IO[bytes], zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    return file


def load_tokenizer(folder: Path | None) -> Any:
    """The `tokenizers` object of a model folder, or None where there is none that loads at once."""
    path = folder / "tokenizer.json" if folder else None
    if path is None or not path.is_file() or path.stat().st_size > TOKENIZER_BYTES:
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # the library raises a bare Exception; loading the model will say what is wrong
        return None


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Of each example (tokens, tokens that are learned) of its sides; of a prompt the second side is the expected answer alone."""

    sides: list[list[tuple[int, int]]]
    form: Form

    @property
    def rows(self) -> list[int]:
        """Tokens of each example, of a pair those of its longer side."""
        if self.form == "prompt":
            return [prompt for (prompt, _), *_ in self.sides]
        return [max(length for length, _ in sides) for sides in self.sides]

    @property
    def supervised_share(self) -> float:
        whole, own = (sum(side[place] for sides in self.sides for side in sides) for place in (0, 1))
        return min(1.0, own / max(whole, 1))

    def mixed(self, other: _Lengths, share: float) -> _Lengths:
        """With as many of the other's examples added, evenly chosen, as are `share` of its own."""
        count = round(share * len(self.sides)) if other.sides else 0
        return _Lengths([*self.sides, *(other.sides[index * len(other.sides) // count] for index in range(count))], self.form)

    def of_answers(self, form: Form) -> dict[str, Any]:
        """What `DataFacts` says of prompts and answers."""
        answers = [[own for _, own in sides] for sides in self.sides]
        first = [own[-1] if form == "prompt" else own[0] for own in answers]
        prompts = (
            self.rows if form == "prompt" else [sides[0][0] - own[0] for sides, own in zip(self.sides, answers, strict=True)]
        )
        found: dict[str, Any] = {"prompt_tokens": _mean(prompts), "answer_percentiles": _percentiles(first)}
        if form == "pair":
            found["both_tokens"] = _mean([sum(length for length, _ in sides) for sides in self.sides])
            found["length_ratio"] = sum(first) / max(sum(own[1] for own in answers), 1)
        return found


def _lengths(sample: _Sample, tokenizer: Any, supervise: str, form: Form) -> _Lengths:
    """Tokens of a part of the sample; estimated without a tokenizer."""
    chosen = [_sides(example, supervise, form) for example in sample.spread(SAMPLE_LENGTHS)]
    if tokenizer is not None:
        chars = sum(len(text) for sides in chosen for pieces in sides for text, _ in pieces)
        step = max(1, -(-chars // SAMPLE_CHARS), len(chosen) // 1_000)
        chosen = chosen[::step]
    numbers = iter(_token_numbers([text for sides in chosen for pieces in sides for text, _ in pieces], tokenizer))
    return _Lengths([[_side(pieces, numbers, supervise) for pieces in sides] for sides in chosen], form)


def _side(pieces: list[tuple[str, bool]], numbers: Iterator[int], supervise: str) -> tuple[int, int]:
    """(tokens, learned tokens) of one side, each piece with what a template writes around it."""
    around = 1 if len(pieces) == 1 else TURN_TOKENS
    length = supervised = 0
    for _, own in pieces:
        number = next(numbers)
        length += number + around
        supervised += (number + (around if supervise == "all" else 1)) if own else 0
    return length, supervised


def _token_numbers(texts: list[str], tokenizer: Any) -> list[int]:
    """Tokens of each text; of a very long one, as many as its beginning promises."""
    if tokenizer is None:
        return [round(len(text) / CHARS_PER_TOKEN) for text in texts]
    encoded = tokenizer.encode_batch([text[:SAMPLE_CHARS] for text in texts], add_special_tokens=False)
    return [round(len(encoding.ids) * max(1.0, len(text) / SAMPLE_CHARS)) for text, encoding in zip(texts, encoded, strict=True)]


def _sides(example: Example, supervise: str, form: Form) -> list[list[tuple[str, bool]]]:
    """The texts of each side of an example, each with whether it enters the loss."""
    if form == "supervised":
        return [_pieces(example, supervise)]
    prompt = [(_text(message), False) for message in prompt_of(example)]
    if form == "prompt":
        return [[*prompt, ("", False)], [(reference_answer(example), True)]]  # the generation prompt is a turn of its own
    return [[*prompt, *((_text(message), message.role == "assistant") for message in ending)] for ending in endings_of(example)]


def _text(message: Message) -> str:
    """A turn's text, calls of tools included."""
    calls = "".join(f"{call.name}{json.dumps(call.arguments, ensure_ascii=False)}" for call in message.tool_calls)
    return message.content + calls


def _pieces(example: Example, supervise: str) -> list[tuple[str, bool]]:
    """The texts of an example, each with whether it enters the loss."""
    if example.text is not None:
        return [(example.text, True)]
    last = max((index for index, message in enumerate(example.messages) if message.role == "assistant"), default=-1)
    pieces = [(json.dumps(example.tools, ensure_ascii=False), supervise == "all")] if example.tools else []
    for index, message in enumerate(example.messages):
        answer = message.role == "assistant" and message.weight > 0 and (supervise == "assistant" or index == last)
        pieces.append((_text(message), supervise == "all" or answer))
    return pieces


def _percentiles(lengths: list[int]) -> tuple[int, ...]:
    ordered = sorted(lengths)
    return tuple(ordered[min(len(ordered) - 1, round(p / 100 * (len(ordered) - 1)))] for p in range(101))


def _hand_format(examples: list[Example]) -> str | None:
    """The name of a chat format that most rows hold as plain text, as if a template had been applied by hand."""
    seen: dict[str, int] = {}
    for example in examples:
        text = example.text or "".join(message.content for message in example.messages[:2])
        for mark, name in HAND_FORMATS.items():
            seen[name] = seen.get(name, 0) + (mark in text)
    name, hits = max(seen.items(), key=lambda item: item[1], default=("", 0))
    return name if hits > len(examples) / 2 else None
