"""PPO: the model answers prompts, is paid for its answers, and is moved a little towards those that paid better than expected.

One step is one iteration:

    prompts -> draw answers -> score -> log-probabilities (policy, reference) and values -> token rewards -> advantages
            -> `update_epochs` passes over shuffled minibatches of the clipped objective and the value loss

Ziegler et al. 2019 and Ouyang et al. 2022 describe the method; the formulas are in `ppo_math.py`, the models in
`ppo_actors.py`, drawing in `ppo_draw.py`, the rewards in `rewards.py`. The library this product otherwise trains with has given PPO up, so the loop is
ours. It presents itself to the monitor as a trainer does.

Everything random is a pure function of the seed and of what is drawn: the order of prompts (seed, epoch), an answer's tokens
(seed, iteration, its place in the iteration), the minibatches (seed, iteration, pass). So a resumed run goes on bit for bit.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerControl, TrainerState

from finetuneflow.config import RunConfig, Training
from finetuneflow.data.batches import EpochSampler
from finetuneflow.errors import TrainingError
from finetuneflow.evaluation.reward_model import SHARED, RewardModel, can_share, load_reward_model, shared_reward_model
from finetuneflow.evaluation.rewards import Reward, load_rewards
from finetuneflow.inference import Decoding, Generator
from finetuneflow.training.callbacks import Monitor
from finetuneflow.training.checkpoints import prune, write_checkpoint
from finetuneflow.training.objectives import plain_arguments, trainer_arguments
from finetuneflow.training.ppo_actors import Actors, Answers
from finetuneflow.training.ppo_draw import DrawnAnswer, draw
from finetuneflow.training.ppo_math import (
    PolicyTerms,
    correlation,
    explained_variance,
    generalised_advantages,
    kl_controller,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from finetuneflow.training.setup import Setup
from finetuneflow.training.trainer import PROGRESS_FILE, STATE_FILE, non_finite

OPTIMIZER_FILE, SCHEDULER_FILE, RANDOM_FILE, LOOP_FILE = "optimizer.pt", "scheduler.pt", "rng_state.pth", "ppo.json"
# Answers drawn together, in micro-batches of an update: drawing keeps no activations and one position of logits.
DRAWN_TOGETHER = 4
EVALUATION = -1  # stands for the iteration in the random streams of held-out prompts: the same draws at every evaluation


def ppo_trainer(
    config: RunConfig,
    training: Training,
    setup: Setup,
    model: Any,
    tokenizer: Any,
    template: Any,
    prepared: Any,
    monitor: Monitor,
    run_dir: Path,
    *,
    reference: Any = None,
    rewards: Sequence[Reward] | None = None,
) -> PpoTrainer:
    """The trainer of `model`, as it was loaded for the run: a `PeftModel` with its adapter "default", or one to be tuned in full.

    `prepared.train` and `prepared.eval` have the columns index, input_ids, place, messages, answer. `reference`: a frozen model
    to measure a full model's divergence from; None: a copy of it. `rewards`: those to use instead of the run file's.
    """
    actors = Actors(
        model,
        temperature=config.reinforcement.temperature,
        compute_dtype=setup.compute_dtype,
        checkpointing=setup.gradient_checkpointing,
        seed=training.seed,
        continued=config.model.adapter is not None and config.model.adapter_start == "continue",
        reference=reference,
    )
    generator = Generator(model, tokenizer, template, name=run_dir.name)
    if rewards is None:
        open_model = partial(_open_reward_model, config=config, training=training, actors=actors)
        rewards = load_rewards(config.reinforcement, ending=generator.ending, open_model=open_model)
        for reward in rewards:
            if isinstance(reward.scorer, RewardModel) and reward.scorer.head is not None:
                actors.start_value_as(SHARED, reward.scorer.head, reward.weight)
    return PpoTrainer(config, training, setup, actors, generator, prepared, monitor, run_dir, rewards)


def _open_reward_model(folder: Path, *, config: RunConfig, training: Training, actors: Actors) -> RewardModel:
    """The reward model, on the policy's base where that is its own too. One base takes one such adapter."""
    batch, model = training.eval_batch_size, actors.model
    if actors.has_adapters and SHARED not in model.peft_config and can_share(folder, config):
        return shared_reward_model(folder, model, actors.trunk, actors.wearing, batch_size=batch)
    return load_reward_model(folder, device=model.device, batch_size=batch)


# --- an iteration ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Experience:
    """An iteration's answers as tensors of shape (answers, longest answer), beside the rows they answer."""

    prompts: list[list[int]]
    answers: list[list[int]]
    places: list[str]
    mask: torch.Tensor
    log_probs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


