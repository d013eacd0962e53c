"""Time, money and carbon of a run before it starts.

    estimate_cost      operations and bytes -> seconds -> price, energy, CO2
    efficiency_from    what share of a device's rate earlier runs on it reached

A micro-batch takes the longest of three times: its operations at a share of the device's dense peak, its bytes at the
memory's speed, and the calls that launch it, layer by layer; unpacking 4-bit weights comes on top. Each assumed
figure has a range, so does the result. `docs/time-and-cost.md` compares with published and documented times.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from finetuneflow.config import RunConfig
from finetuneflow.errors import ConfigError
from finetuneflow.knowledge.facts import (
    CARBON_SOURCE,
    ELECTRICITY,
    PUE_DATA_CENTRE,
    PUE_OWN,
    WORLD,
    carbon_intensity,
    cpu_device,
)
from finetuneflow.knowledge.flops import Flops, Traffic, flops_per_token, traffic
from finetuneflow.knowledge.memory import drawn_at_once, supervised_share
from finetuneflow.knowledge.memory_phases import weight_bytes
from finetuneflow.knowledge.objectives import Passes, passes_of, traits_of
from finetuneflow.knowledge.resolve import Resolved, resolve
from finetuneflow.knowledge.shapes.shape import ModelShape, kv_cache_bytes
from finetuneflow.knowledge.steps import Cutting, Steps, cutting_of, mean_width, row_lengths, steps_of
from finetuneflow.knowledge.values import DataFacts, Device, Machine

__all__ = [
    "Cost",
    "Efficiency",
    "Seconds",
    "Steps",
    "efficiency_from",
    "estimate_cost",
    "flops_per_token",
    "share_reached",
    "steps_of",
]


# --- assumptions ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Share of a device's dense peak that training reaches. `runs`: how many local runs it was learned from (0: assumed)."""

    low: float
    expected: float
    high: float
    runs: int
    source: str


# Published shares, operations of checkpointing included. A100: 0.44 in Llama 2's pre-training (1.84e5 hours for 2e12 tokens),
# 0.46 to 0.50 in LoRA tuning of 7B and 14B at 2,048 tokens, 0.30 of 1.8B (QwenLM/Qwen, README, "Profiling of Memory and
# Speed"). H100: 0.38 to 0.43 in Llama 3's pre-training (arXiv:2407.21783, table 4). An AMD card reaches less of its larger peak.
# Processors: measured on two cores of a Xeon with PyTorch 2.13, 135M and 0.4B, LoRA and full: 0.43 to 0.62 in fp32; with
# AMX, whose products are so fast that everything else takes the time, 0.08 to 0.28.
ASSUMED: dict[str, tuple[float, float, float]] = {
    "cuda": (0.28, 0.45, 0.55),
    "rocm": (0.15, 0.30, 0.45),
    "cpu": (0.25, 0.5, 0.75),
    "amx": (0.07, 0.2, 0.4),
}
FAST_CARD, FAST_SHARE = 500e12, 0.8  # memory and power keep faster cards further from their peak: H100 against A100 above
# Narrow matrices fill a device badly: with the 0.4th power of the width below 4,096 (0.46 -> 0.30 from 4,096 to 2,048 in the
# same table); plain cores are full from about 512 on, matrix units from 1,024.
FULL_WIDTH = {"cuda": 4096, "rocm": 4096, "cpu": 512, "amx": 1024}
WIDTH_POWER = 0.4
MATRIX_UNITS = 3  # a processor this many times faster in bf16 than in fp32 has units for it
BANDWIDTH_SHARE = {"cuda": 0.7, "rocm": 0.6, "cpu": 0.5}
# Seconds per layer and micro-batch that go into launching a forward and backward pass from Python, whatever its size. Measured:
# 4.7 to 5.2 ms with LoRA and checkpointing (same table, 256 tokens: 1.0 s for 8 micro-batches of 24 layers, 1.2 s of 32).
LAYER_SECONDS = 2.0e-3
LAYER_FACTORS = {"lora": 1.5, "qlora": 1.9, "dora": 2.2, "ia3": 1.3}
CHECKPOINT_FACTOR = 1.5
FORWARD_SHARE = 0.35  # of the above in a pass without gradients
STEP_SECONDS = 0.02  # optimizer, clipping, logging, and the trainer's own work
LAUNCH_RANGE = (0.5, 1.8)
START_SECONDS = 25.0  # imports, data, the first batch
DISK_BYTES_PER_SECOND = 0.7e9
GENERATION_SECONDS = 0.8e-3  # per layer and token: launching again; generation of one answer at a time never fills a device
# Gradients over the links: NVLink and the like, one machine's PCIe, a network of 200 Gbit/s; what a ring reaches.
FAST_LINK, PCIE_LINK, NETWORK_LINK = 150e9, 12e9, 20e9
HIDDEN_SHARE = 0.5
LINKED = re.compile(r"SXM|NVL|GH200|B200|B300|MI\d{3}|V100|P100")
GPUS_PER_MACHINE = 8
# Unknown cards: a middling one, and a range that says so.
UNKNOWN_HALF, UNKNOWN_FP32, UNKNOWN_BANDWIDTH, UNKNOWN_WATTS, UNKNOWN_FACTOR = 60e12, 20e12, 500e9, 250.0, 4.0
# Power over rated power while training (Strubell et al. 2019 and later measurements find 0.7 to 0.9), and the rest of the machine.
POWER_SHARE = 0.8
HOST_WATTS_PER_GPU = 75.0


