"""The check of every export: load what was written and see that it answers as the trained model does.

Two models are compared on the same token sequences (a few prompts, each followed by the trained model's greedy
answer): logits at every position, the token each would choose, and the text each writes by itself.

The rule. Let r be the root mean square of the trained model's logits around their mean, position by position,
and e that of the difference, both over all positions; "error" is e / r. An export passes when

1. every logit is finite and the error is at most the tolerance of its number type. An unchanged copy and a
   32-bit merge may differ by summation order alone: 1e-4. A 16-bit merge rounds every weight once, by at most u
   (2^-8 for bfloat16, 2^-11 for float16). Errors of n independent roundings grow with sqrt(n), not n (Higham and
   Mary, SIAM J. Sci. Comput. 41(5), 2019): 2 u sqrt(n), n the number of weight matrices;
2. the error is at most half of the adapter's own effect (base against base + adapter), if that can be told:
   weights rounded so coarsely that the training is lost are no export of it;
3. wherever the trained model is decided (its best token leads by more than 8 tolerances) both choose the same token;
4. the greedy texts agree, or part where the trained model was not decided.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from finetuneflow.data.examples import Message
from finetuneflow.errors import ExportError
from finetuneflow.knowledge.situation import many

Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # how merged weights are stored; "auto": as the base's own files
EXACT_TOLERANCE = 1e-4
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
DECIDED_BY = 8.0
NEW_TOKENS = 24
PROMPT_TOKENS = 128
QUESTIONS = ("What is the capital of France?", "Explique en une phrase ce qu'est un nombre premier.", "List three colours.")
TEXTS = ("The capital of France is", "Il était une fois", "Water boils at")
SMALLEST_EFFECT = 1e-6  # below it an adapter does nothing that 32-bit arithmetic could tell


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model said: per prompt its greedy continuation and the logits (length, vocabulary) of a given sequence."""

    greedy: tuple[tuple[int, ...], ...]
    logits: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome, for manifest, card and terminal. Errors are relative (see the module text).

    Of a reward model scores are compared (`of_scores`): `prompts` are conversations, and `argmax_agreement` is the share of pairs
    that both put into the same order.
    """

    passed: bool
    compared: str
    prompts: int
    positions: int
    max_abs_diff: float
    error: float
    tolerance: float
    adapter_effect: float | None
    argmax_agreement: float
    same_texts: int
    problems: tuple[str, ...] = ()
    of_scores: bool = False

    @property
    def agreement(self) -> str:
        """How well both agree, in words."""
        what = (
            f"{many(self.prompts, 'conversation')} scored, {self.argmax_agreement:.1%} of their pairs in the same order, largest score"
            if self.of_scores
            else f"{self.same_texts} of {many(self.prompts, 'greedy text')} the same, the best token too at {self.argmax_agreement:.1%} of "
            f"{many(self.positions, 'position')}, largest logit"
        )
        return f"{what} difference {self.max_abs_diff:.2g} (relative error {self.error:.2g}, allowed {self.tolerance:.2g})"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def tolerance_for(dtypes: Iterable[str], num_matrices: int) -> float:
    """The largest error allowed where weights were rounded to, or computed in, `dtypes` ("float32", "bfloat16", "float16")."""
    roundoff = max((UNIT_ROUNDOFF[dtype] for dtype in dtypes if dtype in UNIT_ROUNDOFF), default=0.0)
    return max(EXACT_TOLERANCE, 2.0 * roundoff * math.sqrt(num_matrices))


# --- prompts ---------------------------------------------------------------------------------------


def check_prompts(tokenizer: Any, template: Any | None, run_dir: Path) -> list[list[int]]:
    """Token ids of a few prompts as the model meets them: through its chat template, two of them from the held-out data."""
    held_out = _held_out_rows(run_dir / "data/eval.jsonl", limit=2)
    if template is None:
        texts = [*TEXTS, *(row["text"] for row in held_out if isinstance(row.get("text"), str))]
        prompts = [list(tokenizer(text)["input_ids"]) for text in texts]
    else:
        conversations = [[Message("user", question)] for question in QUESTIONS]
        conversations += [turns for row in held_out if (turns := _question_of(row))]
        prompts = [template.prompt_ids(turns) for turns in conversations]
    return [ids[-PROMPT_TOKENS:] for ids in prompts if ids]


def _question_of(row: dict[str, Any]) -> list[Message]:
    """The turns before the last answer of a plain conversation; [] for anything with tools or other extras."""
    turns = row.get("messages")
    if not isinstance(turns, list) or len(turns) < 2:
        return []
    plain = all(
        isinstance(t, dict) and t.get("role") in ("system", "user", "assistant") and isinstance(t.get("content"), str)
        for t in turns
    )
    if not plain or turns[-1]["role"] != "assistant" or turns[-2]["role"] != "user":
        return []
    return [Message(turn["role"], turn["content"]) for turn in turns[:-1]]


def _held_out_rows(path: Path, limit: int) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
            if len(rows) == limit:
                break
    return rows


# --- answers ---------------------------------------------------------------------------------------


def greedy_answers(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The greedy continuation of each prompt, without whatever sampling the model's own settings ask for."""
    import torch
    from transformers import GenerationConfig

    settings: Any = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None)  # type: ignore[no-untyped-call]
    found = []
    with torch.no_grad(), _generating_by(model, settings):
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=model.device)
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            found.append(tuple(output[0, ids.shape[1] :].tolist()))
    return tuple(found)


