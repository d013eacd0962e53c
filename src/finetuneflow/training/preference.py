"""Learning from preferences: trainers for dpo, kto, orpo, cpo, simpo and reward.

Losses and forward passes are TRL's; rows, masks, order, guards, evaluation and checkpoints are ours (`trainer.GuardedTrainer`).
TRL renders, tokenizes and truncates by itself where it is let; here it gets finished rows, so that what `ftf data preview` shows
is what is learned. Its constructors see a single row, and get the real ones when they are done.

    preference_trainer(...)   the trainer of an objective
    settle_reference(...)     which frozen weights dpo and kto are measured against
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from finetuneflow.config import Preference
from finetuneflow.data.batches import PairCollator, RatedCollator
from finetuneflow.events import Emit
from finetuneflow.models.adapters import REFERENCE, TRAINED, is_peft_model
from finetuneflow.training.trainer import GuardedTrainer

# TRL's names of figures -> ours (`watch.METRICS`). What is not listed is not shown.
FIGURES = {
    "rewards/accuracies": "accuracy",
    "accuracy": "accuracy",
    "rewards/margins": "margin",
    "margin": "margin",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "logps/chosen": "logp_chosen",
    "logps/rejected": "logp_rejected",
    "entropy": "entropy",
    "kl": "kl",
    "mean_token_accuracy": "token_accuracy",
    "nll": "nll",
    "mean_reward": "reward",
}


class PreferenceTrainer(GuardedTrainer):
    """Shared by the objectives below: figures under our names, and an evaluation that is a mean over rows."""

    def __init__(self, *args: Any, train_rows: Any, eval_rows: Any, **kwargs: Any) -> None:
        super().__init__(*args, train_dataset=train_rows.select([0]), **kwargs)
        self.train_dataset, self.eval_dataset = train_rows, eval_rows

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """Rows are finished: rendered, tokenized, masked and cut by the data room."""
        return dataset

    def take_figures(self, mode: str) -> dict[str, float]:
        held = self._metrics[mode]
        figures = {FIGURES[name]: sum(values) / len(values) for name, values in held.items() if name in FIGURES and values}
        held.clear()
        return figures

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss and figures over all held-out rows, each row weighing the same whatever batch it was in."""
        was_training = self.model.training
        self.model.eval()
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for batch in self.get_eval_dataloader(eval_dataset):
                rows = len(batch.pop("row_ids"))
                with self.accelerator.autocast():
                    loss = self.compute_loss(self.model, self._prepare_inputs(batch))
                for name, value in {"loss": float(loss), **self.take_figures("eval")}.items():
                    sums[name] = sums.get(name, 0.0) + rows * value
                    weights[name] = weights.get(name, 0.0) + rows  # kto: a batch may hold no rejected answer
        self.model.train(was_training)
        metrics = {f"{metric_key_prefix}_{name}": sums[name] / weights[name] for name in sums}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class DPO(PreferenceTrainer, DPOTrainer):
    """Direct preference optimisation (Rafailov et al. 2023) and its variants."""

    def use_cached_reference(self, side: str, logps: torch.Tensor) -> None:
        """From now on take the reference's log-probabilities of the rows of `side` ("train" or "eval") from `logps` (rows, 2)."""
        self.precompute_ref_logps = True
        self._cached = {
            **getattr(self, "_cached", {}),
            side: PairCollator(self.data_collator.sides.pad_token_id, reference=logps),
        }

    def get_train_dataloader(self) -> Any:
        with self._collating("train"):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        with self._collating("eval"):
            return super().get_eval_dataloader(eval_dataset)

    @contextlib.contextmanager
    def _collating(self, side: str) -> Iterator[None]:
        plain, self.data_collator = self.data_collator, getattr(self, "_cached", {}).get(side, self.data_collator)
        try:
            yield
        finally:
            self.data_collator = plain