# --- the estimate -----------------------------------------------------------------------------------


class Seconds(NamedTuple):
    low: float
    expected: float
    high: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run will take. `parts`: the expected seconds by what they go into.

    `bound`: what a micro-batch waits for: "operations", "memory" or "launching".

    `steps`: counts of steps, tokens, padding. `tokens`: real ones seen. `flops`: operations of training over all devices. `efficiency`: share of the dense peak reckoned with.
    `price_usd`: renting the devices for the expected time (None: no price known); `electricity_usd`: households' tariff.
    `co2_kg`: CO2 equivalents of the electricity.
    """

    steps: Steps
    tokens: int
    flops: float
    seconds: Seconds
    parts: dict[str, float]
    efficiency: float
    efficiency_source: str
    bound: str
    price_usd: float | None
    electricity_usd: float
    energy_kwh: float
    co2_kg: float
    notes: tuple[str, ...] = ()

    @property
    def hours(self) -> float:
        return self.seconds.expected / 3600

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": self.seconds._asdict(), "hours": self.hours, "notes": list(self.notes)}


def estimate_cost(
    shape: ModelShape,
    config: RunConfig,
    machine: Machine,
    data: DataFacts,
    resolved: Resolved | None = None,
    *,
    efficiency: Efficiency | float | None = None,
    country: str | None = None,
    price_per_hour: float | None = None,
) -> Cost:
    """Time, price, energy and CO2 of the run that `config` describes, on all devices of `machine` side by side.

    `efficiency` comes from `efficiency_from`, or is a share that the caller vouches for; without it published figures are assumed. `price_per_hour`: of one device,
    US dollars. Says nothing about memory. Raises `ConfigError` for a country that is not in the table.
    """
    carbon = carbon_intensity(country)
    resolved = resolved or resolve(config, machine)
    device, notes = _computing_device(machine, resolved)
    devices = machine.device_count if resolved.device != "cpu" else 1
    cutting = cutting_of(shape, config, resolved.device, data)
    counts = steps_of(config, data, devices, cutting=cutting)
    if efficiency is None:
        efficiency = assumed_efficiency(device, shape, resolved.compute_dtype)
    elif not isinstance(efficiency, Efficiency):
        efficiency = _given(efficiency)
    known = _rate(device, resolved) is not None
    scored = supervised_share(config, data) if cutting is not None else 1.0
    flops = flops_per_token(
        shape, config, resolved, counts.row_width, scored=scored, packed=cutting is not None and cutting.packed
    )
    moved = traffic(shape, config, resolved, scored=scored)
    load = _Load(shape, config, resolved, device, devices, counts, flops, moved, cutting)
    expected = _seconds(load, data, efficiency.expected, 1.0)
    low = sum(_seconds(load, data, efficiency.high, LAUNCH_RANGE[0]).values())
    high = sum(_seconds(load, data, efficiency.low, LAUNCH_RANGE[1]).values())
    if not known:
        notes = (
            *notes,
            f"The rates of {device.name} are not known: those of a middling card are assumed, a factor of 4 either way.",
        )
        low, high = low / UNKNOWN_FACTOR, high * UNKNOWN_FACTOR
    total = sum(expected.values())
    hours = total / 3600
    pue = PUE_OWN if machine.observed else PUE_DATA_CENTRE
    energy = _watts(device, resolved) * devices * hours / 1000 * pue
    price = price_per_hour if price_per_hour is not None else device.price_per_hour
    tariff = ELECTRICITY.get(carbon.country, ELECTRICITY[WORLD])
    return Cost(
        steps=counts,
        tokens=counts.tokens_seen,
        flops=_operations(load),
        seconds=Seconds(low, total, high),
        parts={name: value for name, value in expected.items() if value},
        efficiency=efficiency.expected,
        efficiency_source=efficiency.source,
        bound=_bound(load, efficiency.expected),
        price_usd=None if price is None else price * devices * hours,
        electricity_usd=energy * tariff.usd_per_kwh,
        energy_kwh=energy,
        co2_kg=energy * carbon.grams_per_kwh / 1000,
        notes=(
            *counts.notes,
            *notes,
            *_drawing_notes(config),
            *_run_notes(config, machine, counts),
            f"Energy: {_watts(device, resolved):,.0f} W per device, times {pue:g} for the building"
            + (" (an average data centre)." if pue != PUE_OWN else " (none assumed for this machine)."),
            f"CO2: {carbon.grams_per_kwh:g} g/kWh, {carbon.name} {carbon.year}. {CARBON_SOURCE}.",
        ),
    )


def assumed_efficiency(device: Device, shape: ModelShape, compute_dtype: str) -> Efficiency:
    """From published measurements, by the kind of device and the width of the model."""
    kind: str = device.kind if device.kind in ASSUMED else "cpu"
    if kind == "cpu" and compute_dtype == "bfloat16" and (device.flops_bf16 or 0) > MATRIX_UNITS * (device.flops_fp32 or 0):
        kind = "amx"
    scale = min(1.0, shape.hidden / FULL_WIDTH[kind]) ** WIDTH_POWER
    if (device.flops_bf16 or 0) > FAST_CARD:
        scale *= FAST_SHARE
    low, expected, high = (share * scale for share in ASSUMED[kind])
    return Efficiency(low, expected, high, 0, f"assumed from measurements elsewhere, for a width of {shape.hidden:,}")


def _given(share: float) -> Efficiency:
    if not 0 < share <= 1:
        raise ConfigError(
            "CONFIG_INVALID_VALUE", f"{share!r:.40} is no share of a device's rate.", remedy="Give a number above 0, at most 1."
        )
    return Efficiency(share * (1 - SPREAD_OF_ONE), share, min(share * (1 + SPREAD_OF_ONE), 1.0), 0, "given")


def _drawing_notes(config: RunConfig) -> list[str]:
    if not traits_of(config).draws:
        return []
    return [
        "Drawing answers is reckoned token by token from the weights' bytes, the memory's speed and the calls of each layer: a rough "
        "figure. What a reward function takes is not in the time."
    ]


def _run_notes(config: RunConfig, machine: Machine, counts: Steps) -> list[str]:
    notes = []
    if config.training.patience is not None and counts.steps > config.training.eval_steps * config.training.patience:
        notes.append("Early stopping (training.patience) may end it sooner.")
    if counts.padding_share > 0.3:
        notes.append(f"{100 * counts.padding_share:.0f} % of what is computed is padding; training.group_by_length lowers that.")
    if machine.device_count > GPUS_PER_MACHINE:
        notes.append(f"More than {GPUS_PER_MACHINE} devices: a network of 200 Gbit/s between machines is assumed.")
    return notes


# --- time -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Load:
    """What the times are computed from."""

    shape: ModelShape
    config: RunConfig
    resolved: Resolved
    device: Device
    devices: int
    counts: Steps
    flops: Flops
    traffic: Traffic
    cutting: Cutting | None

    @property
    def kind(self) -> str:
        return self.device.kind if self.device.kind in ASSUMED else "cpu"

    @property
    def rate(self) -> float:
        return _rate(self.device, self.resolved) or (UNKNOWN_FP32 if self.resolved.compute_dtype == "float32" else UNKNOWN_HALF)

    @property
    def bandwidth(self) -> float:
        return (self.device.bandwidth or UNKNOWN_BANDWIDTH) * BANDWIDTH_SHARE[self.kind]

    @property
    def passes(self) -> Passes:
        return passes_of(self.config)

    @property
    def micro_batch_tokens(self) -> float:
        """Padded tokens of a device's mean micro-batch."""
        return self.counts.padded_tokens / max(self.counts.micro_batches * self.devices, 1)


