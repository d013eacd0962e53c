"""A reward model as a package: its adapter, or base and adapter as one sequence-classification model, loaded again and compared.

The check is that of `verify.py` on scores: the same conversations are scored by the run's own model and by what was written; their
error is relative to the spread of the scores, and no pair of held-out answers may change its order.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetuneflow.export.adapter import CONFIG, WEIGHTS
from finetuneflow.export.package import DOCUMENT_BYTES, copy_tokenizer, folder_bytes
from finetuneflow.export.record import RunRecord, require_weights
from finetuneflow.export.redact import Redactor
from finetuneflow.export.trained import base_weights, release_memory
from finetuneflow.export.verify import EXACT_TOLERANCE, QUESTIONS, Check, Dtype, tolerance_for
from finetuneflow.knowledge.situation import many
from finetuneflow.workspace import require_free_bytes, write_json

HELD_OUT_PAIRS = 8
ANSWERS = ("Paris.", "I do not know.")  # scored after each question: a run without held-out pairs is checked too


def build_scoring(record: RunRecord, stage: Path, redactor: Redactor, *, whole: bool, dtype: Dtype = "auto") -> Check:
    """Fill `stage` with a reward run's weights and tokenizer, and compare with the run's own scores."""
    from finetuneflow.evaluation.reward_model import load_reward_model

    source = require_weights(record)
    drawn = _conversations(record)
    copy_tokenizer(record, stage)
    expected = load_reward_model(record.run_dir)(drawn)
    release_memory()
    if not whole:
        found = _copy_adapter(record, source, stage, redactor, drawn)
        return _judge(expected, found, EXACT_TOLERANCE, "scores of base + trained adapter and base + exported adapter")
    stored = base_weights(record)[0] if dtype == "auto" else dtype
    matrices = _write_whole(record, source, stage, stored)
    found = load_reward_model(stage)(drawn)
    tolerance = tolerance_for((stored,), matrices) if record.config.method.is_adapter else EXACT_TOLERANCE
    return _judge(expected, found, tolerance, f"scores of the trained and of the written model ({stored})")


def _conversations(record: RunRecord) -> Any:
    """What is scored: held-out pairs, chosen and rejected in turn, then a few questions with two answers each."""
    from finetuneflow.data.examples import message_json
    from finetuneflow.evaluation.questions import read_examples
    from finetuneflow.evaluation.rewards import Drawn

    held_out = record.run_dir / "data" / "eval.jsonl"
    examples = read_examples([held_out])[0] if held_out.is_file() and held_out.stat().st_size else []
    pairs = [example for example in examples if example.kind == "preference"][:HELD_OUT_PAIRS]
    rows = [
        ([message_json(turn) for turn in (*pair.messages, *ending[:-1])], ending[-1].content)
        for pair in pairs
        for ending in (pair.chosen, pair.rejected)
    ]
    rows += [([{"role": "user", "content": question}], answer) for question in QUESTIONS for answer in ANSWERS]
    prompts, completions = zip(*rows, strict=True)
    names = [f"conversation {number}" for number in range(1, len(rows) + 1)]
    return Drawn(list(prompts), list(completions), [None] * len(rows), [()] * len(rows), names)


def _copy_adapter(record: RunRecord, source: Path, stage: Path, redactor: Redactor, drawn: Any) -> list[float]:
    from finetuneflow.evaluation.reward_model import load_reward_model
    from finetuneflow.models.adapters import check_adapter_dir

    require_free_bytes(stage, 2 * (source / WEIGHTS).stat().st_size + DOCUMENT_BYTES)
    shutil.copyfile(source / WEIGHTS, stage / WEIGHTS)
    base = redactor.text(record.config.model.base)
    write_json(stage / CONFIG, {**check_adapter_dir(source), "base_model_name_or_path": base})
    return load_reward_model(record.run_dir, adapter=stage)(drawn)


def _write_whole(record: RunRecord, source: Path, stage: Path, stored: str) -> int:
    """The model in one set of weights; returns the number of weight matrices."""
    import torch

    from finetuneflow.evaluation.reward_model import merged_scoring_model

    if not record.config.method.is_adapter:
        require_free_bytes(stage, folder_bytes(source) + DOCUMENT_BYTES)
        for path in source.iterdir():
            if path.suffix == ".safetensors" or path.name in ("config.json", "model.safetensors.index.json"):
                shutil.copyfile(path, stage / path.name)
        return 0
    model = merged_scoring_model(record.run_dir).to(getattr(torch, stored))
    model.save_pretrained(stage)
    matrices = sum(1 for parameter in model.parameters() if parameter.dim() >= 2)
    del model
    release_memory()
    return matrices


def _judge(expected: Sequence[float], found: Sequence[float], tolerance: float, compared: str) -> Check:
    """The rule of the module text."""
    count = len(expected)
    mean = sum(expected) / count
    spread = (sum((value - mean) ** 2 for value in expected) / count) ** 0.5
    differences = [abs(a - b) for a, b in zip(expected, found, strict=True)]
    error = (sum(d * d for d in differences) / count) ** 0.5 / max(spread, 1e-12)
    orders = [
        (expected[i] > expected[i + 1]) == (found[i] > found[i + 1])
        for i in range(0, count - 1, 2)
        if abs(expected[i] - expected[i + 1]) > 8 * tolerance * spread
    ]
    problems = (
        [f"its scores are off by {error:.2g} of their spread; {tolerance:.2g} is allowed"] if not error <= tolerance else []
    )
    problems += [f"it ranks {many(orders.count(False), 'pair')} the other way round"] if not all(orders) else []
    return Check(
        passed=not problems,
        compared=compared,
        prompts=count,
        positions=count,
        max_abs_diff=max(differences),
        error=error,
        tolerance=tolerance,
        adapter_effect=None,
        argmax_agreement=sum(orders) / len(orders) if orders else 1.0,
        same_texts=count,
        problems=tuple(problems),
        of_scores=True,
    )
