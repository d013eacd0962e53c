"""Learning from rewards with TRL's group methods: trainers for grpo and rloo (ppo is in `ppo.py`).

Several answers are drawn for each prompt and compared with each other, so no value head is needed. Generation, advantages and
loss are TRL's; prompts, their order, rewards, guards, evaluation and checkpoints are ours. Every optimizer step draws new
answers (`training.batch_size x training.gradient_accumulation` of them), so a checkpoint between steps holds all there is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

from finetuneflow.config import Reinforcement
from finetuneflow.data.batches import RepeatedSampler
from finetuneflow.data.conversations import read_messages
from finetuneflow.errors import TrainingError
from finetuneflow.models.adapters import is_peft_model
from finetuneflow.training.preference import kept_precision
from finetuneflow.training.trainer import GuardedTrainer

# TRL's names of figures -> ours (`watch.METRICS`). What is not listed is not shown.
FIGURES = {
    "reward": "reward",
    "reward_std": "reward_std",
    "reward_length_correlation": "reward_length_correlation",
    "completions/mean_length": "response_length",
    "completions/clipped_ratio": "unended_share",
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clip_fraction",
    "frac_reward_zero_std": "same_reward_share",
}


class GroupTrainer(GuardedTrainer):
    """Shared by grpo and rloo. `template` renders prompts; `kl_per_token`: whether TRL's figure of the divergence is one."""

    kl_per_token = True
    num_generations: int
    num_generations_eval: int
    num_iterations: int
    reward_weights: torch.Tensor
    ref_model: Any
    beta: float

    def __init__(self, *args: Any, train_rows: Any, eval_rows: Any, template: Any, **kwargs: Any) -> None:
        self.template = template
        super().__init__(*args, train_dataset=_prompts(train_rows.select([0])), **kwargs)
        self.train_dataset = _prompts(train_rows)
        self.eval_dataset = None if eval_rows is None else _prompts(eval_rows)

    # --- data ---------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[list[dict[str, str]]]) -> Any:
        """Prompts as every other part of the product renders them."""
        ids = [list(self.template.prompt_ids(read_messages(prompt, []))) for prompt in prompts]
        return ids, None, {}  # no images, nothing else

    def _get_train_sampler(self, dataset: Any = None) -> RepeatedSampler:
        return RepeatedSampler(
            len(self.train_dataset),
            seed=self.args.seed,
            copies=self.num_generations,
            prompts=self.args.generation_batch_size // self.num_generations,
            rounds=self.num_iterations * self.args.steps_per_generation,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> RepeatedSampler:
        return RepeatedSampler(len(eval_dataset), seed=self.args.seed, copies=self.num_generations_eval, shuffle=False)

    def count(self, inputs: Any) -> list[int]:
        """Row ids of the whole generation batch; its tokens are counted once the answers are there."""
        self.progress.count(examples=self.args.per_device_train_batch_size, tokens=0)
        return sorted({row["row_id"] for row in inputs})

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training:
            self.progress.count(examples=0, tokens=int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()))
        return inputs

    def probe_loss(self, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Answers are drawn first, so the longest step is not known beforehand."""
        raise NotImplementedError

    # --- figures ------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        lengths = torch.tensor([float(len(ids)) for ids in completion_ids_list], device=total.device)
        if len(total) > 2 and total.std() > 0 and lengths.std() > 0:
            together = torch.corrcoef(torch.stack([total, lengths]))[0, 1]
            self._metrics["train" if self.model.training else "eval"]["reward_length_correlation"].append(float(together))
        return rewards

    def take_figures(self, mode: str) -> dict[str, float]:
        held = self._metrics[mode]
        figures = {FIGURES[name]: sum(values) / len(values) for name, values in held.items() if name in FIGURES and values}
        held.clear()
        if "unended_share" in figures:
            figures["ended_share"] = 1.0 - figures.pop("unended_share")
        if self.kl_per_token and "kl" in figures:
            # Nats per answer, as everywhere here. Steps that reuse answers report no length: the last one holds.
            self._length = figures.get("response_length", getattr(self, "_length", 1.0))
            figures["kl"] *= self._length
        return figures

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean reward of answers to the held-out prompts, drawn with one seed so that evaluations can be compared.

        `eval_loss` is the reward with its sign turned: lower is better everywhere.
        """
        was_training = self.model.training
        self.model.eval()
        found: dict[str, list[float]] = {}
        devices = [torch.cuda.current_device()] if self.args.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.args.seed)
            for batch in self.get_eval_dataloader(eval_dataset):
                inputs = self._prepare_inputs(batch)
                with self.accelerator.autocast():
                    self.compute_loss(self.model, inputs)
                for name, value in self.take_figures("eval").items():
                    found.setdefault(name, []).append(value)
        self.model.train(was_training)
        figures = {name: sum(values) / len(values) for name, values in found.items()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in {"loss": -figures["reward"], **figures}.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class GRPO(GroupTrainer, GRPOTrainer):
    """Group relative policy optimisation (Shao et al. 2024)."""


class RLOO(GroupTrainer, RLOOTrainer):
    """REINFORCE leave-one-out (Ahmadian et al. 2024)."""

    kl_per_token = False


def _prompts(rows: Any) -> Any:
    """Rows as TRL's trainers take them, made when they are read: `prompt` (turns), `answer` (reference), `row_id`."""

    def as_prompts(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            "prompt": [json.loads(messages) for messages in batch["messages"]],
            "answer": batch["answer"],
            "row_id": batch["index"],
            "place": batch["place"],
        }

    return rows.with_transform(as_prompts)


# --- building -----------------------------------------------------------------------------------------


def group_trainer(
    objective: str,
    settings: Reinforcement,
    arguments: Mapping[str, Any],
    *,
    model: Any,
    tokenizer: Any,
    template: Any,
    rows: tuple[Any, Any],
    rewards: Sequence[Callable[..., list[float]]],
    weights: Sequence[float],
    reference: Any,
    **ours: Any,
) -> GroupTrainer:
    """The trainer of `objective` (grpo or rloo). `rewards`: functions as TRL calls them; `reference`: a frozen model without
    adapters, else None; `ours`: what `GuardedTrainer` takes."""
    _require_end_token(model, tokenizer, template)
    eval_batch = max(arguments["per_device_eval_batch_size"], 2)  # an answer is compared with at least one other
    config = {
        **arguments,
        "per_device_eval_batch_size": eval_batch,
        "num_generations": settings.samples_per_prompt,
        "num_generations_eval": next(n for n in range(2, eval_batch + 1) if eval_batch % n == 0),
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "epsilon": settings.clip_range,
        # Without adapters TRL would load a reference by the model's name; ours is handed over below.
        "beta": settings.kl_coefficient if is_peft_model(model) else 0.0,
        "reward_weights": list(weights),
        "disable_dropout": True,
    }
    seed = arguments["seed"]
    shared = {"model": model, "reward_funcs": list(rewards), "processing_class": tokenizer, "template": template, **ours}
    with kept_precision(model):
        trainer: GroupTrainer = (
            GRPO(args=GRPOConfig(**config), train_rows=rows[0], eval_rows=rows[1], **shared)
            if objective == "grpo"
            else RLOO(args=RLOOConfig(**config), train_rows=rows[0], eval_rows=rows[1], **shared)
        )
    if reference is not None and settings.kl_coefficient:
        add_fused_lm_head(reference, temperature=settings.temperature)
        trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
        trainer.beta = settings.kl_coefficient
    set_seed(seed)  # TRL's constructor draws from the random state
    return trainer


def _require_end_token(model: Any, tokenizer: Any, template: Any) -> None:
    """Generation here ends at tokens: tell the model which, and refuse a template that ends a turn by ordinary text."""
    ends = model.generation_config.eos_token_id
    known = {tokenizer.eos_token_id, *(ends if isinstance(ends, list | tuple) else [ends])} - {None}
    turn_end = tuple(template.turn_end)
    if turn_end and (len(turn_end) == 1 or turn_end[0] in tokenizer.all_special_ids):
        known.add(turn_end[0])
    elif turn_end and tokenizer.eos_token_id not in turn_end:
        raise TrainingError(
            "OBJECTIVE_UNSUPPORTED",
            f"The chat template ends a turn with the text {template.stop!r}; grpo and rloo can only stop at a token.",
            where="data.template",
            remedy="Use training.objective ppo, or a template that ends turns with a token of the tokenizer.",
        )
    model.generation_config.eos_token_id = sorted(known)
