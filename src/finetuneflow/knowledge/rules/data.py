"""Rules about the data, the loss, lengths and the held-out part. Each rule's page has the sources (`rules/CODE.md`)."""

from __future__ import annotations

import itertools
import math
from typing import Any

from finetuneflow.knowledge.objectives import takes_fast_path
from finetuneflow.knowledge.shapes.shape import ModelShape
from finetuneflow.knowledge.situation import Hit, Situation, many, percent, rule
from finetuneflow.knowledge.values import DataFacts

TRUNCATED_SHARE = 0.05
PADDING_SHARE = 0.4
DUPLICATE_SHARE = 0.1
FEW_EXAMPLES, FEW_HELD_OUT = 50, 20
# Learned tables of positions: a longer row has no entry, and the run stops with an index error.
LEARNED_POSITIONS = ("gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt", "openai-gpt")


@rule("NO_TRAINING_DATA", "error", "No training data named")
def no_training_data(s: Situation) -> Hit | None:
    if s.config.data.train:
        return None
    return Hit("data.train", "empty", "There is nothing to train on: name at least one file, e.g. `--set data.train=my.jsonl`.")


# --- what enters the loss -----------------------------------------------------------------------------


@rule("LOSS_ON_PROMPT", "warning", "Prompts in the loss")
def loss_on_prompt(s: Situation) -> Hit | None:
    config = s.config
    if config.data.supervise != "all" or config.training.objective != "sft" or (s.data and s.data.kinds == ("text",)):
        return None
    share = s.data.supervised_share if s.data else None
    found = "supervise: all" + (f", {percent(1 - share)} of the tokens are prompts" if share is not None else "")
    cost = f"{percent(1 - share)} of what is learned" if share is not None else "A part of what is learned"
    return Hit(
        "data.supervise",
        found,
        f"{cost} is to write users' questions and templates, which nobody will ask of the model. With `assistant` the loss is "
        "taken over answers and their end tokens.",
        {"data.supervise": "assistant"},
        safe=True,
    )


@rule("PRETRAIN_ON_CHAT", "warning", "Continued pre-training on conversations")
def pretrain_on_chat(s: Situation, data: DataFacts) -> Hit | None:
    if s.config.training.objective != "pretrain" or "chat" not in data.kinds:
        return None
    share = f", {percent(1 - data.supervised_share)} of which are prompts" if data.supervised_share is not None else ""
    return Hit(
        "training.objective",
        "pretrain on conversations",
        f"Every token is learned, questions too: {data.mean_tokens:.0f} tokens per example{share}. For answers, use sft.",
        {"training.objective": "sft"},
    )


@rule("SFT_ON_TEXT", "advice", "Supervised tuning on plain text")
def sft_on_text(s: Situation, data: DataFacts) -> Hit | None:
    if s.config.training.objective != "sft" or data.kinds != ("text",) or data.hand_formatted:
        return None
    return Hit(
        "training.objective",
        f"sft on {data.examples:,} texts without questions and answers",
        "Every token is learned either way, but text teaches style and content, not answering. `pretrain` says what is done; "
        "to teach answering, give pairs of question and answer.",
        {"training.objective": "pretrain"},
    )


@rule("HAND_FORMATTED_DATA", "warning", "Data that already holds a chat format as text")
def hand_formatted_data(s: Situation, data: DataFacts) -> Hit | None:
    if not data.hand_formatted or s.config.training.objective != "sft":
        return None
    if data.kinds == ("text",):
        what = "Rows are whole texts, so prompts are in the loss too and the model's own template is never seen."
    else:
        what = "The template is written around it a second time, and the marks inside stay ordinary text."
    return Hit(
        "data.train",
        f"{data.hand_formatted} format in most of {data.examples:,} rows",
        f"{what} Give bare fields (question, answer, or messages); the template is added by the tool.",
    )


# --- lengths ------------------------------------------------------------------------------------------