def minibatches(answers: int, size: int, seed: int, iteration: int, number: int) -> list[list[int]]:
    """The minibatches of one pass: a permutation of the answers drawn from (seed, iteration, number of the pass) alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) * 1_009 + number)
    order: list[int] = torch.randperm(answers, generator=generator).tolist()
    return [order[i : i + size] for i in range(0, answers, size)]


# --- the trainer ------------------------------------------------------------------------------------------


class PpoTrainer:
    """The loop, its optimizer and its checkpoints. See the module text."""

    def __init__(
        self,
        config: RunConfig,
        training: Training,
        setup: Setup,
        actors: Actors,
        generator: Generator,
        prepared: Any,
        monitor: Monitor,
        run_dir: Path,
        rewards: Sequence[Reward],
    ) -> None:
        self.settings = config.reinforcement
        self.training = training
        self.setup = setup
        self.actors = actors
        self.model = actors.model
        self.generator = generator
        self.prepared = prepared
        self.monitor = monitor
        self.progress = monitor.progress
        self.rewards = rewards
        self.checkpoints_dir = run_dir / "checkpoints"
        self.controller = kl_controller(self.settings)
        self.decoding = Decoding(self.settings.max_new_tokens, self.settings.temperature, self.settings.top_p, training.seed)
        self.pad = generator.tokenizer.pad_token_id or 0
        self.state = TrainerState(max_steps=self._total_steps())
        self.control = TrainerControl()
        self.args = plain_arguments(trainer_arguments(training, setup, run_dir))
        self.optimizer, self.scheduler = self._optimizer()
        # fp16 needs its losses scaled; with the other types this does nothing.
        self.scaler = torch.amp.GradScaler(self.model.device.type, enabled=setup.compute_dtype == "float16")
        self.callbacks = self._callback_handler()
        monitor.trainer = self

    def _total_steps(self) -> int:
        prompts = self.training.epochs * len(self.prepared.train)
        return self.training.max_steps or max(1, math.ceil(prompts / self.settings.rollout_size))

    def _optimizer(self) -> tuple[Any, Any]:
        """Policy and value in one optimizer; vectors (biases, norms) do not decay. The rate is set once per iteration: it rises
        over the warm-up's share and reaches zero one iteration behind the last, so that none is drawn for nothing."""
        from transformers import Trainer, get_scheduler

        kind, options = Trainer.get_optimizer_cls_and_kwargs(self.args, self.model)
        trained = [*self.actors.policy_parameters, *self.actors.value_parameters]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.training.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = kind(groups, **options)
        steps = self.state.max_steps
        warmup = math.ceil(self.training.warmup_ratio * steps)
        scheduler = get_scheduler(self.training.scheduler, optimizer, warmup, steps + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it wants an update first; the first iteration is to have the rate of step 1, not 0
            scheduler.step()
        return optimizer, scheduler

    def _callback_handler(self) -> Any:
        """The monitor, and the experiment trackers that are asked for."""
        from transformers.integrations import get_reporting_integration_callbacks
        from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

        trackers = get_reporting_integration_callbacks(list(self.training.report_to))
        callbacks = [DefaultFlowCallback, self.monitor, *trackers]
        return CallbackHandler(callbacks, self.model, self.generator.tokenizer, self.optimizer, self.scheduler)

    def log(self, metrics: dict[str, float]) -> None:
        """For experiment trackers; the monitor has told everybody else."""
        self.control = self.callbacks.on_log(self.args, self.state, self.control, metrics)

    # --- the loop -----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """All steps that are left. Afterwards the model is as it came, but trained: the policy active, no adapter beside it."""
        if resume_from_checkpoint is not None:
            self._load(Path(resume_from_checkpoint))
        self.control = self.callbacks.on_train_begin(self.args, self.state, self.control)
        while not self.monitor.has_ended(self.state) and not self.control.should_training_stop:
            self.control = self.callbacks.on_step_begin(self.args, self.state, self.control)
            self._iteration(self.state.global_step + 1)
            self.state.global_step += 1
            self.state.epoch = self.state.global_step * self.settings.rollout_size / len(self.prepared.train)
            self.control = self.callbacks.on_step_end(self.args, self.state, self.control)
            if self.control.should_evaluate:
                self.evaluate()
            if self.control.should_save:
                self._save()
        self.control = self.callbacks.on_train_end(self.args, self.state, self.control)
        self.actors.dismiss()

    def _iteration(self, step: int) -> None:
        rows = [self.prepared.train[row] for row in self._rows(step)]
        prompts = [list(row["input_ids"]) for row in rows]
        keys = [(step, place) for place in range(len(rows))]
        drawn = draw(
            self.generator, self.actors, prompts, keys, self.decoding, together=DRAWN_TOGETHER * self.training.batch_size
        )
        scores, figures = self._scores(rows, drawn)
        passes = [
            minibatches(len(rows), self.training.effective_batch, self.training.seed, step, number)
            for number in range(self.settings.update_epochs)
        ]
        experience, more = self._experience(rows, drawn, scores, passes[0])
        self.progress.count(examples=len(rows), tokens=sum(map(len, prompts)) + int(experience.mask.sum()))
        update = self._update(step, experience, passes)
        self.controller.update(more["kl"], len(rows))
        self.progress.add_loss(torch.tensor(update.pop("loss")))
        self.progress.add_metrics({**figures, **more, **{name: v for name, v in update.items() if name != "grad_norm"}})
        self.progress.end_step(grad_norm=update["grad_norm"], learning_rate=self.optimizer.param_groups[0]["lr"])
        self.scheduler.step()

    def _rows(self, step: int) -> list[int]:
        """The prompts of an iteration: the next ones in the endless sequence of shuffled epochs."""
        size, wanted = len(self.prepared.train), self.settings.rollout_size
        epoch, place = divmod((step - 1) * wanted, size)
        return list(islice(_epochs_from(size, self.training.seed, epoch), place, place + wanted))

    # --- answers and what they are worth ----------------------------------------------------------------------

    def _scores(self, rows: Sequence[dict[str, Any]], drawn: Sequence[DrawnAnswer]) -> tuple[torch.Tensor, dict[str, float]]:
        """What each answer is paid: the weighted rewards, less the penalty of one that did not end. On the device; fp32."""
        scores = torch.zeros(len(rows), dtype=torch.float64)
        figures: dict[str, float] = {}
        for reward in self.rewards:
            found = reward.score(
                [json.loads(row["messages"]) for row in rows],
                [answer.text for answer in drawn],
                [row["answer"] or None for row in rows],
                [answer.ids for answer in drawn],
                rows=[row["place"] for row in rows],
            )
            scores += reward.weight * torch.tensor(found, dtype=torch.float64)
            if len(self.rewards) > 1:
                figures[f"reward_{reward.label}"] = sum(found) / len(found)
        ended = torch.tensor([float(answer.ended) for answer in drawn], dtype=torch.float64)
        lengths = torch.tensor([float(len(answer.ids)) for answer in drawn], dtype=torch.float64)
        scores -= self.settings.missing_end_penalty * (1 - ended)
        figures |= {
            "reward": float(scores.mean()),
            "reward_std": float(scores.std(correction=0)),
            "reward_length_correlation": correlation(scores, lengths),
            "response_length": float(lengths.mean()),
            "ended_share": float(ended.mean()),
        }
        return scores.float().to(self.model.device), figures

    def _experience(
        self, rows: Sequence[dict[str, Any]], drawn: Sequence[DrawnAnswer], scores: torch.Tensor, first_pass: list[list[int]]
    ) -> tuple[Experience, dict[str, float]]:
        """Everything an update needs, and figures. Computed in the micro-batches of the first pass: the policy's ratio is then
        exactly 1 in its first minibatch, whatever the kernels do with other shapes."""
        prompts, answers = [list(row["input_ids"]) for row in rows], [answer.ids for answer in drawn]
        shape = (len(rows), max(map(len, answers)))
        held = {name: torch.zeros(shape, device=self.model.device) for name in ("log_probs", "reference", "values", "entropy")}
        mask = torch.zeros(shape, dtype=torch.bool, device=self.model.device)
        with torch.no_grad():
            for micro in (micro for minibatch in first_pass for micro in self._micro_batches(minibatch)):
                batch = self._batch(prompts, answers, micro)
                width = batch.mask.shape[1]
                log_probs, spread = self.actors.log_probs(batch, with_entropy=True)
                assert spread is not None
                found = {"log_probs": log_probs, "entropy": spread, "reference": self.actors.reference_log_probs(batch)}
                mask[micro, :width] = batch.mask
                for name, numbers in {**found, "values": self.actors.values(batch)}.items():
                    held[name][micro, :width] = numbers
        log_ratio = held["log_probs"] - held["reference"]
        coefficient = self.controller.coefficient
        rewards = token_rewards(scores, log_ratio, coefficient, mask)
        if self.settings.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        values = held["values"]
        advantages, returns = generalised_advantages(rewards, values, mask, self.settings.gamma, self.settings.gae_lambda)
        to_come = generalised_advantages(rewards, values, mask, self.settings.gamma, 1.0)[1]
        experience = Experience(
            prompts, answers, [row["place"] for row in rows], mask, held["log_probs"], values, whiten(advantages, mask), returns
        )
        return experience, {
            "kl": float(log_ratio.sum(dim=1).mean()),
            "kl_coefficient": coefficient,
            "entropy": float(masked_mean(held["entropy"], mask)),
            "value_explained_variance": explained_variance(values, to_come, mask),
        }

    def _micro_batches(self, minibatch: list[int]) -> Iterator[list[int]]:
        size = self.training.batch_size
        return (minibatch[i : i + size] for i in range(0, len(minibatch), size))

    def _batch(self, prompts: list[list[int]], answers: list[list[int]], rows: Sequence[int]) -> Answers:
        return Answers.of([prompts[i] for i in rows], [answers[i] for i in rows], self.pad, self.model.device)

    # --- updates --------------------------------------------------------------------------------------------------

    def _update(self, step: int, experience: Experience, passes: list[list[list[int]]]) -> dict[str, float]:
        """All passes over the answers. Returns means over the minibatches, and how far the first ratio was from 1."""
        found = [self._minibatch(step, experience, rows) for one_pass in passes for rows in one_pass]
        figures = {name: sum(one[name] for one in found) / len(found) for name in found[0] if name != "ratio_error"}
        return {**figures, "ratio_max": max(one["ratio_max"] for one in found), "first_ratio_error": found[0]["ratio_error"]}

    def _minibatch(self, step: int, experience: Experience, rows: list[int]) -> dict[str, float]:
        """One optimizer step: losses are means over the tokens of the whole minibatch, however it is cut."""
        count = int(experience.mask[rows].sum())
        sums: dict[str, torch.Tensor] = {}
        with self.actors.updating():
            for micro in self._micro_batches(rows):
                for name, value in self._backward(experience, micro, count).items():
                    larger = name in ("ratio_max", "ratio_error")
                    before = sums.get(name, torch.zeros_like(value))
                    sums[name] = torch.maximum(before, value) if larger else before + value
        figures = {name: float(value) for name, value in sums.items()}
        if not math.isfinite(figures["loss"]):
            raise self._non_finite("loss", figures["loss"], step, experience, rows)
        figures["grad_norm"] = self._clip(step, experience, rows)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return figures

    def _backward(self, experience: Experience, micro: list[int], count: int) -> dict[str, torch.Tensor]:
        """Gradients of one micro-batch, policy and value each in its role: what is recomputed in a backward pass needs it too."""
        settings = self.settings
        batch = self._batch(experience.prompts, experience.answers, micro)
        old = _Slice.of(experience, micro, batch.mask.shape[1])
        log_probs, spread = self.actors.log_probs(batch, with_entropy=settings.entropy_coefficient > 0)
        policy = policy_loss(log_probs, old.log_probs, old.advantages, batch.mask, clip_range=settings.clip_range, count=count)
        loss = policy.loss
        if spread is not None:
            loss = loss - settings.entropy_coefficient * spread.sum() / count
        self.scaler.scale(loss).backward()
        with self.actors.value_role():
            values = self.actors.values(batch)
            error = value_loss(values, old.values, old.returns, batch.mask, clip_range=settings.value_clip_range, count=count)
            weighted = settings.value_coefficient * error
            self.scaler.scale(weighted).backward()
        ratio_error = torch.where(batch.mask, (log_probs.detach() - old.log_probs).exp() - 1, 0.0).abs().max()
        return {**_figures(policy), "loss": (loss + weighted).detach(), "value_loss": error.detach(), "ratio_error": ratio_error}

    def _clip(self, step: int, experience: Experience, rows: list[int]) -> float:
        """Clip policy and value gradients, each by its own norm: a large value error must not shrink the policy's step.

        Returns the norm of both together, before clipping.
        """
        self.scaler.unscale_(self.optimizer)
        limit = self.training.max_grad_norm or math.inf
        norms = [
            float(torch.nn.utils.clip_grad_norm_(parameters, limit))
            for parameters in (self.actors.policy_parameters, self.actors.value_parameters)
        ]
        norm = math.hypot(*norms)
        # With fp16 the scaler meets infinities while it looks for its scale, and skips those steps itself.
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise self._non_finite("gradient norm", norm, step, experience, rows)
        return norm

    def _non_finite(self, what: str, value: float, step: int, experience: Experience, rows: list[int]) -> TrainingError:
        return non_finite(what, value, step, self.optimizer, [experience.places[row] for row in rows])

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Answers to the held-out prompts, drawn as in training but from the same random streams every time: a change is the
        policy's. `eval_loss` is the reward with its sign turned, so that lower is better here too."""
        rows = [self.prepared.eval[row] for row in range(len(self.prepared.eval))]
        prompts = [list(row["input_ids"]) for row in rows]
        keys = [(EVALUATION, place) for place in range(len(rows))]
        together = DRAWN_TOGETHER * self.training.batch_size
        drawn = draw(self.generator, self.actors, prompts, keys, self.decoding, together=together)
        _, figures = self._scores(rows, drawn)
        answers = [answer.ids for answer in drawn]
        divergence = 0.0
        with torch.no_grad():
            for start in range(0, len(rows), self.training.eval_batch_size):
                batch = self._batch(prompts, answers, range(start, min(start + self.training.eval_batch_size, len(rows))))
                divergence += float((self.actors.log_probs(batch)[0] - self.actors.reference_log_probs(batch)).sum())
        kept = {name: value for name, value in figures.items() if math.isfinite(value)}
        found = {"loss": -figures["reward"], **kept, "kl": divergence / len(rows)}
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callbacks.on_evaluate(self.args, self.state, self.control, metrics)
        if self.progress.record_evaluation(self.state.global_step, metrics["eval_loss"]):
            self.control.should_save = True  # the best weights are always on disk, whatever save_steps says
        self.monitor.after_evaluation(self.state, self.control)
        return metrics

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        step = self.state.global_step

        def save(folder: Path) -> None:
            self.actors.save_policy(folder)
            self.actors.save_value(folder)
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER_FILE)
            torch.save(self.scheduler.state_dict(), folder / SCHEDULER_FILE)
            torch.save(_random_state(), folder / RANDOM_FILE)
            loop = {"controller": self.controller.state(), "scaler": self.scaler.state_dict()}
            (folder / LOOP_FILE).write_text(json.dumps(loop))
            self.state.save_to_json(str(folder / STATE_FILE))
            (folder / PROGRESS_FILE).write_text(json.dumps(self.progress.state()))

        write_checkpoint(self.checkpoints_dir, step, save, event=lambda: self.progress.emit_saving(step))
        self.control = self.callbacks.on_save(self.args, self.state, self.control)
        prune(self.checkpoints_dir, keep=self.training.keep_checkpoints, protect=self.progress.best_step)

    def _load(self, folder: Path) -> None:
        """Go on where a checkpoint was written; its files are known to be what this run wrote."""
        self._load_from_checkpoint(str(folder))
        self.actors.load_value(folder)
        device = self.model.device
        self.optimizer.load_state_dict(torch.load(folder / OPTIMIZER_FILE, map_location=device, weights_only=True))
        self.scheduler.load_state_dict(torch.load(folder / SCHEDULER_FILE, weights_only=True))
        _set_random_state(torch.load(folder / RANDOM_FILE, weights_only=True))
        loop = json.loads((folder / LOOP_FILE).read_text())
        self.controller.load_state(loop["controller"])
        self.scaler.load_state_dict(loop["scaler"])
        saved = TrainerState.load_from_json(str(folder / STATE_FILE))
        self.state.global_step, self.state.epoch = saved.global_step, saved.epoch

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Put the policy's saved weights back."""
        self.actors.load_policy(Path(resume_from_checkpoint))


@dataclass(frozen=True, slots=True)
class _Slice:
    """What the update compares with, for some answers and as wide as the longest of them."""

    log_probs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    @classmethod
    def of(cls, experience: Experience, rows: list[int], width: int) -> _Slice:
        return cls(*(getattr(experience, field.name)[rows, :width] for field in fields(cls)))


def _figures(terms: PolicyTerms) -> dict[str, torch.Tensor]:
    return {
        "policy_loss": terms.loss.detach(),
        "clip_fraction": terms.clip_fraction,
        "approx_kl": terms.approx_kl,
        "ratio_mean": terms.ratio_mean,
        "ratio_max": terms.ratio_max,
    }


def _epochs_from(size: int, seed: int, epoch: int) -> Iterator[int]:
    """Row numbers without end, epoch after epoch, each in its own order."""
    sampler = EpochSampler(size, seed=seed)
    while True:
        sampler.set_epoch(epoch)
        yield from sampler
        epoch += 1


# --- random state: for reward functions that draw -----------------------------------------------------------------


def _random_state() -> dict[str, Any]:
    """All global generators, as plain values and tensors."""
    name, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
