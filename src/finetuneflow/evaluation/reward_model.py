"""A reward model scores answers: a language model whose last hidden state goes through a head with one output.

    load_reward_model(folder)   a finished reward run, or a transformers folder for sequence classification with one label
    shared_reward_model(...)    the same run's adapter and head on a base that is in memory already

The conversation is rendered and tokenized as the reward run was trained, and scored at its last token.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetuneflow.config import RunConfig
from finetuneflow.data.examples import Example, Message, Place, Problem, ToolCall
from finetuneflow.data.tokens import encode_text, render_example
from finetuneflow.errors import ConfigError, DataError, ModelError
from finetuneflow.evaluation.rewards import Drawn, Prompt, reward_failed
from finetuneflow.knowledge.shapes.settings import MOST_LAYERS, Settings

SHARED = "reward"  # the adapter's name on a shared base
HEAD = "score"
DEFAULT_BATCH = 16

Hidden = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # ids, attention mask -> last hidden states


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A `rewards.Scorer`. `scores(ids, attention_mask, last)` gives one number a row for right-padded ids (rows, width),
    `last` (rows,) being the place of each row's last token. `head`: what makes the number from a hidden state, where the model
    shares its base with another."""

    name: str
    tokenizer: Any
    template: Any
    scores: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    device: Any
    max_length: int
    batch_size: int = DEFAULT_BATCH
    head: nn.Linear | None = None

    def __call__(self, drawn: Drawn) -> list[float]:
        together = zip(drawn.prompts, drawn.completions, drawn.rows, strict=True)
        rows = [self.encode(prompt, completion, row) for prompt, completion, row in together]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # neighbours in length: little padding
        found = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, score in zip(batch, self._score([rows[i] for i in batch]), strict=True):
                found[i] = score
        return found

    def encode(self, prompt: Prompt, completion: str, row: str) -> list[int]:
        """Ids of the conversation as the reward run saw its own; of one too long the newest tokens."""
        messages = (*as_messages(prompt), Message("assistant", completion))
        source = render_example(Example("chat", Place(row, 0), "drawn", messages), self.template)
        # A template can have no place for an empty answer; what it writes is scored all the same.
        text = self.template.render(messages) if isinstance(source, Problem) else source.text
        encoded = encode_text(text, self.template)
        if isinstance(encoded, DataError):
            raise reward_failed(self.name, f"cannot read an answer: {encoded.message}", row) from encoded
        return list(encoded.ids)[-self.max_length :]

    def _score(self, rows: Sequence[Sequence[int]]) -> list[float]:
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        with torch.no_grad():
            found: list[float] = self.scores(ids, mask, last).float().tolist()
        return found


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """Turns of our own kind from those written as plain values."""

    def message(turn: Any) -> Message:
        calls = tuple(_tool_call(call) for call in turn.get("tool_calls") or ())
        return Message(turn["role"], turn.get("content") or "", calls, turn.get("name"), turn.get("tool_call_id"))

    return tuple(message(turn) for turn in prompt)


def _tool_call(call: Any) -> ToolCall:
    """A call as we write it, or in the library's nested form."""
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    return ToolCall(function["name"], json.loads(arguments) if isinstance(arguments, str) else dict(arguments), call.get("id"))


# --- a model of its own ---------------------------------------------------------------------------------


def load_reward_model(
    folder: Path, *, device: Any = "cpu", batch_size: int = DEFAULT_BATCH, adapter: Path | None = None
) -> RewardModel:
    """The reward model in `folder`, frozen, on a base of its own. `adapter`: a copy to use instead of the run's own."""
    if (folder / "run.yaml").is_file():
        config = reward_run(folder)
        tokenizer, template = _read_with(folder)
        model = _model_of_run(folder, config, device, adapter)
        max_length = config.data.max_length
    else:
        from finetuneflow.data.templates import resolve_template
        from finetuneflow.models.tokenizer import load_tokenizer

        model = _classifier(screened(folder), device)
        tokenizer, _ = load_tokenizer(folder)
        template = resolve_template(tokenizer)
        max_length = _context_length(model)
    model.requires_grad_(False).eval()
    return RewardModel(str(folder), tokenizer, template, _scores_of(model), model.device, max_length, batch_size)


