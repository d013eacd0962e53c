"""What is trained on what: from a configuration to tokens, a model, a trainer and a saved result.

`run.py` calls these in order. What sets an objective apart stands in `knowledge/objectives.py`: the form of its rows, and the
family that says who trains on them; everything else is shared. `start.py` holds the model a run starts from.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetuneflow.config import RunConfig, Training
from finetuneflow.data.preferences import Pairing
from finetuneflow.data.prepare import Prepared, Recipe, prepare
from finetuneflow.data.tokens import Policy
from finetuneflow.errors import FineTuneFlowError, ResumeError, TrainingError
from finetuneflow.events import Emit
from finetuneflow.knowledge.objectives import counts_length_out, least_batch, supervise_of, traits_of
from finetuneflow.knowledge.steps import token_budget
from finetuneflow.training.callbacks import Monitor, memory_now
from finetuneflow.training.checkpoints import Checkpoint, checkpoint_dir, find_damage, find_valid
from finetuneflow.training.progress import Progress
from finetuneflow.training.setup import Setup
from finetuneflow.training.start import Started, adapter_folder, shaping_files, start_model
from finetuneflow.workspace import Workspace, require_free_bytes, sha256_json, translate_os_errors, write_json

# --- data, tokenizer, template ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Materials:
    """Everything a run needs besides the model: tokens, tokenizer, template, and the hashes of where they came from."""

    prepared: Prepared
    tokenizer: Any
    template: Any
    tokenizer_digest: str
    base_digest: str
    base_commit: str | None  # of a hub model

    def save_tokenizer(self, run_dir: Path) -> None:
        """Keep the tokenizer with the template the run was trained with, so that inference renders the same."""
        write_tokenizer(self.tokenizer, self.template, run_dir / "tokenizer")
        write_json(run_dir / "template.json", {"name": self.template.name, "source": self.template.source})


def write_tokenizer(tokenizer: Any, template: Any, folder: Path) -> None:
    """Tokenizer files, with the chat template of the run."""
    own = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.source
        with translate_os_errors(folder):
            tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own


def load_materials(config: RunConfig, workspace: Workspace, emit: Emit) -> Materials:
    """Tokenizer and template of the base, and the dataset as tokens."""
    from finetuneflow.data.templates import resolve_template
    from finetuneflow.models.source import resolve, source_of
    from finetuneflow.models.tokenizer import load_tokenizer

    snapshot = resolve(source_of(config.model))
    tokenizer, notes = load_tokenizer(snapshot.path, run_own_code=snapshot.run_own_code)
    template = resolve_template(tokenizer, config.data.template, consent=config.data.template_consent)
    for note in (*snapshot.notes, *notes, *template.notes):
        emit("decision", setting="model.base", value=config.model.base, reason=note)
    data = config.data
    recipe = Recipe(
        train=tuple(data.train),
        eval=tuple(data.eval),
        eval_fraction=data.eval_fraction,
        eval_limit=data.eval_limit,
        mapping=dict(data.mapping),
        tree_paths=data.tree_paths,
        encoding=data.encoding,
        limit=data.limit,
        reject_threshold=data.reject_threshold,
        form=traits_of(config).form,
        pairing=Pairing.of(data),
        rated_weights=(config.preference.desirable_weight, config.preference.undesirable_weight),
        by_token=counts_length_out(config),
        replay=tuple(data.replay),
        replay_share=data.replay_share,
        policy=Policy(supervise=supervise_of(config), max_length=data.max_length, overlong=data.overlong),
        seed=config.training.seed,
    )
    tokenizer_digest = sha256_json([tokenizer.backend_tokenizer.to_str(), sorted(map(str, tokenizer.special_tokens_map.items()))])
    prepared = prepare(recipe, tokenizer_digest, template, workspace.cache_dir / "tokens", emit)
    return Materials(
        prepared, tokenizer, template, tokenizer_digest, snapshot.digest, snapshot.commit if snapshot.from_hub else None
    )


def tokens_of(config: RunConfig, prepared: Prepared) -> int:
    """Tokens that a run over these rows will see, about."""
    lengths, training = prepared.train["length"], config.training
    rows = training.epochs * len(lengths)
    if training.max_steps is not None:
        rows = min(rows, training.max_steps * training.effective_batch)
    return round(rows * sum(lengths) / max(len(lengths), 1))


# --- training ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training left: the model in memory, and figures over all attempts that led to it (peak memory: of this one)."""

    model: Any
    step: int
    stopped: str | None
    restored_best: bool
    seconds: float
    examples_seen: int
    tokens_seen: int
    peak_memory_bytes: int
    trainable_parameters: int
    total_parameters: int