class KTO(PreferenceTrainer, KTOTrainer):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024) on single answers rated good or bad."""


class Reward(PreferenceTrainer, RewardTrainer):
    """A model that scores answers so that chosen ones score higher (Bradley-Terry; Ouyang et al. 2022)."""


class WithoutReference(PreferenceTrainer):
    """Objectives on pairs that need no reference model: loss formulas of TRL on log-probabilities computed here.

    TRL's own trainers for these build the logits of every token, prompts and padding included.
    """

    def __init__(self, *args: Any, preference: Preference, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beta = preference.beta
        self.label_smoothing = preference.label_smoothing
        self._metrics = {"train": {}, "eval": {}}
        disable_dropout_in_model(self.model)  # as TRL does for the objectives above
        base = self.model.get_base_model() if is_peft_model(self.model) else self.model
        add_fused_lm_head(base, outputs=("log_probs", "entropy"))

    def sides(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probability of each answer summed over its tokens, and its number of tokens: chosen, rejected, counts of both."""
        mask = inputs["completion_mask"][:, 1:]
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            fused_lm_head=True,
            use_cache=False,
        )
        width = mask.shape[1]  # a trained prefix puts positions before the row's own
        chosen, rejected = (output.log_probs[:, -width:] * mask).sum(dim=1).chunk(2)
        chosen_count, rejected_count = mask.sum(dim=1).chunk(2)
        self._note(entropy=(output.entropy[:, -width:].detach() * mask).sum() / mask.sum())
        return chosen, rejected, chosen_count, rejected_count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        chosen, rejected, chosen_count, rejected_count = self.sides(model, inputs)
        nll = -chosen.sum() / chosen_count.sum()  # over the chosen answers alone, as the papers have it
        loss, reward_chosen, reward_rejected = self.objective(chosen, rejected, chosen_count, rejected_count, nll)
        self._note(
            **{
                "nll": nll.detach(),
                "rewards/chosen": reward_chosen.mean(),
                "rewards/rejected": reward_rejected.mean(),
                "rewards/margins": (reward_chosen - reward_rejected).mean(),
                "rewards/accuracies": (reward_chosen > reward_rejected).float().mean(),
                "logps/chosen": chosen.detach().mean(),
                "logps/rejected": rejected.detach().mean(),
            }
        )
        return loss

    def objective(
        self,
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        chosen_count: torch.Tensor,
        rejected_count: torch.Tensor,
        nll: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(loss, rewards of chosen answers, rewards of rejected answers)."""
        raise NotImplementedError

    def _note(self, **figures: torch.Tensor) -> None:
        held = self._metrics["train" if self.model.training else "eval"]
        for name, value in figures.items():
            held.setdefault(name, []).append(float(value))


class ORPO(WithoutReference):
    """Ordinary loss on the chosen answer plus the odds ratio of both (Hong et al. 2024, equation 6)."""

    def objective(self, chosen, rejected, chosen_count, rejected_count, nll):  # type: ignore[no-untyped-def]
        per_token = chosen / chosen_count, rejected / rejected_count
        penalty, reward_chosen, reward_rejected, *_ = ORPOTrainer.odds_ratio_loss(self, *per_token)  # type: ignore[arg-type]
        return nll - penalty.mean(), reward_chosen, reward_rejected


class CPO(WithoutReference):
    """Contrastive preference optimisation (Xu et al. 2024), and with `loss_type` "simpo" SimPO (Meng et al. 2024)."""

    def __init__(self, *args: Any, preference: Preference, loss_type: str, **kwargs: Any) -> None:
        super().__init__(*args, preference=preference, **kwargs)
        self.loss_type = loss_type
        self.alpha = 0.0  # AlphaPO's reshaping of rewards is left out
        self.simpo_gamma = preference.simpo_gamma
        self.nll_weight = 0.0 if loss_type == "simpo" else preference.cpo_alpha

    def objective(self, chosen, rejected, chosen_count, rejected_count, nll):  # type: ignore[no-untyped-def]
        if self.loss_type in ("ipo", "simpo"):  # these compare answers per token
            chosen, rejected = chosen / chosen_count, rejected / rejected_count
        losses, reward_chosen, reward_rejected = CPOTrainer.cpo_loss(self, chosen, rejected)  # type: ignore[arg-type]
        return losses.mean() + self.nll_weight * nll, reward_chosen, reward_rejected


# --- building -----------------------------------------------------------------------------------------


def preference_trainer(
    objective: str,
    settings: Preference,
    arguments: Mapping[str, Any],
    *,
    model: Any,
    tokenizer: Any,
    rows: tuple[Any, Any],
    reference: Any,
    **ours: Any,
) -> PreferenceTrainer:
    """The trainer of `objective`. `arguments`: those of `TrainingArguments`; `rows`: training and held-out rows;
    `reference`: a frozen model for dpo and kto without adapters, else None; `ours`: what `GuardedTrainer` takes."""
    settings = settings.model_copy(update={"beta": settings.beta_of(objective)})
    shared = {"model": model, "train_rows": rows[0], "eval_rows": rows[1], "processing_class": tokenizer, **ours}
    pad = tokenizer.pad_token_id or 0  # any id will do where there is none: padding is masked
    with kept_precision(model):
        if objective == "dpo":
            variant = "sigmoid" if settings.loss == "auto" else settings.loss
            config = DPOConfig(
                **arguments, loss_type=[variant], beta=settings.beta, label_smoothing=settings.label_smoothing, max_length=None
            )
            return DPO(args=config, data_collator=PairCollator(pad), ref_model=reference, **shared)
        if objective == "kto":
            kto = KTOConfig(
                **arguments,
                loss_type="kto" if settings.loss == "auto" else settings.loss,
                beta=settings.beta,
                desirable_weight=settings.desirable_weight,
                undesirable_weight=settings.undesirable_weight,
                max_length=None,
            )
            return KTO(args=kto, data_collator=RatedCollator(pad), ref_model=reference, **shared)
        if objective == "reward":
            reward = RewardConfig(**arguments, center_rewards_coefficient=settings.center_rewards or None, max_length=None)
            return Reward(args=reward, data_collator=ScoredPairs(model.config.get_text_config().pad_token_id), **shared)
    from transformers import TrainingArguments

    plain = {**shared, "args": TrainingArguments(**arguments), "data_collator": PairCollator(pad), "preference": settings}
    if objective == "orpo":
        return ORPO(**plain)
    if objective == "simpo":
        return CPO(**plain, loss_type="simpo")
    return CPO(**plain, loss_type="sigmoid" if settings.loss == "auto" else settings.loss)


class ScoredPairs(PairCollator):
    """Pairs as the reward model takes them: it scores the last token that is not padding, so every token is needed, no mask."""

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "row_ids")}


@contextlib.contextmanager
def kept_precision(model: Any) -> Iterator[None]:
    """TRL rounds the adapter of a quantised model to bfloat16; ours keep fp32 master weights."""
    kept = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]


def settle_reference(model: Any, *, continued: bool) -> None:
    """Decide what "the reference" means for a model with adapters, after TRL has made a copy of the adapter as it was.

    A fresh adapter changes nothing yet: the reference is the base with the adapter off, and no copy is kept. An adapter that is
    continued is measured against its frozen copy, which is TRL's.
    """
    if is_peft_model(model) and not continued and REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)
        model.set_adapter(TRAINED)


def reference_logps(trainer: DPO, rows: Any, path: Path, emit: Emit) -> torch.Tensor:
    """Log-probabilities of the reference model for every row, (rows, 2): chosen, rejected. Read from `path` or made and kept there.

    The caller names the file after everything that shapes the numbers.
    """
    from safetensors.torch import load_file, save_file

    from finetuneflow.workspace import translate_os_errors

    if path.is_file():
        return load_file(path)["logps"]
    emit("phase", name="reference", pairs=len(rows))
    found = torch.zeros(len(rows), 2)
    was_training = trainer.model.training
    trainer.model.eval()
    with torch.random.fork_rng(devices=[]):
        for start in range(0, len(rows), trainer.args.per_device_eval_batch_size):
            chosen = [rows[i] for i in range(start, min(start + trainer.args.per_device_eval_batch_size, len(rows)))]
            batch = trainer._prepare_inputs(trainer.data_collator(chosen))
            ids = batch.pop("row_ids").cpu()
            sides = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
            found[ids] = torch.stack([side.float().cpu() for side in sides], dim=1)
    trainer.model.train(was_training)
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        save_file({"logps": found}, temporary)
        temporary.replace(path)
    return found
