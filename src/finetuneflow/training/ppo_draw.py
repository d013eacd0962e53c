"""Answers that a policy draws, each from a random stream of its own.

What is drawn does not depend on what is drawn beside it, so batches may be cut as memory allows, and a resumed run draws the
same. Unlike `Generator.generate`, this keeps the tokens that end an answer: they are learned too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetuneflow.errors import EvaluationError
from finetuneflow.inference import Decoding, Ending, Generator, SeededSampling, StopAt, decode, left_padded, plain_defaults
from finetuneflow.training.ppo_actors import Actors


@dataclass(frozen=True, slots=True)
class DrawnAnswer:
    """One answer: its tokens with those that end it, its text without them, and whether it ended by itself."""

    ids: list[int]
    text: str
    ended: bool


def draw(
    generator: Generator,
    actors: Actors,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[Any],
    decoding: Decoding,
    *,
    together: int,
) -> list[DrawnAnswer]:
    """An answer to each prompt (token ids), its tokens drawn from a random stream of its own that `decoding.seed` and its key name."""
    found: dict[int, DrawnAnswer] = {}
    for batch in generator.plan_batches(prompts, decoding, batch_size=together):
        rows = _generate(generator, actors, [prompts[i] for i in batch], [keys[i] for i in batch], decoding)
        found.update(zip(batch, (through_end(generator.ending, row) for row in rows), strict=True))
    return [found[i] for i in range(len(prompts))]


def _generate(
    generator: Generator, actors: Actors, prompts: Sequence[Sequence[int]], keys: Sequence[Any], decoding: Decoding
) -> list[list[int]]:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    pad = generator.tokenizer.pad_token_id or 0
    ids, mask = left_padded(prompts, pad, device=actors.model.device)
    room = generator.context_length - ids.shape[1]
    if room < 1:
        raise EvaluationError(
            "PROMPT_TOO_LONG",
            f"A prompt has {ids.shape[1]:,} tokens; the model sees {generator.context_length:,} at most, answer included.",
            remedy="Set data.max_length so that prompt and reinforcement.max_new_tokens fit into the model's context.",
        )
    length = min(decoding.max_new_tokens, room)
    settings: Any = GenerationConfig(max_new_tokens=length, do_sample=False, use_cache=True, pad_token_id=pad)  # type: ignore[no-untyped-call]
    stop = StopAt(generator.ending, prompt_width=ids.shape[1])
    # Gradients are only switched off: tensors of inference mode that a model keeps (rotary tables) could not be trained through.
    with torch.no_grad(), actors.autocast(), plain_defaults(actors.model, settings):
        output = actors.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([SeededSampling(decoding, keys)]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )
    return output[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def through_end(ending: Ending, ids: Sequence[int]) -> DrawnAnswer:
    """An answer cut behind the tokens that end it; all of it where nothing does."""
    kept, text, ended = ending.cut(ids)
    if not ended:
        return DrawnAnswer(list(ids), text.strip(), False)
    if len(kept) < len(ids) and ids[len(kept)] in ending.tokens:
        return DrawnAnswer(list(ids[: len(kept) + 1]), text.strip(), True)
    end = next(n for n in range(len(kept), len(ids) + 1) if ending.text in decode(ending.tokenizer, ids[:n]))
    return DrawnAnswer(list(ids[:end]), text.strip(), True)