def train_model(
    config: RunConfig, setup: Setup, materials: Materials, run_dir: Path, emit: Emit, *, start: Checkpoint | None
) -> Outcome:
    """Train; with `oom: retry`, halve the micro-batch at equal effective batch for as long as memory runs out."""
    training = config.training
    while True:
        try:
            return _train_once(config, training, setup, materials, run_dir, emit, start=start)
        except BaseException as error:
            if not is_out_of_memory(error):
                raise
            explained = explain_out_of_memory(error, training)
            smaller = smaller_batch(training, least_batch(config))
            if training.oom == "stop" or smaller is None:
                raise explained from error
        # Outside the handler: the exception, and with it every tensor of the failed step, is gone by now.
        gc.collect()
        _empty_device_cache()
        emit(
            "decision",
            setting="training.batch_size",
            value=smaller.batch_size,
            reason=f"Out of memory with micro-batch {training.batch_size}: trying {smaller.batch_size} x {smaller.gradient_accumulation} "
            f"(effective batch {smaller.effective_batch}, as before).",
        )
        training = smaller
        start = _newest_checkpoint(run_dir) or start  # what was trained before memory ran out is kept


def _newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    try:
        return find_valid(run_dir / "checkpoints")[0]
    except ResumeError:
        return None


def smaller_batch(training: Training, least: int = 1) -> Training | None:
    """Half the micro-batch at the same effective batch, or None where it cannot be halved without falling below `least`."""
    if training.batch_size % 2 or training.batch_size // 2 < least:
        return None
    return training.model_copy(
        update={"batch_size": training.batch_size // 2, "gradient_accumulation": training.gradient_accumulation * 2}
    )


def _train_once(
    config: RunConfig,
    training: Training,
    setup: Setup,
    materials: Materials,
    run_dir: Path,
    emit: Emit,
    *,
    start: Checkpoint | None,
) -> Outcome:
    from finetuneflow.models.adapters import trainable_parameters
    from finetuneflow.training.trainer import PROGRESS_FILE

    emit("phase", name="loading")
    started = start_model(config, setup, materials.tokenizer, materials.base_commit, emit)
    model = started.model
    progress = Progress(on_saving=lambda step: _say_saving(emit, step))
    if start:
        progress.load_state(json.loads((start.path / PROGRESS_FILE).read_text()))
    monitor = Monitor(emit, progress, training, run_dir, evaluates=materials.prepared.eval is not None)
    if config.evaluation.at_steps and training.objective != "reward":
        monitor.ask_at(
            config.evaluation.at_steps,
            lambda step: ask(config, model, materials, run_dir, emit, step=step, name=f"step-{step:06d}"),
        )
    trainer = build_trainer(config, training, setup, materials, started, monitor, run_dir, emit)
    counts = trainable_parameters(model)
    _require_disk(run_dir, counts.trainable)
    draws = traits_of(config).draws  # answers are drawn first: the longest step is not known yet
    if (setup.device == "cuda" or training.oom == "retry") and not draws:
        try_longest_batch(trainer)
    emit("phase", name="training", trainable_parameters=counts.trainable, total_parameters=counts.total)
    with orderly_stop(monitor):
        trainer.train(resume_from_checkpoint=str(start.path) if start else None)
    seconds = progress.seconds()
    return Outcome(
        model=model,
        step=trainer.state.global_step,
        stopped=monitor.stopped,
        restored_best=not monitor.stopped and training.load_best and _restore_best(trainer, emit),
        seconds=seconds,
        examples_seen=progress.examples_seen,
        tokens_seen=progress.tokens_seen,
        peak_memory_bytes=memory_now()["peak_memory_bytes"],
        trainable_parameters=counts.trainable,
        total_parameters=counts.total,
    )


def _say_saving(emit: Emit, step: int) -> None:
    emit("phase", name="saving", step=step)


# Our names -> transformers' names, where they differ.
OPTIMIZERS = {"adamw_8bit": "adamw_bnb_8bit"}


def build_trainer(
    config: RunConfig,
    training: Training,
    setup: Setup,
    materials: Materials,
    started: Started,
    monitor: Monitor,
    run_dir: Path,
    emit: Emit,
) -> Any:
    """The trainer for a model and rows that are ready."""
    from transformers import PrinterCallback

    prepared = materials.prepared
    ours = {
        "monitor": monitor,
        "checkpoints_dir": run_dir / "checkpoints",
        "keep_checkpoints": training.keep_checkpoints,
        "places": prepared.place,
    }
    arguments = trainer_arguments(training, setup, run_dir)
    family = traits_of(config).family
    if family in ("preference", "group", "ppo"):
        _fuse_modules(training, setup, started.model, emit)
    if family == "ppo":
        return _ppo_trainer(config, training, setup, materials, started, monitor, run_dir)
    if family == "preference":
        trainer = _preference_trainer(config, arguments, materials, started, ours, emit)
    elif family == "group":
        trainer = _group_trainer(config, arguments, materials, started, ours)
    else:
        trainer = _supervised_trainer(config, training, setup, arguments, materials, started.model, ours, emit)
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainer_arguments(training: Training, setup: Setup, run_dir: Path) -> dict[str, Any]:
    """Our settings in the words of `transformers.TrainingArguments` (and of TRL's, which add to them)."""
    return {
        "output_dir": str(run_dir / "checkpoints"),
        "run_name": run_dir.name,
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "learning_rate": setup.learning_rate,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.eval_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "warmup_steps": min(training.warmup_ratio, 0.999_999),  # a fraction is a share of all steps
        "weight_decay": training.weight_decay,
        "lr_scheduler_type": training.scheduler,
        "max_grad_norm": training.max_grad_norm,
        "optim": OPTIMIZERS.get(setup.optimizer, setup.optimizer),
        "bf16": setup.compute_dtype == "bfloat16",
        "fp16": setup.compute_dtype == "float16",
        "use_cpu": setup.device == "cpu",
        "gradient_checkpointing": setup.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if setup.gradient_checkpointing else None,
        "seed": training.seed,
        "report_to": list(training.report_to) or "none",
        # The monitor decides when to log, evaluate and save.
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": setup.device == "cuda",
    }


def plain_arguments(arguments: dict[str, Any]) -> Any:
    """`trainer_arguments` as transformers' own class, which calls checkpointing by its new name where TRL keeps the old one."""
    from transformers import TrainingArguments

    checkpointing, options = (arguments.pop(f"gradient_checkpointing{end}") for end in ("", "_kwargs"))
    return TrainingArguments(**arguments, activation_checkpointing=checkpointing, activation_checkpointing_kwargs=options)


def _supervised_trainer(
    config: RunConfig,
    training: Training,
    setup: Setup,
    arguments: dict[str, Any],
    materials: Materials,
    model: Any,
    ours: dict[str, Any],
    emit: Emit,
) -> Any:
    from finetuneflow.data.batches import StepCollator
    from finetuneflow.kernels.elementwise import use_compiled
    from finetuneflow.models.fast import describe, prepare_fast
    from finetuneflow.training.trainer import SupervisedTrainer

    prepared = materials.prepared
    # A batch of the loader is a whole step: how it is cut into micro-batches is the collator's business.
    arguments |= {"per_device_train_batch_size": training.effective_batch, "gradient_accumulation_steps": 1}
    pad = materials.tokenizer.pad_token_id or 0  # any id will do where there is none: padding is masked
    if training.speed == "reference":
        fast = None
        emit("decision", setting="training.speed", value="reference", reason="The plain path, as asked.")
    else:
        use_compiled(setup.fuse_loops)
        with autocast_of(setup):
            fast = prepare_fast(model.to(setup.device))
        emit("decision", setting="training.speed", value="auto", reason=describe(fast))
    if fast is None:
        collator, eval_collator = (StepCollator(pad, rows_each=n) for n in (training.batch_size, training.eval_batch_size))
    else:
        longest = max(prepared.train["length"], default=1)
        budget = token_budget(training, config.data.max_length, setup.device, longest=longest)
        emit("decision", setting="training.token_budget", value=budget.tokens, reason=budget.reason)
        collator = eval_collator = StepCollator(pad, budget=budget.tokens, packed=fast.packs)
        arguments["per_device_eval_batch_size"] = max(training.eval_batch_size, ROWS_CUT_TOGETHER)
    return SupervisedTrainer(
        model=model,
        args=plain_arguments(arguments),
        train_dataset=prepared.train,
        eval_dataset=prepared.eval,
        data_collator=collator,
        eval_collator=eval_collator,
        fast=fast,
        **ours,
    )


# Rows of an evaluation among which micro-batches are filled.
ROWS_CUT_TOGETHER = 256


def autocast_of(setup: Setup) -> Any:
    """The mixed precision that accelerate wraps a forward pass in; without its cache, which would outlive a change of the weights."""
    import torch

    dtype = getattr(torch, setup.compute_dtype)
    return torch.autocast(setup.device, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)


def _fuse_modules(training: Training, setup: Setup, model: Any, emit: Emit) -> None:
    """What the fast path has for trainers that bring their own loss."""
    from finetuneflow.models.fast import describe, fuse_modules

    if training.speed == "reference":
        emit("decision", setting="training.speed", value="reference", reason="The plain path, as asked.")
        return
    with autocast_of(setup):
        fast = fuse_modules(model.to(setup.device))
    emit("decision", setting="training.speed", value="auto", reason=describe(fast))


def _preference_trainer(
    config: RunConfig, arguments: dict[str, Any], materials: Materials, started: Started, ours: dict[str, Any], emit: Emit
) -> Any:
    from finetuneflow.training.preference import DPO, preference_trainer, reference_logps, settle_reference

    prepared, objective = materials.prepared, config.training.objective
    trainer = preference_trainer(
        objective,
        config.preference,
        arguments,
        model=started.model,
        tokenizer=materials.tokenizer,
        rows=(prepared.train, prepared.eval),
        reference=started.reference,
        **ours,
    )
    settle_reference(started.model, continued=config.model.adapter is not None and config.model.adapter_start == "continue")
    if config.method.dropout and config.method.kind in ("lora", "qlora", "dora"):
        emit(
            "decision",
            setting="method.dropout",
            value=0.0,
            reason=f"{objective} compares two answers, and dropout would blur the difference: none is applied.",
        )
    if isinstance(trainer, DPO) and config.preference.reference == "cached":
        parts = (materials.tokenizer_digest, materials.base_digest, arguments["bf16"], shaping_files(config))
        name = sha256_json([prepared.digest, *parts])[:32]
        for rows, side in ((prepared.train, "train"), (prepared.eval, "eval")):
            if rows is None:
                continue
            path = prepared.folder.parent.parent / "reference" / f"{name}-{side}.safetensors"
            trainer.use_cached_reference(side, reference_logps(trainer, rows, path, emit))
        if started.reference is not None:
            trainer.ref_model = None
            started.reference.to("meta")  # whoever still holds it holds no weights
    return trainer


def _group_trainer(
    config: RunConfig, arguments: dict[str, Any], materials: Materials, started: Started, ours: dict[str, Any]
) -> Any:
    from finetuneflow.evaluation.reward_model import load_reward_model
    from finetuneflow.evaluation.rewards import as_trl, load_rewards
    from finetuneflow.inference import Generator
    from finetuneflow.training.preference import settle_reference
    from finetuneflow.training.reinforcement import group_trainer

    ending = Generator(started.model, materials.tokenizer, materials.template).ending
    open_model = partial(load_reward_model, device=started.model.device, batch_size=config.training.eval_batch_size)
    rewards = load_rewards(config.reinforcement, ending=ending, open_model=open_model)
    trainer = group_trainer(
        config.training.objective,
        config.reinforcement,
        arguments,
        model=started.model,
        tokenizer=materials.tokenizer,
        template=materials.template,
        rows=(materials.prepared.train, materials.prepared.eval),
        rewards=[as_trl(reward) for reward in rewards],
        weights=[reward.weight for reward in rewards],
        reference=started.reference,
        **ours,
    )
    settle_reference(started.model, continued=config.model.adapter is not None and config.model.adapter_start == "continue")
    return trainer


def _ppo_trainer(
    config: RunConfig, training: Training, setup: Setup, materials: Materials, started: Started, monitor: Monitor, run_dir: Path
) -> Any:
    from finetuneflow.training.ppo import ppo_trainer

    return ppo_trainer(
        config,
        training,
        setup,
        started.model,
        materials.tokenizer,
        materials.template,
        materials.prepared,
        monitor,
        run_dir,
        reference=started.reference,
    )


@contextlib.contextmanager
def orderly_stop(monitor: Monitor) -> Iterator[None]:
    """The first Ctrl-C or TERM saves and stops after the step; a second one interrupts at once."""

    def handle(signum: int, frame: Any) -> None:
        monitor.stop_soon()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def try_longest_batch(trainer: Any) -> None:
    """Forward and backward on the longest rows, so that memory runs out now rather than after an hour.

    Leaves no trace: gradients are dropped and the random state is put back.
    """
    import torch

    dataset = trainer.train_dataset
    lengths = dataset["length"]
    longest = sorted(range(len(dataset)), key=lambda i: lengths[i], reverse=True)[: trainer.args.per_device_train_batch_size]
    with torch.random.fork_rng():
        trainer.model.to(trainer.args.device).train()
        trainer.probe_longest([dataset[i] for i in longest])
    trainer.model.zero_grad(set_to_none=True)


def _restore_best(trainer: Any, emit: Emit) -> bool:
    """Put the weights of the lowest evaluation loss back; False where they are the last ones or cannot be read."""
    best = trainer.progress.best_step
    if best is None or best == trainer.state.global_step:
        return best is not None
    path = checkpoint_dir(trainer.checkpoints_dir, best)
    if reason := find_damage(path):
        emit(
            "warning",
            code="BEST_CHECKPOINT_DAMAGED",
            message=f"The best checkpoint {path.name} cannot be used: {reason}.",
            advice="The last weights are kept.",
        )
        return False
    trainer._load_from_checkpoint(str(path))
    emit(
        "decision",
        setting="training.load_best",
        value=best,
        reason=f"The weights of step {best} are kept: its evaluation loss is the lowest.",
    )
    return True


def _require_disk(run_dir: Path, trainable: int) -> None:
    """Room for two checkpoints (fp32 weights and two optimizer moments) before the first hour is spent."""
    require_free_bytes(run_dir, 2 * trainable * 4 * 3)


# --- out of memory --------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's own error, Python's, the kernel's, or the CPU allocator's RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in (
            "can't allocate memory",
            "out of memory",
            "not enough memory",
            "cannot allocate memory",
            "bad_alloc",
            "std::bad_alloc",
            "can't start new thread",  # no address space left for its stack
        )
    )


