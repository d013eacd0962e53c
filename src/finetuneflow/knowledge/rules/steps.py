"""Rules about batch, steps, epochs, evaluation and checkpoints. Each rule's page has the sources (`rules/CODE.md`)."""

from __future__ import annotations

import math
from typing import Any

from finetuneflow.knowledge.criteria import BATCHES, STEPS, band_at
from finetuneflow.knowledge.situation import Hit, Situation, count, gb, many, percent, rule
from finetuneflow.knowledge.values import GB, DataFacts, Machine

SMALL_BATCH, USUAL_BATCH = 8, 16
FEW_STEPS, ENOUGH_STEPS = 30, 60
# Passes that data bears: the golden rule says 2 to 5; LIMA (Zhou et al. 2023) made 15 over 1,000 chosen examples.
MOST_PASSES, MOST_PASSES_OF_FEW, FEW = 5.0, 15.0, 1000
PRETRAIN_PASSES = 4.0  # Muennighoff et al. 2023: up to four epochs repeated text is almost as good as new text


@rule("EFFECTIVE_BATCH_SMALL", "advice", "A very small effective batch")
def effective_batch_small(s: Situation) -> Hit | None:
    batch, training = s.batch, s.config.training
    if batch >= SMALL_BATCH or not s.chosen("training.batch_size", "training.gradient_accumulation"):
        return None
    if s.data is not None and s.data.examples < 50 * USUAL_BATCH:
        return None  # few examples: more steps are worth more than steadier ones
    accumulation = math.ceil(USUAL_BATCH / (training.batch_size * s.devices))
    return Hit(
        "training.gradient_accumulation",
        f"{batch} examples per optimizer step",
        f"The noise of a step falls with the square root of its examples: {math.sqrt(USUAL_BATCH / batch):.1f} times more of "
        f"it than at the usual {USUAL_BATCH}. Accumulation costs no memory.",
        {"training.gradient_accumulation": accumulation},
    )


@rule("EFFECTIVE_BATCH_BY_MEMORY", "advice", "A full fine-tuning batch far from the rule of thumb for the card")
def effective_batch_by_memory(s: Situation, machine: Machine, data: DataFacts) -> Hit | None:
    config, memory = s.config, machine.device.memory_bytes / GB
    if config.method.kind != "full" or config.training.objective != "sft" or machine.kind not in ("cuda", "rocm") or memory <= 0:
        return None
    low, high = band_at(memory, BATCHES)
    if low / 2 <= s.batch <= 2 * high:
        return None
    if s.batch < low and data.examples * config.training.epochs / low < 200:
        return None  # the usual batch would leave too few steps
    wanted = low if s.batch < low else high
    per_micro = config.training.batch_size * s.devices
    return Hit(
        "training.gradient_accumulation",
        f"{s.batch} examples per optimizer step on {memory:.0f} GB",
        f"The rule of thumb for full fine-tuning on such a card is {low:.0f} to {high:.0f} (Alpaca and Vicuna: 128). It is no "
        f"matter of memory: accumulation reaches any batch. {s.batch} is {max(s.batch / wanted, wanted / s.batch):.1f} times off.",
        {"training.gradient_accumulation": max(1, round(wanted / per_micro))},
    )