def reward_run(folder: Path) -> RunConfig:
    """The configuration of a finished reward run; an error says what the folder is instead."""
    from finetuneflow.config import load_config

    config, _ = load_config(folder / "run.yaml")
    if config.training.objective != "reward":
        raise ConfigError(
            "REWARD_INVALID",
            f"{folder.name} is a run of the objective {config.training.objective}, not a reward model.",
            where=str(folder),
            remedy="Name a run that was trained with training.objective reward.",
        )
    if not any((folder / kind).is_dir() for kind in ("adapter", "model")):
        raise ModelError(
            "RUN_NOT_FINISHED", f"{folder.name} has no final weights: it did not end.", remedy="Resume it with `ftf resume`."
        )
    return config


def _read_with(run: Path) -> tuple[Any, Any]:
    """The tokenizer and the template that a run read its conversations with."""
    from finetuneflow.data.templates import template_of_run
    from finetuneflow.models.tokenizer import load_tokenizer

    tokenizer, _ = load_tokenizer(run / "tokenizer")
    return tokenizer, template_of_run(run, tokenizer)


def merged_scoring_model(run: Path) -> Any:
    """A reward run's base and adapter as one model, in memory."""
    return _model_of_run(run, reward_run(run), "cpu").merge_and_unload(safe_merge=True)


def _model_of_run(run: Path, config: RunConfig, device: Any, adapter: Path | None = None) -> Any:
    from finetuneflow.models.adapters import load_adapters
    from finetuneflow.models.load import dtype_of_run, load_base
    from finetuneflow.models.reward import scoring_model
    from finetuneflow.models.source import ModelSource, source_of

    if (run / "model").is_dir():
        return _classifier(screened(run / "model"), device)
    method = config.method
    merged = run / "base"  # where the run trained on a base that an earlier adapter was written into
    source = source_of(config.model, run)
    base = load_base(
        ModelSource(str(merged), module=source.module) if merged.is_dir() else source,
        quantize="nf4" if method.kind == "qlora" else None,
        double_quant=method.double_quantization,
        dtype=dtype_of_run(run),
        device=str(device),
    )
    return load_adapters(scoring_model(base.model, base.tokenizer, seed=0), {SHARED: adapter or run / "adapter"})


def screened(folder: Path) -> Path:
    """The folder, once it is known to hold safetensors and to ask for no code."""
    from finetuneflow.models import screening

    config = screening.read_model_config(folder, base=str(folder))
    try:
        screening.require_consent(folder, base=str(folder), commit="", consent=None)
    except RecursionError as error:
        raise screening.corrupt(folder, "holds a JSON file that nests too deeply") from error
    screening.weight_files(folder, base=str(folder))
    Settings(config, {}, folder.name).optional("num_hidden_layers", most=MOST_LAYERS)  # a deeper model is built for hours
    names, count = config.get("id2label") or {}, config.get("num_labels")
    if not isinstance(names, dict) or not (count is None or type(count) is int):
        raise screening.corrupt(
            folder / "config.json", "names its labels wrongly (id2label is an object, num_labels a whole number)"
        )
    labels = len(names) or count or 2
    if labels != 1:
        raise ConfigError(
            "REWARD_INVALID",
            f"The model in {folder} has {labels} labels; a reward model has one, the score.",
            where=str(folder),
            remedy="Name a finished reward run, or a sequence-classification model with num_labels 1.",
        )
    return folder