def explain_out_of_memory(error: BaseException, training: Training | None = None) -> FineTuneFlowError:
    """The error with what was used, and the batch it was used for; `run.py` adds the remedies, computed for the run."""
    memory = {**memory_now(), "capacity_bytes": memory_capacity()}
    if training is not None:
        memory |= {"batch_size": training.batch_size, "gradient_accumulation": training.gradient_accumulation}
    return TrainingError(
        "OUT_OF_MEMORY",
        f"Memory ran out: {memory['peak_memory_bytes'] / 1e9:.2f} GB were used at the peak of {memory['capacity_bytes'] / 1e9:.1f} GB.",
        where=str(error).splitlines()[0][:200] if str(error) else None,
        context=memory,
    )


def memory_capacity() -> int:
    """Bytes of the device that is used: the GPU's memory, else what the machine or its container grants."""
    import torch

    from finetuneflow.hardware import probe_memory

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return probe_memory().total_bytes


def _empty_device_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the result -------------------------------------------------------------------------------------------


def save_result(config: RunConfig, outcome: Outcome, materials: Materials, run_dir: Path) -> None:
    """`adapter/` in PEFT's format, or `model/` with its tokenizer after full fine-tuning; whole or not at all."""
    from finetuneflow.models.adapters import save_adapter

    target = run_dir / ("adapter" if config.method.is_adapter else "model")
    temporary = run_dir / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    with translate_os_errors(temporary):
        if config.method.is_adapter:
            for adapter in outcome.model.peft_config.values():
                adapter.base_model_name_or_path = config.model.base  # not the folder of this machine's cache
            save_adapter(outcome.model, temporary)
            (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the export writes a real one
            if config.model.adapter is not None and config.model.adapter_start == "stack":
                _sum_with_lower(adapter_folder(config.model.adapter), temporary)
        else:
            outcome.model.config.use_cache = True
            outcome.model.save_pretrained(temporary)
            write_tokenizer(materials.tokenizer, materials.template, temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                os.chmod(path, 0o644)  # safetensors writes 0600
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)


def _sum_with_lower(lower: Path, upper: Path) -> None:
    """Replace a stacked adapter by one that holds both, so that it works on the original base."""
    from finetuneflow.models.adapters import write_sum

    both = upper.with_name(f"{upper.name}.both")
    shutil.rmtree(both, ignore_errors=True)
    write_sum(lower, upper, both)
    shutil.rmtree(upper)
    os.replace(both, upper)


def measure(config: RunConfig, outcome: Outcome, materials: Materials, run_dir: Path, emit: Emit) -> dict[str, Any]:
    """Answers to held-out prompts, and the acceptance suite where one is named: for `metrics.json`, details in `evals/`."""
    if config.training.objective == "reward":  # it scores and writes nothing; its accuracy is in the evaluations
        return {"inference_samples": []}
    outcome.model.config.use_cache = True
    return ask(config, outcome.model, materials, run_dir, emit, step=outcome.step, name="after-training")


def ask(
    config: RunConfig, model: Any, materials: Materials, run_dir: Path, emit: Emit, *, step: int, name: str
) -> dict[str, Any]:
    """Ask the model, as it is now, some held-out prompts and the suite; greedy, so that nothing random is drawn."""
    from finetuneflow.evaluation.measure import sample_answers
    from finetuneflow.evaluation.questions import read_examples
    from finetuneflow.evaluation.suite import load_suite, run_suite
    from finetuneflow.inference import Generator

    settings = config.evaluation
    generator = Generator(model, materials.tokenizer, materials.template, name=run_dir.name)
    found: dict[str, Any] = {"inference_samples": []}
    if settings.samples and config.training.objective != "pretrain" and materials.prepared.eval is not None:
        examples, _ = read_examples([run_dir / "data" / "eval.jsonl"])
        samples = sample_answers(generator, examples, count=settings.samples, max_new_tokens=settings.max_new_tokens)
        found["inference_samples"] = [sample.to_dict() for sample in samples]
        for sample in found["inference_samples"]:
            emit("sample", step=step, **sample)
    if settings.suite:
        result = run_suite(generator, load_suite(settings.suite))
        write_json(run_dir / "evals" / f"{name}.json", result.to_dict())
        emit("suite", step=step, name=result.suite, passed=result.passed, prompts=len(result.items), share=result.pass_share)
        found |= {"suite": result.suite, "suite_pass_share": result.pass_share, "suite_prompts": len(result.items)}
    return found


def require_named(config: RunConfig) -> None:
    """Look at the acceptance suite and the rewards that are named: a mistake in them must show before a model is loaded."""
    from finetuneflow.evaluation.rewards import require_rewards
    from finetuneflow.evaluation.suite import load_suite

    if config.evaluation.suite:
        load_suite(config.evaluation.suite)
    if traits_of(config).draws and config.reinforcement.reward:
        require_rewards(config.reinforcement)
