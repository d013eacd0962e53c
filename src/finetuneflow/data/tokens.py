"""Examples to token ids and labels. Training and preview share these functions, so what is shown is what is trained.

Place in the flow: `examples` -> **tokens.tokenize** -> `batches.loader`.

What enters the loss:
- the answers chosen by the policy, each from the place where the generation prompt of inference ends, and with the
  token that ends the turn: a model that never sees it in a label never learns to stop (also when pad and eos are one);
- of a token that straddles the beginning of an answer, all (the model has to produce it);
- an assistant's tool calls, not the tools' results; never an empty answer, never a turn of weight 0;
- of a document (continued pre-training), everything and the end-of-sequence token.

Rows longer than `max_length`, by policy:
- `drop`: left out and counted;
- `cut`: the end is cut off, and a cut answer gets no turn-end it did not reach. If nothing of an answer is left that way,
  the oldest exchanges of a longer conversation go instead (the system message stays). A row whose answer cannot be
  reached at all is left out and counted;
- `split`: a conversation is parted between exchanges, each part with the system message; a document into windows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

from finetuneflow.data.encoding import Encoded
from finetuneflow.data.examples import Example, Message, Place, Problem
from finetuneflow.data.spans import Located
from finetuneflow.data.templates import Template
from finetuneflow.errors import DataError
from finetuneflow.knowledge.values import many

Supervise = Literal["assistant", "last", "all"]  # every assistant turn | only the last one | everything
Overlong = Literal["drop", "cut", "split"]
SpanKind = Literal["prompt", "supervised", "end", "masked"]

MASKED = -100  # the label that the loss leaves out
_BATCH = 512  # texts handed to the tokenizer at once


@dataclass(frozen=True, slots=True)
class Policy:
    """What is trained on, and what happens to rows of more than `max_length` tokens."""

    supervise: Supervise = "assistant"
    max_length: int = 2048
    overlong: Overlong = "cut"


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `end` (exclusive) that belong together.

    `prompt`: context; `supervised`: an answer in the loss; `end`: its turn-end; `masked`: an answer kept out of the loss.
    `message` is the number of the assistant's turn, None for context.
    """

    start: int
    end: int
    kind: SpanKind
    message: int | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """One training row. `labels[i]` is `ids[i]` or MASKED. Invariant: as many labels as ids, spans cover them in order.

    `lost_tokens` and `lost_answer_tokens` were cut off; `part` numbers the rows a split made of one example;
    `unlocated` counts assistant turns that were not found and stay out of the loss.
    """

    ids: list[int]
    labels: list[int]
    spans: tuple[Span, ...]
    place: Place
    lost_tokens: int = 0
    lost_answer_tokens: int = 0
    part: int = 0
    unlocated: int = 0

    @property
    def supervised(self) -> int:
        """Number of tokens in the loss."""
        return len(self.labels) - self.labels.count(MASKED)

    @property
    def turn_ends(self) -> int:
        """Number of turn-ends in the loss."""
        return sum(1 for span in self.spans if span.kind == "end" and self.labels[span.end - 1] != MASKED)


@dataclass(frozen=True, slots=True)
class Measure:
    """Sizes of one example: tokens in all, tokens in the loss, and those of the latter beyond `max_length`."""

    total_tokens: int
    supervised_tokens: int
    answer_tokens_lost: int


@dataclass(slots=True)
class TokenizeStats:
    """What became of the rows, counted while they are tokenized. Lengths are in tokens."""

    examples: int = 0
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    turn_ends: int = 0
    cut: int = 0
    split: int = 0
    dropped: int = 0
    lost_tokens: int = 0
    lost_answer_tokens: int = 0
    unlocated_turns: int = 0
    unsupervised_rows: int = 0
    doubled_bos: int = 0
    chats: int = 0
    longest: int = 0
    problems: Counter[str] = field(default_factory=Counter)

    def count(self, example: Example, result: list[Tokens] | Problem, bos_id: int | None) -> None:
        """Count one example's outcome."""
        self.examples += 1
        if isinstance(result, Problem):
            self.problems[result.code] += 1
            self.dropped += 1
            return
        self.chats += example.kind != "text"
        self.split += len(result) > 1
        self.cut += any(row.lost_tokens for row in result)
        for row in result:
            self.rows += 1
            self._count_tokens(row, bos_id)

    def count_sides(self, result: Sequence[Tokens] | Problem, bos_id: int | None) -> None:
        """Count the outcome of one pair or rated answer: one row, whose tokens are those of all its sides."""
        self.examples += 1
        if isinstance(result, Problem):
            self.problems[result.code] += 1
            self.dropped += 1
            return
        self.chats += 1
        self.rows += 1
        self.cut += any(side.lost_tokens for side in result)
        for side in result:
            self._count_tokens(side, bos_id)

    def _count_tokens(self, row: Tokens, bos_id: int | None) -> None:
        supervised = row.supervised
        self.tokens += len(row.ids)
        self.supervised += supervised
        self.unsupervised_rows += supervised == 0
        self.turn_ends += row.turn_ends
        self.lost_tokens += row.lost_tokens
        self.lost_answer_tokens += row.lost_answer_tokens
        self.unlocated_turns += row.unlocated
        self.longest = max(self.longest, len(row.ids))
        self.doubled_bos += bos_id is not None and row.ids[:2] == [bos_id, bos_id]

    def to_dict(self) -> dict[str, object]:
        """For reports and manifests."""
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**facts, "problems": dict(self.problems)}