@rule("BATCH_LARGER_THAN_DATA", "warning", "An optimizer step that takes the whole dataset")
def batch_larger_than_data(s: Situation, data: DataFacts) -> Hit | None:
    if not 0 < data.examples < s.rows or (s.rows == s.devices) or s.traits.draws:
        return None
    target = max(1, data.examples // (8 * s.devices))
    batch = min(s.config.training.batch_size, target)
    return Hit(
        "training.gradient_accumulation",
        f"{s.batch} examples per step, {data.examples} in the data",
        f"Each epoch is a single step: {s.steps or 1:,} steps in all, and the model is corrected only that often.",
        {"training.batch_size": batch, "training.gradient_accumulation": max(1, target // batch)},
        safe=True,
    )


@rule("STEPS_TOO_FEW", "warning", "Too few optimizer steps to learn from")
def steps_too_few(s: Situation, steps: int) -> Hit | None:
    training = s.config.training
    if steps >= FEW_STEPS or training.max_steps is not None or s.traits.draws:
        return None
    accumulation = max(1, training.gradient_accumulation * steps // ENOUGH_STEPS)
    fix: dict[str, Any] = {}
    if accumulation < training.gradient_accumulation:
        fix = {"training.gradient_accumulation": accumulation}
    return Hit(
        "training.epochs",
        f"{steps} steps of {s.batch} examples",
        f"The documented short runs have 1,000 steps and more; after {steps} steps an adapter has hardly left zero. "
        "Take smaller batches, or gather more examples.",
        fix,
    )


@rule("STEPS_BY_DATASET_SIZE", "advice", "Far fewer or more steps than the dataset's size suggests")
def steps_by_dataset_size(s: Situation, steps: int, data: DataFacts) -> Hit | None:
    if s.config.training.objective != "sft" or data.examples < 1000:
        return None
    low, high = band_at(data.examples, STEPS)
    passes = steps * s.rows / data.examples
    few, many = steps < low / 2 and passes < 2, steps > 2 * high and passes > 5
    if not few and not many:
        return None
    fix: dict[str, Any] = {"training.epochs": 3}
    if s.config.training.max_steps is not None:
        fix["training.max_steps"] = None
    return Hit(
        "training.max_steps" if s.config.training.max_steps is not None else "training.epochs",
        f"{steps:,} steps, {passes:.2g} passes over {data.examples:,} examples",
        f"Rules of thumb for this size: {low:,.0f} to {high:,.0f} steps, and 2 to 5 passes. Both say that this run is too "
        f"{'short' if few else 'long'}.",
        fix,
    )


@rule("EPOCHS_OVERFIT", "warning", "More passes than the data bears")
def epochs_overfit(s: Situation, data: DataFacts, passes: float) -> Hit | None:
    limit = MOST_PASSES if data.examples > FEW else MOST_PASSES_OF_FEW
    if s.config.training.objective != "sft" or passes <= limit:
        return None
    training = s.config.training
    guard = (
        f"Evaluation with patience {training.patience} may stop it earlier."
        if s.evaluates and training.load_best and training.patience
        else "Nothing stops it earlier: no evaluation with load_best and patience."
    )
    by_steps = training.max_steps is not None
    return Hit(
        "training.max_steps" if by_steps else "training.epochs",
        f"{passes:.3g} passes over {data.examples:,} examples",
        f"Each answer is seen {passes:.3g} times; above {limit:g} the model starts to recite it, and answers to other "
        f"questions get worse. {guard}",
        {"training.epochs": 3, "training.max_steps": None} if by_steps else {"training.epochs": 3},
    )


@rule("PRETRAIN_REPEATS", "advice", "Text repeated more often than it helps")
def pretrain_repeats(s: Situation, passes: float) -> Hit | None:
    if s.config.training.objective != "pretrain" or passes <= PRETRAIN_PASSES:
        return None
    by_steps = s.config.training.max_steps is not None
    return Hit(
        "training.max_steps" if by_steps else "training.epochs",
        f"{passes:.3g} passes over the text",
        f"Up to {PRETRAIN_PASSES:g} passes repeated text is worth almost as much as new text; after that its value decays "
        f"quickly, and {percent(1 - PRETRAIN_PASSES / passes)} of this run comes after that.",
        {"training.epochs": int(PRETRAIN_PASSES)} | ({"training.max_steps": None} if by_steps else {}),
    )


@rule("MAX_STEPS_OVERRIDES_EPOCHS", "warning", "Epochs and steps that contradict each other")
def max_steps_overrides_epochs(s: Situation, data: DataFacts) -> Hit | None:
    training = s.config.training
    if training.max_steps is None or not s.chosen("training.epochs") or data.examples < 1:
        return None
    passes = training.max_steps * s.rows / data.examples
    if 0.9 <= passes / training.epochs <= 1.1:
        return None
    return Hit(
        "training.max_steps",
        f"max_steps {training.max_steps:,} and epochs {training.epochs:g}",
        f"max_steps decides: {training.max_steps:,} steps of {s.rows} examples are {passes:.2g} passes over "
        f"{data.examples:,} examples, not {training.epochs:g}."
        + (f" {percent(1 - passes)} of the data is never seen." if passes < 1 else ""),
        {"training.max_steps": None},
    )


# --- evaluation and checkpoints -----------------------------------------------------------------------


@rule("EVALS_TOO_FEW", "advice", "Too few evaluations to pick the best weights or to stop early")
def evals_too_few(s: Situation, steps: int) -> Hit | None:
    training = s.config.training
    if not s.evaluates or steps < FEW_STEPS or not (training.load_best or training.patience):
        return None
    made = math.ceil(steps / training.eval_steps)  # one is always made after the last step
    if made >= 3:
        return None
    return Hit(
        "training.eval_steps",
        f"every {training.eval_steps:,} of {steps:,} steps",
        f"{many(made, 'evaluation')} in the whole run: load_best has next to nothing to choose from, and patience "
        f"cannot act. One every {many(max(1, steps // 10), 'step')} makes ten.",
        {"training.eval_steps": max(1, steps // 10)},
        safe=True,
    )


@rule("SAVE_STEPS_BEYOND_RUN", "advice", "No checkpoint before the run ends")
def save_steps_beyond_run(s: Situation, steps: int) -> Hit | None:
    training = s.config.training
    first = min(training.save_steps, training.eval_steps) if s.evaluates else training.save_steps
    if first < steps or steps < 100:
        return None
    return Hit(
        "training.save_steps",
        f"every {training.save_steps:,} of {steps:,} steps",
        f"If the process is killed at step {steps - 1:,}, all {steps - 1:,} steps are lost. Every {2 * max(1, steps // 10)} "
        "steps loses a fifth at most.",
        {"training.save_steps": 2 * max(1, steps // 10)},
        safe=True,
    )


@rule("SAVE_EVAL_MISMATCH", "advice", "Checkpoints and evaluations that do not fall together")
def save_eval_mismatch(s: Situation) -> Hit | None:
    training = s.config.training
    save, evaluate = training.save_steps, training.eval_steps
    if not (s.evaluates and training.load_best and s.chosen("training.save_steps", "training.eval_steps")):
        return None
    if save % evaluate == 0 or evaluate % save == 0:
        return None
    trained = s.adapter_size()
    size = f" ({gb(12 * trained)} each)" if trained else ""
    return Hit(
        "training.save_steps",
        f"save_steps {save}, eval_steps {evaluate}",
        f"Every better evaluation is saved at once, whatever save_steps says; since {save} is no multiple of {evaluate}, these "
        f"come on top of the regular checkpoints{size}. Other trainers refuse such a pair.",
        {"training.save_steps": evaluate * max(1, round(save / evaluate))},
        safe=True,
    )


@rule("LOAD_BEST_WITHOUT_EVAL", "warning", "Best weights and early stopping without an evaluation")
def load_best_without_eval(s: Situation) -> Hit | None:
    training = s.config.training
    wants = [
        name
        for name, on in (("load_best", training.load_best), ("patience", training.patience is not None))
        if on and s.chosen(f"training.{name}")
    ]
    if s.evaluates or not wants:
        return None
    return Hit(
        f"training.{wants[0]}",
        f"{' and '.join(wants)}, but data.eval is empty and data.eval_fraction 0",
        "Without a held-out part no evaluation is made: the last weights are kept and nothing stops early.",
        {"data.eval_fraction": 0.1},
    )


# --- several devices ----------------------------------------------------------------------------------


@rule("GPU_COUNT_CHANGED", "warning", "The same run on another number of GPUs")
def gpu_count_changed(s: Situation, device_count_before: int) -> Hit | None:
    training = s.config.training
    if device_count_before < 1 or device_count_before == s.devices:
        return None
    before = training.effective_batch * device_count_before
    accumulation = before / (training.batch_size * s.devices)
    fits = 1 <= accumulation <= 4096 and accumulation == int(accumulation)
    return Hit(
        "training.gradient_accumulation",
        f"{s.devices} devices, {device_count_before} in the earlier run",
        f"The settings count per device: a step had {before} examples and now has {s.batch}. Loss curves and the best "
        "learning rate are not comparable.",
        {"training.gradient_accumulation": int(accumulation)} if fits else {},
    )


@rule("BATCH_TIMES_DEVICES", "advice", "A batch setting that is multiplied by the number of GPUs")
def batch_times_devices(s: Situation, machine: Machine) -> Hit | None:
    training = s.config.training
    if (
        s.devices == 1
        or s.device_count_before is not None
        or not s.chosen("training.batch_size", "training.gradient_accumulation")
    ):
        return None
    accumulation = max(1, round(training.gradient_accumulation / s.devices))
    return Hit(
        "training.gradient_accumulation",
        f"{training.batch_size} x {training.gradient_accumulation} on {s.devices} devices",
        f"batch_size and gradient_accumulation count per device: a step has {count(s.batch)} examples, not "
        f"{training.effective_batch}. If {training.effective_batch} was meant, divide the accumulation by {s.devices}.",
        {"training.gradient_accumulation": accumulation} if accumulation < training.gradient_accumulation else {},
    )