def _seconds(load: _Load, data: DataFacts, efficiency: float, launch: float) -> dict[str, float]:
    """Seconds of the whole run by what they go into."""
    training = load.config.training
    per_micro_batch = max(_micro_batch(load, efficiency, launch).values()) + load.traffic.unpacking / load.bandwidth
    per_micro_batch *= load.passes.trained
    hidden = per_micro_batch * HIDDEN_SHARE  # the exchange begins while the last backward pass still runs
    per_update = STEP_SECONDS * launch + load.traffic.per_step / load.bandwidth + max(_exchange(load) - hidden, 0.0)
    per_step = per_update * _updates_per_step(load.config)
    per_micro_batch += load.passes.forward * _forward_pass(load, load.micro_batch_tokens, efficiency, launch)
    evaluations = math.ceil(load.counts.steps / training.eval_steps)
    saves = math.ceil(load.counts.steps / training.save_steps) + (evaluations / 2 if training.load_best else 0)
    examples = _eval_examples(load.config, data)
    state = 4 * load.traffic.trainable * 3  # weights and two moments
    return {
        "training": load.counts.micro_batches * per_micro_batch + load.counts.steps * per_step,
        "drawing": _drawing(load, load.counts.examples_seen / load.devices, efficiency, launch),
        "evaluation": evaluations * _evaluation(load, data, examples, efficiency, launch) if examples else 0.0,
        "checkpoints": saves * state / DISK_BYTES_PER_SECOND if load.counts.steps else 0.0,
        "answers": _answers(load, launch) if examples and training.objective not in ("pretrain", "reward") else 0.0,
        "start": START_SECONDS * launch
        + sum(weight_bytes(load.shape, load.resolved.storage_dtype).values()) / DISK_BYTES_PER_SECOND,
    }