def _classifier(folder: Path, device: Any) -> Any:
    """The model in the type its weights are stored in."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it says about a missing head is an error below
    try:
        loader: Any = AutoModelForSequenceClassification
        with torch.random.fork_rng():
            model, loading = loader.from_pretrained(
                str(folder), num_labels=1, dtype="auto", use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # of the many kinds that transformers raises over a configuration
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        told = " ".join(str(error).split())[:200] or type(error).__name__
        if "ignore_mismatched_sizes" in told:
            told = "its weights are of other sizes than config.json says"
        raise ModelError(
            "MODEL_UNSUPPORTED_ARCH",
            f"{folder} cannot be loaded as a reward model: {told}",
            where=str(folder),
            remedy="Name a finished reward run, or a transformers folder for sequence classification.",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            "MODEL_CORRUPT",
            f"The weights in {folder} lack {len(missing)} tensors of the model, e.g. {missing[0]}: it would score at random.",
            where=str(folder),
            remedy="Name a folder that holds a trained reward model.",
        )
    return model.to(device)


def _scores_of(model: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Scores at each row's last token. The model's own way would look for the last token that is not padding, and passes
    over end tokens where padding shares their id; a model without such a head (an encoder) is asked as it is."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(inner, HEAD) and inner.base_model is not inner:
        return scores_with(
            lambda ids, mask: inner.base_model(input_ids=ids, attention_mask=mask).last_hidden_state, getattr(inner, HEAD)
        )
    return lambda ids, mask, last: model(input_ids=ids, attention_mask=mask).logits[:, 0]


def scores_with(hidden: Hidden, head: nn.Module) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Last hidden states through a head with one output."""

    def scores(ids: torch.Tensor, mask: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        states = hidden(ids, mask)
        return head(states[torch.arange(len(last), device=last.device), last])[:, 0]  # type: ignore[no-any-return]

    return scores


def _context_length(model: Any) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


# --- on a base that is in memory ------------------------------------------------------------------------------


def can_share(run: Path, policy: RunConfig) -> bool:
    """Whether the run's adapter can be put on the policy's base: the same base as it came, and low-rank adapters on both."""
    if not (run / "run.yaml").is_file() or not (run / "adapter").is_dir() or (run / "base").is_dir():
        return False
    config = reward_run(run)
    same_base = (config.model.base, config.model.revision) == (policy.model.base, policy.model.revision)
    changed = policy.model.adapter is not None and policy.model.adapter_start != "continue"
    low_rank = all(c.method.kind in ("lora", "qlora", "dora") for c in (config, policy))
    same_storage = (config.method.kind == "qlora") == (policy.method.kind == "qlora")
    return same_base and not changed and low_rank and same_storage


def shared_reward_model(
    run: Path,
    model: Any,
    trunk: nn.Module,
    wearing: Callable[[str], contextlib.AbstractContextManager[None]],
    *,
    batch_size: int = DEFAULT_BATCH,
) -> RewardModel:
    """The run's adapter and head on `model`, a `PeftModel`; `trunk` is its part that makes hidden states, and `wearing(name)`
    switches to an adapter for a while. The caller takes the adapter `SHARED` off again."""
    tokenizer, template = _read_with(run)
    head = _put_on(model, run / "adapter")

    def hidden(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with wearing(SHARED):
            states: torch.Tensor = trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return states.to(head.weight.dtype)  # type: ignore[arg-type]

    longest = reward_run(run).data.max_length
    return RewardModel(str(run), tokenizer, template, scores_with(hidden, head), model.device, longest, batch_size, head)


def _put_on(model: Any, adapter_dir: Path) -> nn.Linear:
    """Add the adapter without its head to a causal model, and return the head."""
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    from finetuneflow.models.adapters import ADAPTER_WEIGHTS, check_adapter_dir

    check_adapter_dir(adapter_dir)
    tensors = load_file(adapter_dir / ADAPTER_WEIGHTS)
    heads = [name for name in tensors if f".{HEAD}." in name]
    if len(heads) != 1 or tensors[heads[0]].dim() != 2 or len(tensors[heads[0]]) != 1:
        raise ModelError(
            "ADAPTER_CORRUPT",
            f"The reward run's adapter holds {len(heads)} tensors of a score head; it should hold one, with one row.",
            where=str(adapter_dir),
            remedy="Train the reward model again.",
        )
    weight = tensors.pop(heads[0])
    try:
        config: Any = LoraConfig.from_pretrained(str(adapter_dir))
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
        with torch.random.fork_rng():
            model.add_adapter(SHARED, config)
        result: Any = set_peft_model_state_dict(model, tensors, adapter_name=SHARED)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _fits_not(adapter_dir, f"cannot be put on this base: {' '.join(str(error).split())[:200]}") from error
    if result.unexpected_keys:
        raise _fits_not(adapter_dir, f"has {len(result.unexpected_keys)} tensors that fit nowhere in this base")
    head = nn.Linear(weight.shape[1], 1, bias=False).to(device=model.device, dtype=weight.dtype).requires_grad_(False)
    head.load_state_dict({"weight": weight})
    return head


def _fits_not(adapter_dir: Path, what: str) -> ModelError:
    return ModelError(
        "ADAPTER_BASE_MISMATCH",
        f"The reward run's adapter {what}.",
        where=str(adapter_dir),
        remedy="Use a reward run on the same base model.",
    )
