"""Who takes part in PPO, on one base in memory: policy, reference and value estimate.

    policy       the adapter that is trained ("default"); one that was stacked or merged below it is part of the base
    reference    a frozen copy of the policy's adapter ("ref") where that was trained before; else the base alone
    value        an adapter of its own ("value"), and a linear head on the last hidden states; both start as those of a reward
                 model on the same base

With full fine-tuning there are no adapters to switch: the reference is a frozen copy of the model as it was at the start,
and the value is a linear head on the policy's own hidden states. Those are detached: a value estimate that pulled at the
policy's weights could undo what the clipped objective allows.

Dropout is off throughout, so that the ratio of new and old probabilities is exactly 1 before the first update.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetuneflow.errors import ModelError
from finetuneflow.models.adapters import REFERENCE, TRAINED, is_peft_model
from finetuneflow.training.ppo_math import entropy

VALUE = "value"
VALUE_FILE = Path("value") / "value.safetensors"  # in a folder of its own: loaders of the policy never see it
HEAD = "head."


@dataclass(frozen=True, slots=True)
class Answers:
    """Prompts with drawn answers, padded on the right.

    `ids`, `attention_mask` (rows, width); `tokens`, `mask` (rows, longest answer): the answers' tokens; `positions`, of the
    same shape, say where in `ids` the model predicts each of them.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int, device: Any) -> Answers:
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        ids, attention_mask = _right_padded(rows, pad)
        tokens, mask = _right_padded(answers, pad)
        before = torch.tensor([len(prompt) - 1 for prompt in prompts]).unsqueeze(1)
        positions = (before + torch.arange(tokens.shape[1])).clamp(max=ids.shape[1] - 1)
        parts = (ids, attention_mask, tokens, mask.bool(), positions)
        return cls(*(part.to(device) for part in parts))


def _right_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of shape (rows, longest row)."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=torch.long)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=torch.long)
    return ids, mask