def _micro_batch(load: _Load, efficiency: float, launch: float) -> dict[str, float]:
    """The three times of which the longest counts."""
    tokens = load.micro_batch_tokens
    factor = LAYER_FACTORS.get(load.config.method.kind, 1.0)
    if load.resolved.gradient_checkpointing:
        factor *= CHECKPOINT_FACTOR
    return {
        "operations": tokens * load.flops.total / (load.rate * efficiency),
        "memory": (load.traffic.per_micro_batch + tokens * load.traffic.per_token) / load.bandwidth,
        "launching": load.shape.layers * LAYER_SECONDS * factor * launch,
    }


def _operations(load: _Load) -> float:
    """Operations of training, drawn answers included: the passes without gradients beside those with, and a pass per drawn token."""
    passes, tokens = load.passes, load.counts.padded_tokens
    drawn = 1.0 if traits_of(load.config).draws else 0.0
    return (load.flops.total * passes.trained + load.flops.forward * (passes.forward + drawn)) * tokens


def _updates_per_step(config: RunConfig) -> float:
    """Optimizer updates in a step as it is counted: ppo's has several passes over minibatches."""
    if config.training.objective != "ppo":
        return 1.0
    drawn = config.reinforcement
    return drawn.update_epochs * math.ceil(drawn.rollout_size / config.training.effective_batch)


