"""The values that knowledge is asked about: devices, a machine, a dataset's figures, facts about a base model.

Units: bytes, tokens, floating-point operations per second (dense, no sparsity), watts, US dollars per hour.
`None` means not known, and whoever uses it says what was assumed instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

DeviceKind = Literal["cuda", "rocm", "mps", "cpu"]
GB = 1_000_000_000


def many(number: float, noun: str) -> str:
    """1 token, 2,000 tokens."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or the processor: what memory, time and cost are computed for.

    `memory_bytes`: of the card, or main memory granted. `bandwidth`: bytes per second.
    `flops_bf16`, `flops_fp32`: dense matrix rate. `price_per_hour`: typical rent of one such device.
    """

    name: str
    kind: DeviceKind
    memory_bytes: int
    bandwidth: float | None = None
    flops_bf16: float | None = None
    flops_fp32: float | None = None
    power_watts: float | None = None
    price_per_hour: float | None = None
    bf16: bool | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run would take place. `devices` are all of one kind: the GPUs, or the processor alone.

    `observed`: the machine was looked at; otherwise somebody named it.
    `capacity_bytes` of main memory is in `host_memory_bytes`; `cores` may be a fraction (a container's quota).
    """

    devices: tuple[Device, ...]
    host_memory_bytes: int
    cores: float = 1.0
    bitsandbytes: bool = True
    observed: bool = True

    @property
    def device(self) -> Device:
        """The device a single process trains on."""
        return self.devices[0]

    @property
    def kind(self) -> DeviceKind:
        return self.devices[0].kind

    @property
    def device_count(self) -> int:
        return len(self.devices)


@dataclass(frozen=True, slots=True)
class DataFacts:
    """A dataset in figures, after templates and splits. Lengths are whole examples in tokens, before any cut.

    `length_percentiles`: 101 values, index p is the length that p % of the examples do not exceed.
    `counted`: lengths come from the run's own tokenizer; otherwise from characters, at a stated rate.
    `form`: what a row holds (`data.forms`). Of a pair, lengths are those of its longer side; of a prompt, without an answer.
    `both_tokens`: mean tokens of both sides of a pair together. `prompt_tokens`: mean tokens before the answer that is learned
    or compared; `answer_percentiles`: tokens of that answer, as `length_percentiles` (of a pair the chosen one; of a prompt
    the expected one). `length_ratio`: tokens of chosen answers over those of rejected ones. `good_share`: of rated answers.
    """

    examples: int
    eval_examples: int | None = None
    mean_tokens: float = 0.0
    length_percentiles: tuple[int, ...] = ()
    supervised_share: float | None = None
    counted: bool = False
    kinds: tuple[str, ...] = ()
    turns_mean: float | None = None
    duplicate_share: float | None = None
    eval_overlap: int | None = None
    rejected: int | None = None
    languages: dict[str, int] = field(default_factory=dict)
    hand_formatted: str | None = None
    form: str = "supervised"
    both_tokens: float | None = None
    prompt_tokens: float | None = None
    answer_percentiles: tuple[int, ...] = ()
    length_ratio: float | None = None
    good_share: float | None = None

    @property
    def noun(self) -> str:
        """What one of its examples is called."""
        return {"pair": "pair", "rated": "rated answer", "prompt": "prompt"}.get(self.form, "example")

    def share_above(self, num_tokens: int) -> float | None:
        """Share of examples longer than `num_tokens`, to the percent; None where lengths are not known."""
        if not self.length_percentiles:
            return None
        return sum(length > num_tokens for length in self.length_percentiles[1:]) / 100

    def mean_tokens_cut(self, num_tokens: int) -> float:
        """Mean tokens per example once longer ones are cut to `num_tokens`."""
        if not self.length_percentiles:
            return min(self.mean_tokens, num_tokens)
        middles = [(a + b) / 2 for a, b in zip(self.length_percentiles, self.length_percentiles[1:], strict=False)]
        return sum(min(length, num_tokens) for length in middles) / len(middles)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the small files of a base model say beyond its shape.

    `stored_dtype`: of the weights on disk; `quantized_as`: the method when they are stored quantised.
    `chat_template`: its source, or None. `vocabulary_size`: tokens the tokenizer knows.
    `licence`: identifier of the model card. `gated`: the hub asks for consent. `config`: the raw config.json.
    `fresh`: its weights are random, as `ftf model new` made them.
    """

    name: str
    model_type: str | None = None
    stored_dtype: str | None = None
    quantized_as: str | None = None
    chat_template: str | None = None
    vocabulary_size: int | None = None
    pad_token: str | None = None
    eos_token: str | None = None
    max_position: int | None = None
    licence: str | None = None
    gated: bool | None = None
    has_own_code: bool = False
    fresh: bool = False
    config: dict[str, Any] = field(default_factory=dict)