@rule("ANSWERS_TRUNCATED", "warning", "Examples longer than the length limit")
def answers_truncated(s: Situation, data: DataFacts) -> Hit | None:
    config, limit = s.config.data, s.config.data.max_length
    share = data.share_above(limit)
    if share is None or share < TRUNCATED_SHARE or (config.overlong == "split" and s.traits.form == "supervised"):
        return None
    if s.traits.draws:
        return None  # a prompt loses its oldest exchanges, not its question
    if s.config.training.objective == "pretrain":
        return Hit(
            "data.overlong",
            f"{percent(share)} of the texts are longer than {limit:,} tokens",
            f"With overlong: {config.overlong} {percent(_lost(data, limit))} of all tokens are never learned; split makes windows.",
            {"data.overlong": "split"},
            safe=True,
        )
    wanted = min(-(-data.length_percentiles[99] // 64) * 64, 1_048_576)
    fix: dict[str, Any] = {"data.max_length": wanted}
    possible = (s.positions is None or wanted <= s.positions) and s.still_fits(fix)
    if config.overlong == "cut":
        what = f"Their answers lose the end, and with it the token that ends the turn: {percent(_lost(data, limit))} of all tokens are cut"
    else:
        what = f"They are dropped: about {share * data.examples:,.0f} examples are never trained on"
    way = f"{wanted:,} tokens hold 99 % of the examples"
    if not possible:
        way += ", but that is more than the model or the memory allows: shorten the examples"
        fix = {}
    return Hit(
        "data.max_length",
        f"{percent(share)} of the examples are longer than {limit:,} tokens",
        f"{what}. {way}.",
        fix,
        safe=bool(fix) and s.memory_with(fix) is not None,
    )


def _lost(data: DataFacts, limit: int) -> float:
    whole = data.mean_tokens_cut(10**9)
    return 1 - data.mean_tokens_cut(limit) / whole if whole else 0.0


def _longest_row(s: Situation) -> int | None:
    """Tokens of the longest row there will be; None where only the default limit is known."""
    limit = s.config.data.max_length
    if s.data is not None and s.data.length_percentiles:
        return min(limit, s.data.length_percentiles[-1])
    return limit if s.chosen("data.max_length") else None


@rule("LENGTH_BEYOND_CONTEXT", "warning", "Rows longer than the model's context")
def length_beyond_context(s: Situation, positions: int) -> Hit | None:
    longest = _longest_row(s)
    if longest is None or longest <= positions or _model_type(s) in LEARNED_POSITIONS:
        return None
    return Hit(
        "data.max_length",
        f"rows of {longest:,} tokens, context of {positions:,}",
        f"Positions above {positions:,} were never seen in pre-training: {many(longest - positions, 'token')} beyond it would train on "
        "noise unless the model's rotary embedding is rescaled.",
        {"data.max_length": positions} if positions >= 8 else {},
    )


@rule("POSITIONS_RUN_OUT", "error", "Rows longer than the model's table of positions")
def positions_run_out(s: Situation, positions: int) -> Hit | None:
    longest = _longest_row(s) or s.config.data.max_length
    if longest <= positions or _model_type(s) not in LEARNED_POSITIONS:
        return None
    return Hit(
        "data.max_length",
        f"rows of up to {longest:,} tokens, {positions:,} positions",
        f"{_model_type(s)} looks positions up in a table of {positions:,} rows; the first longer example stops the run with "
        "an index error.",
        {"data.max_length": positions} if positions >= 8 else {},
        safe=positions >= 8,
    )


def _model_type(s: Situation) -> str | None:
    return s.shape.model_type if s.shape else s.model.model_type if s.model else None


@rule("PADDING_WASTE", "advice", "Much of each batch is padding")
def padding_waste(s: Situation, data: DataFacts) -> Hit | None:
    training = s.config.training
    if (
        s.traits.draws
        or takes_fast_path(s.config)  # rows are packed, or meet others of like length
        or training.group_by_length
        or training.batch_size == 1
        or not data.length_percentiles
        or data.examples < 16 * s.batch
    ):
        return None
    waste = padding_share(data, training.batch_size, s.config.data.max_length)
    if waste < PADDING_SHARE:
        return None
    return Hit(
        "training.group_by_length",
        f"false, lengths from {data.length_percentiles[5]:,} to {data.length_percentiles[95]:,} tokens",
        f"In random groups of {training.batch_size}, rows are padded to the longest: about {percent(waste)} of the computed "
        "tokens are padding. Rows of like length in one step avoid most of it.",
        {"training.group_by_length": True},
        safe=True,
    )


def padding_share(data: DataFacts, batch_size: int, max_length: int) -> float:
    """Share of padding when rows are drawn at random: 1 - mean / expected longest of a batch."""
    lengths = [min(length, max_length) for length in data.length_percentiles]
    steps = len(lengths) - 1
    longest = sum(
        (((i + 1) / steps) ** batch_size - (i / steps) ** batch_size) * (lengths[i] + lengths[i + 1]) / 2 for i in range(steps)
    )
    mean = sum((a + b) / 2 for a, b in itertools.pairwise(lengths)) / steps
    return 1 - mean / longest if longest > 0 else 0.0


# --- quality ------------------------------------------------------------------------------------------


@rule("DUPLICATE_EXAMPLES", "warning", "Many examples occur more than once")
def duplicate_examples(s: Situation, data: DataFacts) -> Hit | None:
    share = data.duplicate_share
    if share is None or share < DUPLICATE_SHARE:
        return None
    passes = s.passes or s.config.training.epochs
    return Hit(
        "data.train",
        f"{percent(share)} of {data.examples:,} examples are copies",
        f"Copies are learned by heart first: what stands there twice is seen {2 * passes:.3g} times in {passes:.3g} passes. Remove "
        "them from the file (`ftf data check` counts near copies too).",
    )


@rule("FEW_EXAMPLES", "warning", "Too few examples to tune on")
def few_examples(s: Situation, data: DataFacts) -> Hit | None:
    if data.examples >= FEW_EXAMPLES:
        return None
    best = {"pair": "chosen answers", "rated": "answers"}.get(data.form, "of them")
    what = "Write" if data.form == "prompt" else f"Put the best {best} into the prompt instead, or write"
    return Hit(
        "data.train",
        many(data.examples, data.noun),
        f"Below {FEW_EXAMPLES} {data.noun}s a model mostly learns their wording. {what} more: improvements usually show from 50 to 100 on.",
    )


# --- the held-out part --------------------------------------------------------------------------------


@rule("EVAL_MISSING", "warning", "Nothing held out to measure on")
def eval_missing(s: Situation) -> Hit | None:
    if s.evaluates:
        return None
    held_out = f" 10 % are {min(s.data.examples // 10, s.config.data.eval_limit):,} examples." if s.data else ""
    return Hit(
        "data.eval_fraction",
        "0, and no data.eval",
        f"The training loss falls whether the model learns or recites; nothing is left to tell the two apart.{held_out}",
        {"data.eval_fraction": 0.1},
    )


@rule("EVAL_SAME_FILE", "error", "The same file for training and evaluation")
def eval_same_file(s: Situation) -> Hit | None:
    data = s.config.data
    shared = [path for path in data.eval if path in data.train]
    if not shared:
        return None
    kept = [path for path in data.eval if path not in shared]
    fix: dict[str, Any] = {"data.eval": kept}
    if not kept and data.eval_fraction == 0:
        fix["data.eval_fraction"] = 0.1
    return Hit(
        "data.eval",
        ", ".join(shared),
        f"Trained on: {len(shared)} of {many(len(data.eval), 'evaluation file')}. The evaluation loss measures memory, and load_best "
        "and patience pick the most overfitted weights. Left empty, a clean share is held out.",
        fix,
        safe=True,
    )


@rule("EVAL_OVERLAPS_TRAINING", "warning", "Evaluation examples that are trained on")
def eval_overlaps_training(s: Situation, data: DataFacts) -> Hit | None:
    if not data.eval_overlap or not s.config.data.eval or set(s.config.data.eval) & set(s.config.data.train):
        return None
    of = f" of {data.eval_examples:,}" if data.eval_examples else ""
    return Hit(
        "data.eval",
        f"{data.eval_overlap:,}{of} evaluation examples are in the training data",
        "Their answers are known by heart, so the evaluation looks too good and picks overfitted weights. Remove them from one "
        "side, or leave data.eval empty: duplicates then never straddle the split.",
        {"data.eval": [], "data.eval_fraction": s.config.data.eval_fraction or 0.1},
    )


@rule("EVAL_TOO_SMALL", "advice", "Too few held-out examples to compare runs")
def eval_too_small(s: Situation, data: DataFacts) -> Hit | None:
    held_out = data.eval_examples
    if held_out is None or not 0 < held_out < FEW_HELD_OUT:
        return None
    total = data.examples + held_out
    fix: dict[str, Any] = {}
    fraction = min(0.5, math.ceil(200 * FEW_HELD_OUT / total) / 100)
    if not s.config.data.eval and total >= 4 * FEW_HELD_OUT and fraction > s.config.data.eval_fraction:
        fix = {"data.eval_fraction": fraction}
    return Hit(
        "data.eval" if s.config.data.eval else "data.eval_fraction",
        many(held_out, f"held-out {data.noun}"),
        f"The error of a mean falls with the square root of their number: {math.sqrt(1000 / held_out):.0f} times that of 1,000 "
        f"examples. Below {FEW_HELD_OUT} a single example decides which weights are best.",
        fix,
    )


@rule("VOCABULARY_BEYOND_EMBEDDING", "error", "A tokenizer with more tokens than the model has embeddings")
def vocabulary_beyond_embedding(s: Situation, shape: ModelShape) -> Hit | None:
    size = s.model.vocabulary_size if s.model else None
    if size is None or shape.certainty == "typical" or size <= shape.vocab:
        return None
    return Hit(
        "model.base",
        f"{size:,} tokens, {shape.vocab:,} embeddings",
        f"No embedding for {many(size - shape.vocab, 'token')}: a row that holds one stops the run with an index error. The "
        "tokenizer belongs to another model, or tokens were added without resizing the model.",
    )