# One example, many examples ---------------------------------------------------------------------------------------------


def tokenize(example: Example, template: Template, policy: Policy = Policy()) -> list[Tokens] | Problem:
    """The rows of one example (several when split), or why it cannot be used."""
    return next(tokenize_many([example], template, policy))


def tokenize_many(
    examples: Iterable[Example],
    template: Template,
    policy: Policy = Policy(),
    *,
    stats: TokenizeStats | None = None,
) -> Iterator[list[Tokens] | Problem]:
    """The outcome of each example, in order. Works in batches, as the tokenizer's threads like it; memory stays flat."""
    check_policy(policy)
    for example, encoded in encode_examples(examples, template):
        result: list[Tokens] | Problem
        if isinstance(encoded, Problem):
            result = encoded
        else:
            result = _fit(label_source(*encoded, template, policy), encoded[0], template, policy)
        if stats is not None:
            stats.count(example, result, template.bos_id)
        yield result


def measure(examples: Iterable[Example], template: Template, policy: Policy = Policy()) -> Iterator[Measure | Problem]:
    """Sizes of each example before anything is cut, in order."""
    for _, encoded in encode_examples(examples, template):
        if isinstance(encoded, Problem):
            yield encoded
            continue
        row = label_source(*encoded, template, policy)
        kept = row.labels[: policy.max_length]
        yield Measure(len(row.ids), row.supervised, row.supervised - (len(kept) - kept.count(MASKED)))


def check_policy(policy: Policy) -> None:
    if policy.max_length < 2:
        raise DataError(
            "CONFIG_INVALID_VALUE", f"max_length is {policy.max_length}; a row needs at least 2 tokens.", where="max_length"
        )


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    iterator = iter(examples)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


@dataclass(frozen=True, slots=True)
class Source:
    """An example as text, ready for the tokenizer. `located` is None for a document."""

    example: Example
    text: str
    messages: tuple[Message, ...]
    located: Located | None


def encode_examples(
    examples: Iterable[Example], template: Template
) -> Iterator[tuple[Example, tuple[Source, Encoded] | Problem]]:
    """Each example with its text and ids, in order. While the tokenizer's threads encode one batch, the next is rendered."""
    with ThreadPoolExecutor(max_workers=1) as encoder:
        waiting: tuple[list[Example], list[Source | Problem], Future[list[Encoded | DataError]]] | None = None
        for batch in _batches(examples):
            sources = [render_example(example, template) for example in batch]
            texts = [source.text for source in sources if isinstance(source, Source)]
            ready, waiting = waiting, (batch, sources, encoder.submit(_encode_texts, texts, template))
            if ready is not None:
                yield from _together(*ready)
        if waiting is not None:
            yield from _together(*waiting)


def _together(
    batch: Sequence[Example], sources: Sequence[Source | Problem], encoding: Future[list[Encoded | DataError]]
) -> Iterator[tuple[Example, tuple[Source, Encoded] | Problem]]:
    encoded = iter(encoding.result())
    for example, source in zip(batch, sources, strict=True):
        if isinstance(source, Problem):
            yield example, source
            continue
        outcome = next(encoded)
        if isinstance(outcome, DataError):
            yield example, problem_of(example, outcome.code, outcome.message, outcome.remedy or "")
        else:
            yield example, (source, outcome)


def _encode_texts(texts: Sequence[str], template: Template) -> list[Encoded | DataError]:
    """All at once; one by one only when one of them cannot be encoded."""
    try:
        return list(template.encoder.encode_batch(texts))
    except DataError:
        return [encode_text(text, template) for text in texts]