@contextlib.contextmanager
def _generating_by(model: Any, settings: Any) -> Iterator[None]:
    """Put a model's own generation settings aside: `generate` would fill ours up with its repetition penalty and end tokens."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = owner.generation_config
    owner.generation_config = settings
    try:
        yield
    finally:
        owner.generation_config = before


def sequence_logits(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[Any, ...]:
    """Logits of each sequence as fp32 on the CPU, one sequence at a time (no padding that could matter)."""
    import torch

    found = []
    with torch.no_grad():
        for sequence in sequences:
            ids = torch.tensor([list(sequence)], device=model.device)
            found.append(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float().cpu())
    return tuple(found)


def sequences_of(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]


# --- judgement -------------------------------------------------------------------------------------


def judge(
    reference: Answers,
    candidate: Answers,
    prompts: Sequence[Sequence[int]],
    *,
    tolerance: float,
    compared: str,
    base_logits: Sequence[Any] | None = None,
) -> Check:
    """Apply the rule of the module text. `base_logits`: the base model alone on the same sequences, if it is known."""
    import torch

    expected, found = torch.cat(reference.logits), torch.cat(candidate.logits)
    scale = _rms(expected - expected.mean(-1, keepdim=True))
    difference = (found - expected).abs()
    error = _rms(difference) / max(scale, 1e-12)
    effect = None if base_logits is None else _rms(torch.cat(tuple(base_logits)) - expected) / max(scale, 1e-12)
    best, margin = expected.argmax(-1), _margins(expected)
    agree = found.argmax(-1) == best
    decided = margin > DECIDED_BY * tolerance * scale
    problems = _problems(found, error, tolerance, effect, int((decided & ~agree).sum()))
    partings = _partings(reference, candidate, prompts, DECIDED_BY * tolerance * scale)
    problems += [
        f"the greedy answer to prompt {index + 1} differs where the trained model is certain" for index, ok in partings if not ok
    ]
    return Check(
        passed=not problems,
        compared=compared,
        prompts=len(prompts),
        positions=expected.shape[0],
        max_abs_diff=float(difference.max()),
        error=error,
        tolerance=tolerance,
        adapter_effect=effect,
        argmax_agreement=float(agree.float().mean()),
        same_texts=len(prompts) - len(partings),
        problems=tuple(problems),
    )


def _rms(values: Any) -> float:
    return float(values.double().pow(2).mean().sqrt())


def _margins(logits: Any) -> Any:
    """By how much the best token of each position leads the second."""
    top = logits.topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def _problems(found: Any, error: float, tolerance: float, effect: float | None, wrong: int) -> list[str]:
    problems = []
    if not bool(found.isfinite().all()):
        return ["it computes values that are not finite"]
    if error > tolerance:
        problems.append(f"its logits are off by {error:.2g} of their spread; {tolerance:.2g} is allowed")
    if effect is not None and error > max(0.5 * effect, SMALLEST_EFFECT):
        problems.append(f"its error {error:.2g} is more than half of what training changed ({effect:.2g})")
    if wrong:
        problems.append(f"it chooses another token at {many(wrong, 'position')} where the trained model is certain")
    return problems


def _partings(
    reference: Answers, candidate: Answers, prompts: Sequence[Sequence[int]], least_margin: float
) -> list[tuple[int, bool]]:
    """(prompt, excused) for each pair of greedy answers that part; excused where the trained model was undecided."""
    found = []
    for index, (ours, theirs) in enumerate(zip(reference.greedy, candidate.greedy, strict=True)):
        if ours == theirs:
            continue
        split = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        position = len(prompts[index]) + split - 1  # the logits here choose the token after it
        margin = float(_margins(reference.logits[index][position : position + 1])[0])
        found.append((index, margin <= least_margin))
    return found


def require_passed(check: Check) -> Check:
    """The check, or `EXPORT_CHECK_FAILED` with its numbers."""
    if check.passed:
        return check
    raise ExportError(
        "EXPORT_CHECK_FAILED",
        f"The export was refused: {check.compared} do not agree. Loaded again, " + "; ".join(check.problems) + ".",
        remedy="Nothing was left in place. Try again; if it repeats, export the adapter, or merge with a wider number type (--dtype float32).",
        context=check.to_dict(),
    )
