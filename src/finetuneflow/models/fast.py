"""The fast path on a loaded model: what is installed, what a micro-batch costs, and the proof that it computes the same.

    fast = prepare_fast(model)          once, after adapters are attached
    fast.loss(model, micro_batch)       what `training.trainer` calls instead of the plain loss

Every run proves the path on its own model before the first step (`_differences`): on three short texts, loss and gradients must be
those of the plain path, and no gradient may cross from one packed text to another. What fails is left out, with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from finetuneflow.kernels import attention
from finetuneflow.kernels.loss import Head, summed_cross_entropy
from finetuneflow.models.fast_modules import KINDS, Replaced, replace_modules

IGNORED = -100
# Largest relative difference that rounding explains, of loss and of gradients. In 16 bits a handful of tokens leaves much of it;
# a path that computes something else is off by its whole size.
TOLERANCE = {torch.float32: (1e-4, 2e-3), torch.bfloat16: (2e-2, 0.2), torch.float16: (2e-2, 0.2)}
PROBE_LENGTHS = (9, 5, 12)
PROBED_TENSORS = 12

MicroBatch = Mapping[str, Any]
LossParts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(slots=True)
class FastPath:
    """How micro-batches are computed. `packs`: texts may share a row. `reasons` say what was left out, and why."""

    tap: HeadTap
    own_attention: str
    packs: bool = False
    replaced: list[Replaced] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def remove(self) -> None:
        """Leave the model as it was before."""
        self.restore_modules()
        self.tap.remove()
        _set_attention(self.tap.base, self.own_attention)

    def restore_modules(self) -> None:
        for replaced in reversed(self.replaced):
            replaced.restore()
        self.replaced = []

    def loss(self, model: Any, micro_batch: MicroBatch) -> LossParts:
        """(sum of the next-token cross-entropy in nats, supervised tokens, tokens predicted right) of a micro-batch.

        The number predicted right is counted without gradients only. A packed row belongs inside `layout(micro_batch)`, backward
        pass included.
        """
        targets = micro_batch["targets"].reshape(-1)
        positions = (targets != IGNORED).nonzero()[:, 0]
        inputs = {name: micro_batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in micro_batch}
        total, correct = self.tap.loss(model, inputs, positions, targets[positions])
        return total, torch.tensor(len(positions), device=total.device), correct

    @contextlib.contextmanager
    def layout(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch."""
        with attention.packed(micro_batch["lengths"]) if "lengths" in micro_batch else contextlib.nullcontext():
            yield


class HeadTap:
    """Stands before the output layer: while `loss` runs, the supervised positions alone reach it.

    With `fused`, they do not even become logits there: the loss is computed from the hidden states (`kernels.loss`), and the model's
    own forward pass gets it for logits, so that DDP finds all that has a gradient behind the output. Else the model's own head and
    what it does to logits run on them.
    """

    def __init__(self, model: Any) -> None:
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.layer = self.base.get_output_embeddings()
        if self.layer is None:
            raise NotImplementedError("a model that names no output layer")
        self.head = head_of(self.base.config)
        self.fused = _is_plain_linear(self.layer)
        self._positions: torch.Tensor | None = None
        self._targets: torch.Tensor | None = None
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None
        self._own_forward = self.layer.forward
        self.layer.forward = self._forward
        self.installed = True

    def remove(self) -> None:
        """Give the output layer its own forward pass back."""
        self.layer.forward = self._own_forward
        self.installed = False

    def loss(
        self, model: Any, inputs: Mapping[str, Any], positions: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._positions, self._targets = positions, targets
        try:
            logits = model(**inputs).logits
            found = self._found
        finally:
            self._positions = self._targets = self._found = None
        if found is not None:
            return found
        logits = logits.reshape(-1, logits.shape[-1]).float()
        correct = (logits.detach().argmax(dim=-1) == targets).sum()
        return functional.cross_entropy(logits, targets, reduction="sum"), correct

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._positions is None or self._targets is None:
            return self._own_forward(hidden)  # type: ignore[no-any-return]
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._positions)
        if not self.fused:
            return self._own_forward(chosen[None])  # type: ignore[no-any-return]
        layer = _active(self.layer)
        self._found = summed_cross_entropy(chosen, layer.weight, self._targets, bias=getattr(layer, "bias", None), head=self.head)
        return self._found[0].view(1, 1, 1)