def encode_text(text: str, template: Template) -> Encoded | DataError:
    try:
        return template.encoder.encode(text)
    except DataError as error:
        return error


# Example -> text ---------------------------------------------------------------------------------------------------------


def render_example(example: Example, template: Template) -> Source | Problem:
    try:
        if example.kind == "text":
            return Source(example, template.protect(example.text or ""), (), None)
        messages = _conversation(example)
        if isinstance(messages, Problem):
            return messages
        located = template.locate(messages, example.tools)
        return Source(example, located.text, messages, located)
    except DataError as error:
        return problem_of(example, error.code, error.message, error.remedy or "Change the row, or choose another template.")


def _conversation(example: Example) -> tuple[Message, ...] | Problem:
    """What supervised fine-tuning sees of an example: of a preference pair the chosen ending, of a rated answer a good one."""
    if example.kind == "preference":
        return example.messages + example.chosen
    if example.kind == "unpaired" and example.label is False:
        return problem_of(example, "ROW_NO_ANSWER", "an answer rated as bad", "Train on it with a preference objective instead.")
    return example.messages


def problem_of(example: Example, code: str, found: str, hint: str) -> Problem:
    return Problem(example.place, code, found, hint)


# Text -> labels ----------------------------------------------------------------------------------------------------------


def label_source(source: Source, encoded: Encoded, template: Template, policy: Policy) -> Tokens:
    """The whole row, however long."""
    if source.located is None:
        return _label_document(source, encoded, template)
    chosen = _chosen(source, source.located, policy)
    labels = list(encoded.ids) if policy.supervise == "all" else [MASKED] * len(encoded.ids)
    spans: list[Span] = []
    position = 0
    length = len(source.text)
    for answer in source.located.answers:
        first = encoded.first_token(answer.start, length)
        last = _token_after(encoded, answer.end, length)
        close = min(_token_after(encoded, answer.mark, length), last)
        if first > position:
            spans.append(Span(position, first, "prompt"))
        taken = answer.message in chosen
        if taken:
            labels[first:last] = encoded.ids[first:last]
        spans.append(Span(first, close if answer.ended else last, "supervised" if taken else "masked", answer.message))
        if answer.ended and last > close:
            spans.append(Span(close, last, "end" if taken else "masked", answer.message))
        position = last
    if position < len(labels):
        spans.append(Span(position, len(labels), "prompt"))
    return Tokens(encoded.ids, labels, tuple(spans), source.example.place, unlocated=len(source.located.unlocated))


def _token_after(encoded: Encoded, char: int, length: int) -> int:
    """The first token that begins at or after a character: one that straddles it still belongs to what stands before."""
    token = encoded.first_token(char, length)
    return token + 1 if encoded.starts_before(token, char) else token


def _chosen(source: Source, located: Located, policy: Policy) -> set[int]:
    """Numbers of the assistant's turns in the loss, in the template's count of turns."""
    shift = len(source.messages) - located.turns  # a merged system message makes one turn less
    weighted = [a.message for a in located.answers if source.messages[a.message + shift].weight > 0]
    if policy.supervise == "last":
        last = max((a.message for a in located.answers), default=-1)
        return {number for number in weighted if number == last}
    return set(weighted)


def _label_document(source: Source, encoded: Encoded, template: Template) -> Tokens:
    ids = [*([template.bos_id] if template.adds_bos and template.bos_id is not None else []), *encoded.ids]
    spans = [Span(0, len(ids), "supervised")] if ids else []
    if template.eos_id is not None and ids:
        ids.append(template.eos_id)
        spans.append(Span(len(ids) - 1, len(ids), "end"))
    return Tokens(ids, list(ids), tuple(spans), source.example.place)


# Rows that are too long --------------------------------------------------------------------------------------------------


def _fit(row: Tokens, source: Source, template: Template, policy: Policy) -> list[Tokens] | Problem:
    if row.supervised == 0:
        hint = "A row needs an assistant turn with text and a weight above 0."
        return problem_of(source.example, "ROW_NO_ANSWER", "no token that would enter the loss", hint)
    if len(row.ids) <= policy.max_length:
        return [row]
    if policy.overlong == "drop":
        found = f"{len(row.ids):,} tokens, {row.supervised:,} of them in answers"
        return problem_of(
            source.example, "ROW_TOO_LONG", found, f"Raise max_length above {policy.max_length:,}, or cut or split long rows."
        )
    if policy.overlong == "split":
        return _windows(row, template, policy) if source.located is None else _split(row, source, template, policy)
    return _cut(row, source, template, policy)