class Actors:
    """The model in its roles. Its trained parameters (`policy_parameters`, `value_parameters`) take a gradient in every role,
    everything else in none; whatever role was taken last, the policy is active afterwards.

    `continued`: the policy's adapter was trained before, so a frozen copy of it is the reference.
    `reference`: a frozen model to be the reference of a full model; None: a copy of it.
    """

    def __init__(
        self,
        model: Any,
        *,
        temperature: float,
        compute_dtype: str,
        checkpointing: bool,
        seed: int,
        continued: bool = False,
        reference: Any = None,
    ) -> None:
        self.model = model
        self.temperature = temperature
        self.compute_dtype = getattr(torch, compute_dtype)
        self.causal = model.get_base_model() if is_peft_model(model) else model
        self.trunk = _trunk(self.causal)
        self.policy_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.head = nn.Linear(_hidden_size(self.causal), 1).to(model.device)
        nn.init.zeros_(self.head.weight)  # the first estimates are 0, not noise
        nn.init.zeros_(self.head.bias)
        self.has_adapters = is_peft_model(model)
        self.frozen_copy: Any = None
        self._value_adapter: dict[str, nn.Parameter] = {}
        self._own_adapters = list(getattr(model, "peft_config", ()))
        if self.has_adapters:
            _require_inside_layers(model)
            if continued:
                _add_frozen_copy(model)
            self._reference = REFERENCE if continued else None
            self._value_adapter = _add_value_adapter(model, seed)
        else:
            self.frozen_copy = (copy.deepcopy(model) if reference is None else reference).requires_grad_(False).eval()
        self.value_parameters = [*self._value_adapter.values(), *self.head.parameters()]
        self._checkpointing = checkpointing and _enable_checkpointing(model)
        model.eval()
        self._activate_policy()

    # --- roles --------------------------------------------------------------------------------------

    def log_probs(self, batch: Answers, *, with_entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probability of each answer token under the policy, and the entropy it was drawn with: (rows, longest answer)."""
        return self._log_probs(self.model, batch, with_entropy=with_entropy)

    def reference_log_probs(self, batch: Answers) -> torch.Tensor:
        """The same under the reference; never with a gradient."""
        with torch.no_grad(), self._as_reference() as model:
            return self._log_probs(model, batch)[0]

    def values(self, batch: Answers) -> torch.Tensor:
        """Estimate of the rewards still to come before each answer token is drawn: (rows, longest answer), fp32."""
        with self._as_value(), self.autocast():
            hidden = self.trunk(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
        values: torch.Tensor = self.head(hidden[rows, batch.positions].float()).squeeze(-1)
        return torch.where(batch.mask, values, 0.0)

    def autocast(self) -> Any:
        """Compute in the run's precision."""
        lowered = self.compute_dtype is not torch.float32
        return torch.autocast(self.model.device.type, dtype=self.compute_dtype, enabled=lowered)

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Inside, activations are recomputed where that was asked for. Only the layers' own switch is set: dropout stays off.

        A backward pass must run in the role of its forward pass then: hold `value_role` around both.
        """
        layers = _checkpointed_layers(self.model) if self._checkpointing else []
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[Any]:
        if not self.has_adapters:
            yield self.frozen_copy
        elif self._reference is None:
            try:
                with self.model.disable_adapter():
                    yield self.model
            finally:
                self._activate_policy()
        else:
            with self._switched(self._reference):
                yield self.model

    @contextlib.contextmanager
    def _as_value(self) -> Iterator[None]:
        if self.has_adapters:
            with self.value_role():
                yield
        else:
            with torch.no_grad():
                yield

    @contextlib.contextmanager
    def value_role(self) -> Iterator[None]:
        """Inside, the value adapter answers; nests. Hold it around forward and backward of a value loss."""
        if not self.has_adapters or self.model.base_model.active_adapters == [VALUE]:
            yield
            return
        with self._switched(VALUE):
            yield

    def start_value_as(self, adapter: str, head: nn.Linear, weight: float) -> bool:
        """Let the value estimate begin as `weight` times what a reward model on this base says, as Ouyang et al. (2022, appendix
        C.4) do: estimates that know the reward make for advantages with less noise. False where its adapter is of another shape."""
        if not _copy_adapter(self.model, adapter, VALUE):
            return False
        with torch.no_grad():
            self.head.weight.copy_(head.weight).mul_(weight)
        return True

    @contextlib.contextmanager
    def wearing(self, adapter: str) -> Iterator[None]:
        """Inside, the base answers with that adapter, one that was put beside the policy's."""
        with self._switched(adapter):
            yield

    @contextlib.contextmanager
    def _switched(self, adapter: str) -> Iterator[None]:
        self._activate(adapter)
        try:
            yield
        finally:
            self._activate_policy()

    def _activate_policy(self) -> None:
        if self.has_adapters:
            self._activate(TRAINED)

    def _activate(self, adapter: str) -> None:
        """Switch, and undo what PEFT does on the way: it would train the active adapter and freeze the others."""
        self.model.set_adapter(adapter)
        self.model.requires_grad_(False)
        for parameter in (*self.policy_parameters, *self.value_parameters):
            parameter.requires_grad_(True)

    def _log_probs(self, model: Any, batch: Answers, *, with_entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        first = int(batch.positions.min())
        options: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(self.causal.forward).parameters:  # logits of prompts are never made
            options["logits_to_keep"] = torch.arange(first, batch.ids.shape[1], device=batch.ids.device)
        with self.autocast():
            logits = model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False, **options).logits
        rows, columns = batch.mask.nonzero(as_tuple=True)
        places = batch.positions[rows, columns] - (first if options else 0)
        chosen = logits[rows, places].float() / self.temperature
        logs = torch.log_softmax(chosen, dim=-1)
        found = logs.gather(1, batch.tokens[rows, columns].unsqueeze(1)).squeeze(1)
        blank = torch.zeros(batch.mask.shape, device=found.device)
        spread = blank.index_put((rows, columns), entropy(logs)) if with_entropy else None
        return blank.index_put((rows, columns), found), spread

    # --- what is kept -----------------------------------------------------------------------------------

    def save_policy(self, folder: Path) -> None:
        """The policy alone, as any other run saves it."""
        if self.has_adapters:
            self.model.save_pretrained(folder, selected_adapters=[TRAINED], save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)
        else:
            self.model.save_pretrained(folder)

    def load_policy(self, folder: Path) -> None:
        """Put saved weights back into the policy."""
        if self.has_adapters:
            from finetuneflow.models.adapters import load_adapter_weights

            load_adapter_weights(self.model, folder, name=TRAINED)
            return
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype, local_files_only=True, use_safetensors=True)
        self.model.load_state_dict(saved.state_dict())

    def save_value(self, folder: Path) -> None:
        from safetensors.torch import save_file

        path = folder / VALUE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {HEAD + name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()}
        tensors |= {name: parameter.detach().cpu().contiguous() for name, parameter in self._value_adapter.items()}
        save_file(tensors, str(path))

    def load_value(self, folder: Path) -> None:
        from safetensors.torch import load_file

        tensors = load_file(str(folder / VALUE_FILE))
        self.head.load_state_dict({name.removeprefix(HEAD): t for name, t in tensors.items() if name.startswith(HEAD)})
        with torch.no_grad():
            for name, parameter in self._value_adapter.items():
                parameter.copy_(tensors[name])

    def dismiss(self) -> None:
        """Leave the model as it came: the policy active, and no adapter beside it that it did not bring."""
        for name in [name for name in getattr(self.model, "peft_config", ()) if name not in self._own_adapters]:
            self.model.delete_adapter(name)
        self.value_parameters, self._value_adapter = [], {}
        self._activate_policy()
        self.frozen_copy = None


