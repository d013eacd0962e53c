"""Which option of a plan to take, and for each the reason why it was taken or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetuneflow.knowledge.plan import Option
from finetuneflow.knowledge.values import GB
from finetuneflow.knowledge.variants import Asked

# Which of the options that fit is chosen, first to last. Adapters on all layers are the best supported by research; 16-bit
# weights before 4-bit ones, which cost time; DoRA costs time and full fine-tuning memory, for gains that this data may not show.
ORDER = ("lora-all-linear", "lora", "qlora-r64", "qlora", "dora", "full", "full-8bit", "ia3", "prefix")
# Of two variants of one method, the slower is passed over where it takes this many times as long.
TOO_SLOW = 1.25
LONG_HOURS = 7 * 24
# With a million examples, or plain text by the million, an adapter fills up (arXiv:2405.09673: continued pre-training).
FULL_FIRST = ("full", "full-8bit", *ORDER[:5], "ia3", "prefix")


# What speaks against each method where another fits as well.
PASSED_OVER = {
    "full": "it forgets more, and every checkpoint is a whole model.",
    "lora": "another adapter is better supported by research, or the one you set.",
    "dora": "its gains over LoRA are measured at low ranks most of all.",
    "qlora": "4-bit weights are unpacked at every step, and memory does not ask for them.",
    "ia3": "it holds less than the choice.",
    "prefix": "it holds less than the choice.",
}


def choose(asked: Asked, found: Sequence[Option]) -> tuple[str | None, tuple[Option, ...]]:
    """The name of the best option, and all options with the reason why they were chosen or not."""
    wanted = asked.config.method.kind if "method.kind" in asked.kept else None
    much = asked.config.training.objective == "pretrain" or (asked.data is not None and asked.data.examples >= 1_000_000)
    order = FULL_FIRST if much else ORDER

    usable = [option for option in found if option.fits and option.startable]

    def rank(option: Option) -> tuple[Any, ...]:
        own = option.method != wanted, option.name != wanted
        room = option.shortened, option.verdict != "fits"
        hours = [o.hours for o in usable if o.method == option.method and (o.shortened, o.verdict != "fits") == room and o.hours]
        slow = option.hours is not None and option.hours > TOO_SLOW * min(hours, default=option.hours)
        return (*own, *room, slow, order.index(option.name.removesuffix(f"-{option.strategy}")))

    best = min(usable, key=rank, default=None)
    return (best.name if best else None), tuple(replace(option, reason=_reason(option, best, wanted, much)) for option in found)


def _reason(option: Option, best: Option | None, wanted: str | None, much: bool) -> str:
    if not option.fits:
        return _why_not(option)
    if best is None or not option.startable:
        return "Fits, but the engine does not start runs over several devices by itself yet."
    if option.name == best.name:
        tight = f" It is {_tight(option)}." if option.verdict == "tight" else ""
        cut = " The length had to be lowered." if option.shortened else ""
        hours = option.hours or 0.0
        days = f" It takes some {hours / 24:.0f} days: think of a smaller model." if hours > LONG_HOURS else ""
        return f"Chosen: {_why_best(option, wanted, much)}{cut}{tight}{days}"
    if option.shortened and not best.shortened:
        return f"Fits only with examples cut at {option.settings['data.max_length']:,} tokens."
    if option.verdict == "tight" and best.verdict == "fits":
        return f"Fits, but {_tight(option)}; the choice leaves more room."
    return f"Fits, not chosen: {PASSED_OVER[option.method]} {_compared(option, best)}"


def _why_best(option: Option, wanted: str | None, much: bool) -> str:
    if option.method == wanted:
        return "the method you set fits."
    if option.method == "full":
        return "with this much data an adapter would fill up." if much else "no adapter can be used here."
    if option.method == "qlora":
        return "4-bit weights leave room where unquantised ones would not."
    if option.name.startswith("lora-all-linear"):
        return "unquantised weights fit, and adapters on all layers are the best supported by research."
    return "unquantised weights fit; it is the plainest adapter that does."


def _tight(option: Option) -> str:
    paged = option.breakdown.get("optimizer_paged", 0) / GB
    if paged < 1:
        return "close to the limit"
    return f"close to the limit: up to {paged:.0f} GB of optimizer states may move to main memory and back, which the time leaves out"


def _compared(option: Option, best: Option) -> str:
    parts = []
    if option.hours is not None and best.hours:
        ratio = option.hours / best.hours
        parts.append("As fast as the choice" if 0.99 < ratio < 1.01 else f"{ratio:.2g} times the hours of the choice")
    parts.append(f"{option.memory_gb - best.memory_gb:+.1f} GB")
    return ", ".join(parts) + "."


def _why_not(option: Option) -> str:
    largest = sorted(option.breakdown.items(), key=lambda item: -item[1])[:2]
    parts = ", ".join(f"{name.replace('_', ' ')} {size / GB:.1f}" for name, size in largest)
    return f"Does not fit: {option.memory_gb:.1f} GB at the least ({parts})."