def _forward_pass(load: _Load, tokens: float, efficiency: float, launch: float) -> float:
    """Seconds of a micro-batch without gradients."""
    factor = LAYER_FACTORS.get(load.config.method.kind, 1.0) * FORWARD_SHARE
    operations = tokens * load.flops.forward / (load.rate * efficiency)
    return max(operations, load.shape.layers * LAYER_SECONDS * factor * launch) + load.traffic.unpacking / load.bandwidth / 2


def _drawing(load: _Load, answers: float, efficiency: float, launch: float) -> float:
    """Seconds to draw so many answers at full length: their prompts in one pass, then token by token all weights and all keys and
    values once (Pope et al. 2022, arXiv:2211.05102, section 2), some sequences together."""
    config, shape = load.config, load.shape
    if not traits_of(config).draws or not answers:
        return 0.0
    together = min(float(drawn_at_once(config)), answers)
    new_tokens, width = config.reinforcement.max_new_tokens, load.counts.row_width
    quantize = "nf4" if config.method.kind == "qlora" else None
    weights = sum(weight_bytes(shape, load.resolved.storage_dtype, quantize=quantize).values()) + load.traffic.unpacking / 2
    cache = together * kv_cache_bytes(shape, round(width - new_tokens / 2), 2.0)
    per_token = max(
        shape.layers * GENERATION_SECONDS * launch,
        (weights + cache) / load.bandwidth,
        together * load.flops.forward / (load.rate * efficiency),
    )
    prompts = _forward_pass(load, together * (width - new_tokens), efficiency, launch)
    return answers / together * (prompts + new_tokens * per_token)


def _bound(load: _Load, efficiency: float) -> str:
    times = _micro_batch(load, efficiency, 1.0)
    return max(times, key=lambda name: times[name])


def _exchange(load: _Load) -> float:
    """Summing the gradients of all devices once a step: a ring moves them 2 (n - 1) / n times."""
    if load.devices == 1:
        return 0.0
    link = FAST_LINK if LINKED.search(load.device.name) else PCIE_LINK
    if load.devices > GPUS_PER_MACHINE:
        link = min(link, NETWORK_LINK)
    return 2 * (load.devices - 1) / load.devices * 4 * load.traffic.trainable / link


def _evaluation(load: _Load, data: DataFacts, examples: int, efficiency: float, launch: float) -> float:
    """One pass over the held-out examples, without gradients, in the order of the file."""
    lengths, rows_per_example, _ = row_lengths(load.config, data)
    batch = load.config.training.eval_batch_size
    rows = examples * rows_per_example / load.devices
    traits = traits_of(load.config)
    if load.cutting is None:
        width, passes = mean_width(lengths, min(batch, max(round(rows), 1))), math.ceil(rows / batch)
    else:  # nearly without padding either way
        width = sum(lengths) / len(lengths)
        passes = math.ceil(rows * width / load.cutting.budget)
    drawn = load.config.reinforcement.max_new_tokens if traits.draws else 0
    forwards = 1.0 + min(load.passes.forward, 3.0)  # the policy, and what a step asks besides
    tokens = rows * (width + drawn) * traits.sides
    return passes * forwards * _forward_pass(load, tokens / max(passes, 1), efficiency, launch) + _drawing(
        load, rows, efficiency, launch
    )