def _require_inside_layers(model: Any) -> None:
    if model.active_peft_config.is_prompt_learning:
        raise ModelError(
            "ADAPTER_UNSUPPORTED",
            "PPO needs an adapter inside the layers, and a trained prefix is none.",
            remedy="Use the method lora (or qlora, dora, ia3), or train in full.",
        )


def _add_value_adapter(model: Any, seed: int) -> dict[str, nn.Parameter]:
    """An adapter of the policy's kind and size for the value; its first weights depend on the seed alone."""
    others = {name for name, _ in model.named_parameters()}
    changes = {"modules_to_save": None, "use_dora": False, "lora_dropout": 0.0, "bias": "none", "ensure_weight_tying": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(VALUE, _config_like_the_policys(model, **changes))
    return {name: parameter for name, parameter in model.named_parameters() if name not in others}


def _add_frozen_copy(model: Any) -> None:
    """The policy's adapter once more, as it is now."""
    with torch.random.fork_rng():
        model.add_adapter(REFERENCE, _config_like_the_policys(model))
    _copy_adapter(model, TRAINED, REFERENCE)


def _copy_adapter(model: Any, source: str, target: str) -> bool:
    """Give one adapter the weights of another; False, and nothing is changed, where the two are not of one shape."""
    weights = {name: _tensors_of(model, name) for name in (source, target)}
    if {name: tensor.shape for name, tensor in weights[source].items()} != {
        name: tensor.shape for name, tensor in weights[target].items()
    }:
        return False
    with torch.no_grad():
        for name, tensor in weights[target].items():
            tensor.copy_(weights[source][name])
    return True


def _tensors_of(model: Any, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their names without its own."""
    found = ((name.split("."), parameter) for name, parameter in model.named_parameters())
    return {".".join(part for part in parts if part != adapter): parameter for parts, parameter in found if adapter in parts}


def _config_like_the_policys(model: Any, **changes: Any) -> Any:
    """The configuration of a further adapter. An initialisation that takes from the base (PiSSA, OLoRA) would change it below
    everybody else, so it is the plain one."""
    config = copy.deepcopy(model.peft_config[TRAINED])
    for name, value in {"inference_mode": False, "init_lora_weights": True, **changes}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def _trunk(causal: Any) -> Any:
    """The layers without the output layer: from ids to the last hidden states."""
    trunk = causal.base_model
    if trunk is causal:
        raise ModelError(
            "MODEL_UNSUPPORTED_ARCH",
            f"{type(causal).__name__} does not say which part of it makes the hidden states that a value is estimated from.",
            remedy="Use the objective grpo or rloo, which need no value estimate.",
        )
    return trunk


def _hidden_size(causal: Any) -> int:
    config = causal.config.get_text_config() if hasattr(causal.config, "get_text_config") else causal.config
    return int(config.hidden_size)


def _checkpointed_layers(model: Any) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]


def _enable_checkpointing(model: Any) -> bool:
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return True