def truncate(row: Tokens, length: int) -> Tokens:
    """The first `length` tokens, with the loss in tokens written down."""
    spans = tuple(replace(span, end=min(span.end, length)) for span in row.spans if span.start < length)
    spans = tuple(
        replace(span, kind="supervised") if span.kind == "end" and span.end < whole.end else span
        for span, whole in zip(spans, row.spans, strict=False)
    )
    kept = row.labels[:length]
    lost = row.supervised - (len(kept) - kept.count(MASKED))
    return replace(
        row, ids=row.ids[:length], labels=kept, spans=spans, lost_tokens=len(row.ids) - length, lost_answer_tokens=lost
    )


def _cut(row: Tokens, source: Source, template: Template, policy: Policy) -> list[Tokens] | Problem:
    shorter = truncate(row, policy.max_length)
    if shorter.supervised:
        return [shorter]
    newest = _newest_that_fit(row, source, template, policy)
    if newest is not None:
        return [newest]
    found = f"a prompt of {row.labels.index(next(x for x in row.labels if x != MASKED)):,} tokens before the first answer"
    return problem_of(
        source.example, "ROW_NO_ANSWER_LEFT", found, f"Raise max_length above {policy.max_length:,}, or shorten the prompt."
    )


def _newest_that_fit(row: Tokens, source: Source, template: Template, policy: Policy) -> Tokens | None:
    """The conversation without its oldest exchanges, as few of them gone as possible; None if even the last is too long."""
    if source.located is None:
        return None
    head, exchanges = exchanges_of(source.messages)
    for first in range(1, len(exchanges)):
        whole = render_again(source, (*head, *flat(exchanges[first:])), template, policy)
        if whole is None:
            continue
        if len(whole.ids) > policy.max_length:
            if first < len(exchanges) - 1:
                continue
            whole = truncate(whole, policy.max_length)
        if whole.supervised:
            return replace(
                whole, lost_tokens=len(row.ids) - len(whole.ids), lost_answer_tokens=max(0, row.supervised - whole.supervised)
            )
    return None


def _split(row: Tokens, source: Source, template: Template, policy: Policy) -> list[Tokens] | Problem:
    """Parts of a conversation: as many whole exchanges in each as fit. An exchange too long by itself is cut."""
    head, exchanges = exchanges_of(source.messages)
    parts: list[Tokens] = []
    first = 0
    while first < len(exchanges):
        part, taken = _longest_part(source, head, exchanges[first:], template, policy)
        if part is not None and part.supervised:
            parts.append(replace(part, part=len(parts)))
        first += taken
    if not parts:
        found = f"{len(row.ids):,} tokens, and no exchange whose answer begins within {policy.max_length:,}"
        return problem_of(source.example, "ROW_NO_ANSWER_LEFT", found, f"Raise max_length above {policy.max_length:,}.")
    lost = row.supervised - sum(part.supervised for part in parts)
    others = sum(part.lost_answer_tokens for part in parts[1:])
    parts[0] = replace(parts[0], lost_answer_tokens=max(0, lost - others))
    return parts


def _longest_part(
    source: Source, head: tuple[Message, ...], exchanges: Sequence[tuple[Message, ...]], template: Template, policy: Policy
) -> tuple[Tokens | None, int]:
    """As many exchanges as fit, by bisection, and how many they are (at least one, cut if need be)."""
    best: Tokens | None = None
    low, high = 0, len(exchanges)
    while low < high:
        middle = (low + high + 1) // 2
        row = render_again(source, (*head, *flat(exchanges[:middle])), template, policy)
        if row is not None and len(row.ids) <= policy.max_length:
            best, low = row, middle
        else:
            high = middle - 1
    if low:
        return best, low
    alone = render_again(source, (*head, *exchanges[0]), template, policy)
    return (None if alone is None else truncate(alone, policy.max_length)), 1


def render_again(source: Source, messages: tuple[Message, ...], template: Template, policy: Policy) -> Tokens | None:
    """The labelled row of some of an example's messages."""
    rendered = render_example(replace(source.example, kind="chat", messages=messages), template)
    if isinstance(rendered, Problem):
        return None
    encoded = encode_text(rendered.text, template)
    return None if isinstance(encoded, DataError) else label_source(rendered, encoded, template, policy)