def head_of(config: Any) -> Head:
    """What a model does to its logits, by the names that transformers' configurations give it; the probe finds what is missing."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(scale=scale, cap=getattr(config, "final_logit_softcapping", None))


def _active(layer: Any) -> Any:
    """The layer that computes: of one that PEFT trains a copy of, that copy."""
    saved = getattr(layer, "modules_to_save", None)
    return saved[layer.active_adapter] if saved is not None and not layer.disable_adapters else layer


def _is_plain_linear(layer: Any) -> bool:
    active = _active(layer)
    return type(active) is torch.nn.Linear or type(active).__name__ == "NonDynamicallyQuantizableLinear"


# --- installing and proving -------------------------------------------------------------------------------


def prepare_fast(model: Any) -> FastPath | None:
    """Install the path on `model`, prove it, and leave out what cannot be proven; None where nothing is left of it.

    Dropout is off while it is proven, and random state, weights and gradients are afterwards what they were before.
    """
    try:
        tap = HeadTap(model)
    except (NotImplementedError, AttributeError):
        return None
    fast = FastPath(tap, own_attention=tap.base.config._attn_implementation)
    probe = Probe(model, fast)
    if tap.fused and (trouble := probe.differs(packed=False)):
        fast.reasons.append(f"the loss goes through the model's own output layer ({trouble})")
        tap.fused = False
    if not tap.fused and (trouble := probe.differs(packed=False)):
        tap.remove()
        return None
    _replace_proven(fast, probe)
    trouble = "its attention has no packed form"
    for implementation in (attention.register(), fast.own_attention):
        if not _set_attention(tap.base, implementation):
            continue
        trouble = probe.differs(packed=True) or probe.leaks()
        if not trouble:
            fast.packs = True
            return fast
    _set_attention(tap.base, fast.own_attention)
    fast.reasons.append(f"texts are padded instead of packed ({trouble})")
    return fast


def fuse_modules(model: Any) -> FastPath | None:
    """The modules of the path alone, for a trainer that brings its own loss and its own batches; None where nothing is replaced."""
    try:
        tap = HeadTap(model)
    except (NotImplementedError, AttributeError):
        return None
    tap.fused = False
    fast = FastPath(tap, own_attention=tap.base.config._attn_implementation)
    probe = Probe(model, fast)
    if not probe.differs(packed=False):
        _replace_proven(fast, probe)
    tap.remove()
    return fast if fast.replaced else None


def _replace_proven(fast: FastPath, probe: Probe) -> None:
    """All kinds of modules at once; where that is not the plain path, each kind that is by itself."""
    fast.replaced = replace_modules(fast.tap.base)
    if not fast.replaced or not probe.differs(packed=False):
        return
    fast.restore_modules()
    for kind in KINDS:
        found = replace_modules(fast.tap.base, [kind])
        if not found:
            continue
        if trouble := probe.differs(packed=False):
            for replaced in found:
                replaced.restore()
            fast.reasons.append(f"{kind} modules compute as they came ({trouble})")
        else:
            fast.replaced += found


def _set_attention(base: Any, implementation: str) -> bool:
    if base.config._attn_implementation == implementation:
        return True
    if base.config._attn_implementation != "sdpa" and implementation == attention.NAME:
        return False  # what a model computes in another way, it computes so for a reason
    try:
        base.set_attn_implementation(implementation)
    except (ValueError, ImportError, AttributeError, KeyError):
        return False
    return bool(base.config._attn_implementation == implementation)


class Probe:
    """Three short texts, through the plain path and through the fast one. Random state and weights are as before."""

    def __init__(self, model: Any, fast: FastPath) -> None:
        self.model = model
        self.fast = fast
        device = next(model.parameters()).device
        vocabulary = fast.tap.base.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        self.texts = [torch.randint(0, vocabulary, (length,), generator=generator).to(device) for length in PROBE_LENGTHS]
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        step = max(len(trained) // PROBED_TENSORS, 1)
        self.probed = [p for _, p in trained[::step]]
        self.fresh = [p for name, p in trained if "lora_B" in name or "lora_embedding_B" in name]
        self._plain: tuple[torch.Tensor, list[torch.Tensor]] | None = None

    def differs(self, *, packed: bool) -> str:
        """Why the fast path is not the plain one on these texts; empty where it is."""
        try:
            with self._undisturbed():
                if self._plain is None:
                    self._plain = self._gradients(self._plain_loss, packed=False)
                loss, gradients = self._gradients(self._fast_loss, packed=packed)
        except (NotImplementedError, RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        expected_loss, expected = self._plain
        of_loss, of_gradients = TOLERANCE.get(self._compute_type(), TOLERANCE[torch.bfloat16])
        if not _relative(loss, expected_loss) <= of_loss:
            return f"the loss of a probe is {float(loss):.6g}, not {float(expected_loss):.6g}"
        # Gradients are compared in the order of the texts, padding left out.
        # One that is zero but for rounding (of a key's bias) is measured against the largest.
        floor = 1e-3 * of_gradients * max(float(wanted.float().norm()) for wanted in expected)
        off = max(_relative(found, wanted, floor) for found, wanted in zip(gradients, expected, strict=True))
        return "" if off <= of_gradients else f"gradients of a probe differ by {off:.1%}"

    def leaks(self) -> str:
        """Whether the loss of the last text has a gradient at the tokens of the others: exactly none may be there."""
        with self._undisturbed():
            _, (at_tokens, *_) = self._gradients(lambda packed: self._fast_loss(packed, only_last=True), packed=True)
        earlier = at_tokens[: sum(PROBE_LENGTHS[:-1])]
        return "texts that share a row see each other" if bool((earlier != 0).any()) else ""

    def _compute_type(self) -> torch.dtype:
        device = self.texts[0].device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.fast.tap.base.get_input_embeddings().weight.dtype  # type: ignore[no-any-return]

    def _gradients(self, compute: Any, *, packed: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(loss, gradients): at the embedded tokens (all tokens, width), then of some trained tensors."""
        embedded: list[torch.Tensor] = []

        def keep(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            embedded.append(output if output.requires_grad else output.requires_grad_())
            return embedded[-1]

        hook = self.fast.tap.base.get_input_embeddings().register_forward_hook(keep)
        try:
            with attention.packed(PROBE_LENGTHS) if packed else contextlib.nullcontext():
                loss = compute(packed)
                at_tokens, *others = torch.autograd.grad(loss, [embedded[0], *self.probed], allow_unused=True)
        finally:
            hook.remove()
        if packed:
            flat = at_tokens[0]
        else:
            flat = torch.cat([at_tokens[i, :length] for i, length in enumerate(PROBE_LENGTHS)])
        pairs = zip(others, self.probed, strict=True)
        return loss.detach(), [flat, *(torch.zeros_like(p) if g is None else g for g, p in pairs)]

    def _micro_batch(self, packed: bool, only_last: bool = False) -> dict[str, Any]:
        targets = [torch.cat([text[1:], text.new_tensor([IGNORED])]) for text in self.texts]
        for target in targets:
            target[: len(target) // 3] = IGNORED
        if only_last:
            targets = [*(torch.full_like(target, IGNORED) for target in targets[:-1]), targets[-1]]
        if packed:
            positions = torch.cat([torch.arange(len(text), device=text.device) for text in self.texts])
            return {
                "input_ids": torch.cat(self.texts)[None],
                "position_ids": positions[None],
                "targets": torch.cat(targets)[None],
                "lengths": PROBE_LENGTHS,
            }
        ids = torch.nn.utils.rnn.pad_sequence(self.texts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in self.texts], batch_first=True)
        padded = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "targets": padded}

    def _fast_loss(self, packed: bool, only_last: bool = False) -> torch.Tensor:
        return self.fast.loss(self.model, self._micro_batch(packed, only_last))[0]

    def _plain_loss(self, packed: bool) -> torch.Tensor:
        micro_batch = self._micro_batch(packed=False)
        targets = micro_batch.pop("targets")
        logits = self.model(**micro_batch).logits.float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Evaluation mode, so that no dropout differs; adapters that still do nothing (B = 0) do something meanwhile."""
        was_training = self.model.training
        kept = [p.detach().clone() for p in self.fresh]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for p in self.fresh:
                p.data.normal_(std=0.02)
            self.model.eval()
            try:
                yield
            finally:
                self.model.train(was_training)
                for p, before in zip(self.fresh, kept, strict=True):
                    p.data.copy_(before)


def _relative(found: torch.Tensor, wanted: torch.Tensor, floor: float = 0.0) -> float:
    """Distance as a share of the size, of what is smaller than `floor` as a share of that."""
    found, wanted = found.float(), wanted.float()
    size = max(float(wanted.norm()), floor)
    return float((found - wanted).norm()) / size if size else float(found.norm())


def describe(fast: FastPath | None) -> str:
    """What the path does on this model, for the run's decisions."""
    if fast is None:
        return "The plain path: what is faster on other models cannot be proven equal on this one."
    parts = []
    if fast.tap.installed:
        parts.append("texts are packed behind one another" if fast.packs else "texts of like length are padded together")
        parts.append(
            "the loss is computed in chunks at the supervised positions" if fast.tap.fused else "logits at supervised positions"
        )
    counts = {kind: sum(r.kind == kind for r in fast.replaced) for kind in KINDS}
    parts += [f"{count} {kind} modules fused" for kind, count in counts.items() if count]
    left_out = f" Left out: {'; '.join(fast.reasons)}." if fast.reasons else ""
    return f"Proven equal on this model: {', '.join(parts)}.{left_out}"