def _answers(load: _Load, launch: float) -> float:
    """Sample answers after training: a pass over all weights per token, one after the other."""
    tokens = load.config.evaluation.samples * load.config.evaluation.max_new_tokens
    quantize = "nf4" if load.config.method.kind == "qlora" else None
    weights = sum(weight_bytes(load.shape, load.resolved.storage_dtype, quantize=quantize).values())
    return tokens * max(load.shape.layers * GENERATION_SECONDS * launch, weights / load.bandwidth)


def _eval_examples(config: RunConfig, data: DataFacts) -> int:
    if data.eval_examples is not None:
        return max(data.eval_examples, 0)
    share = config.data.eval_fraction
    return min(config.data.eval_limit, round(max(data.examples, 0) * share / (1 - share))) if share else 0


# --- devices ----------------------------------------------------------------------------------------


def _computing_device(machine: Machine, resolved: Resolved) -> tuple[Device, tuple[str, ...]]:
    """The device that does the work: the processor where the run does not use the machine's GPU."""
    if resolved.device != "cpu" or machine.kind == "cpu":
        return machine.device, ()
    features = ("NEON",) if machine.kind == "mps" else ("AVX2",)
    processor = cpu_device(
        name=f"processor beside {machine.device.name}",
        cores=machine.cores,
        features=features,
        memory_bytes=machine.host_memory_bytes,
    )
    why = "the engine does not drive Apple's GPU" if machine.kind == "mps" else "training.device is cpu"
    note = f"The processor computes ({why}); typical figures of {machine.cores:g} cores are assumed."
    return replace(processor, price_per_hour=machine.device.price_per_hour), (note,)


def _rate(device: Device, resolved: Resolved) -> float | None:
    """Dense operations per second in the type the run computes in; emulated or unknown types at the fp32 rate."""
    return device.flops_fp32 if resolved.compute_dtype == "float32" else device.flops_bf16 or device.flops_fp32


def _watts(device: Device, resolved: Resolved) -> float:
    rated = device.power_watts or UNKNOWN_WATTS
    return rated * POWER_SHARE + (HOST_WATTS_PER_GPU if resolved.device != "cpu" else 0.0)


# --- learning from runs -----------------------------------------------------------------------------


SPREAD_OF_ONE = 0.3  # how far a single run may be from the next
SMALLEST_SHARE = 1e-6


def share_reached(
    flops: float, seconds: float, device: Device, *, compute_dtype: str = "bfloat16", devices: int = 1
) -> float | None:
    """The share of `devices`' dense peak that a finished run reached. None for figures no run can have.

    `flops`: its operations (`Cost.flops`), `seconds`: of training alone. Above the peak means a wrong rate, so that is None too.
    """
    rate = device.flops_fp32 if compute_dtype == "float32" else device.flops_bf16 or device.flops_fp32
    figures = (flops, seconds, rate or 0.0, float(devices))
    if not all(math.isfinite(figure) and figure > 0 for figure in figures):
        return None
    share = flops / seconds / figures[2] / devices
    return share if SMALLEST_SHARE < share <= 1.0 else None


def efficiency_from(shares: Sequence[float]) -> Efficiency | None:
    """What earlier runs on this device reached (`share_reached`): their median, and how far they lie apart. None without any."""
    usable = [share for share in shares if math.isfinite(share) and SMALLEST_SHARE < share <= 1.0]
    if not usable:
        return None
    middle = statistics.median(usable)
    spread = SPREAD_OF_ONE / math.sqrt(len(usable))
    return Efficiency(
        low=min(min(usable), middle * (1 - spread)),
        expected=middle,
        high=min(max(*usable, middle * (1 + spread)), 1.0),
        runs=len(usable),
        source=f"learned from {len(usable)} earlier run{'s' if len(usable) > 1 else ''} on this device",
    )