def exchanges_of(messages: Sequence[Message]) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """The system messages at the head, and the exchanges: a question with all that follows until the next question."""
    count = next((number for number, message in enumerate(messages) if message.role != "system"), len(messages))
    exchanges: list[list[Message]] = []
    for message in messages[count:]:
        if not exchanges or (message.role == "user" and exchanges[-1][-1].role != "user"):
            exchanges.append([])
        exchanges[-1].append(message)
    return tuple(messages[:count]), [tuple(exchange) for exchange in exchanges]


def flat(exchanges: Iterable[tuple[Message, ...]]) -> Iterator[Message]:
    for exchange in exchanges:
        yield from exchange


def _windows(row: Tokens, template: Template, policy: Policy) -> list[Tokens]:
    """A document in consecutive windows; each begins with the beginning-of-sequence token where the tokenizer uses one."""
    begin = row.ids[:1] if template.adds_bos else []
    body = row.ids[len(begin) :]
    size = policy.max_length - len(begin)
    windows = []
    for number, start in enumerate(range(0, len(body), size)):
        ids = begin + body[start : start + size]
        windows.append(Tokens(ids, list(ids), (Span(0, len(ids), "supervised"),), row.place, part=number))
    if template.eos_id is not None:
        last = windows[-1]
        end = len(last.ids)
        spans = (*((Span(0, end - 1, "supervised"),) if end > 1 else ()), Span(end - 1, end, "end"))
        windows[-1] = replace(last, spans=spans)
    return windows


# Audits before training --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """Something to know before training that does not forbid it."""

    code: str
    message: str


def audit(rows: TokenizeStats | Iterable[Tokens], template: Template, *, labelled: bool = True) -> list[AuditFinding]:
    """Check a tokenized set against the silent failures of fine-tuning. Raises DataError for what would waste the run.

    `labelled` False: rows are prompts alone, which have no label to be checked.
    """
    stats = rows if isinstance(rows, TokenizeStats) else _stats_of(rows, template)
    if labelled:
        _refuse_fatal(stats, template)
    _refuse_doubled_bos(stats, template)
    findings = [AuditFinding("TEMPLATE_NOTE", note) for note in template.notes]
    if stats.dropped:
        reasons = ", ".join(f"{code} {count:,}" for code, count in stats.problems.most_common())
        findings.append(
            AuditFinding("ROWS_DROPPED", f"{stats.dropped:,} of {many(stats.examples, 'example')} left out ({reasons}).")
        )
    if stats.lost_answer_tokens:
        share = stats.lost_answer_tokens / (stats.supervised + stats.lost_answer_tokens)
        findings.append(
            AuditFinding(
                "ANSWERS_CUT",
                f"{many(stats.cut, 'row')} cut, {many(stats.lost_answer_tokens, 'answer token')} ({share:.1%}) lost.",
            )
        )
    if stats.unlocated_turns:
        findings.append(
            AuditFinding(
                "TURNS_UNLOCATED",
                f"{many(stats.unlocated_turns, 'assistant turn')} empty or not to be found: masked, so not learned.",
            )
        )
    return findings


def _stats_of(rows: Iterable[Tokens], template: Template) -> TokenizeStats:
    stats = TokenizeStats()
    for row in rows:
        stats.examples += 1
        stats.rows += 1
        stats.chats += any(span.message is not None for span in row.spans)
        stats._count_tokens(row, template.bos_id)
    return stats


def _refuse_fatal(stats: TokenizeStats, template: Template) -> None:
    if stats.supervised == 0:
        raise DataError(
            "TRAINING_NO_SUPERVISED_TOKENS",
            f"None of {many(stats.examples, 'example')} has a token that would enter the loss; the loss would read 0 and nothing would be learned.",
            remedy="Check that the data has assistant turns, raise max_length, or look at one row with `ftf data preview`.",
            context={"problems": dict(stats.problems)},
        )
    if stats.chats and stats.turn_ends == 0:
        raise DataError(
            "TRAINING_NO_TURN_END",
            f"No label of {many(stats.rows, 'row')} holds the end of a turn, so the model would not learn to stop.",
            where=f"template {template.name!r}",
            remedy="Choose a template that ends answers (chatml, plain, …), a tokenizer with an end-of-sequence token, or raise max_length.",
        )


def _refuse_doubled_bos(stats: TokenizeStats, template: Template) -> None:
    if stats.doubled_bos:
        raise DataError(
            "TRAINING_DOUBLED_BOS",
            f"Two beginning-of-sequence tokens stand at the start of {many(stats.doubled_bos, 'row')}.",
            where=f"template {template.name!r}",
            remedy="Remove bos_token from the template's beginning, or from the tokenizer's post-processor.",
        )
