"""A trial of a model of one's own: does it do what training, generation, padding and export rely on?

It is asked eight tokens when it is first loaded, once per process for each module file. What a file promises
before there is a model is looked at in `own.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetuneflow.models.own import OwnArchitecture, invalid, no_cache, running

NEEDED_SETTINGS = ("vocab_size", "hidden_size", "num_hidden_layers")

_checked: set[tuple[str, bool]] = set()  # (SHA-256 of the file, quantised): models that have passed


def check_model(model: Any, own: OwnArchitecture) -> None:
    """Ask a model of one's own a few tokens, and see that it does what training, generation and export rely on.

    Once per process for each file (and once more for quantised weights). Raises MODEL_MODULE_INVALID with what to change.
    """
    from finetuneflow.models.adapters import is_quantized

    quantized = is_quantized(model)
    if (own.sha256, quantized) in _checked:
        return
    missing = [name for name in NEEDED_SETTINGS if not isinstance(getattr(model.config, name, None), int)]
    if missing:
        raise invalid(
            own.path,
            f"its configuration has no {', '.join(missing)}",
            "Give them under these names: cache, plan and report read them.",
        )
    _require_ends(model, own)
    if quantized:
        _require_quantized_layers(model, own)
    directly = " with quantised weights (which no layer's `.weight` may be read for)" if quantized else ""
    with running(Path(str(own.python.__file__)), f"a trial of the model{directly}"):
        _trial(model, own, quantized=quantized)
    _checked.add((own.sha256, quantized))


def _require_ends(model: Any, own: OwnArchitecture) -> None:
    """The token table and the output layer can be found."""
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        table = None
    if getattr(table, "weight", None) is None:
        raise invalid(
            own.path,
            "its token table is not found",
            "Call it embed_tokens, or define get_input_embeddings(self) that returns the nn.Embedding.",
        )
    if getattr(model.get_output_embeddings(), "weight", None) is None:
        raise invalid(
            own.path,
            "its output layer is not found",
            "Call it lm_head, or define get_output_embeddings(self) that returns the nn.Linear onto the vocabulary.",
        )


def _require_quantized_layers(model: Any, own: OwnArchitecture) -> None:
    if not any("bnb" in type(module).__module__ or "bitsandbytes" in type(module).__module__ for module in model.modules()):
        raise invalid(
            own.path,
            "nothing of it can be quantised: it has no nn.Linear besides the output layer",
            "Use the method lora or full; only weights of nn.Linear are stored in 4 or 8 bits.",
        )


def _trial(model: Any, own: OwnArchitecture, *, quantized: bool) -> None:
    """Logits of eight tokens; the same with another last token, with padding before them, and by generation."""
    import torch

    rows = model.config.vocab_size
    ids = torch.arange(3, 11, device=model.device).remainder(rows)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = _logits(model, ids, own)
            spread, rounding = float(logits.std()), torch.finfo(model.dtype).eps
            changed = ids.clone()
            changed[0, -1] = (ids[0, -1] + 1) % rows
            # The same shapes are computed in the same order: without quantisation nothing but looking ahead makes a difference.
            ahead = _apart(_logits(model, changed, own)[:, :-1], logits[:, :-1])
            if ahead > spread * (0.05 if quantized else 1e-4):
                raise invalid(
                    own.path,
                    "its logits at a token depend on the tokens after it",
                    "A model that is trained to predict the next token must not see it: mask attention, shift convolutions to the left.",
                )
            allowed = spread * max(5e-3, 16 * rounding) * (10 if quantized else 1)
            if getattr(own.config_class, "masks_padding", False):
                _try_padding(model, ids, logits, allowed, own)
            _try_generation(model, ids, allowed, own)
    finally:
        model.train(was_training)


def _logits(model: Any, ids: Any, own: OwnArchitecture, mask: Any = None) -> Any:
    import torch

    output = model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask)
    logits = getattr(output, "logits", None)
    wanted = (*ids.shape, model.config.vocab_size)
    if logits is None or tuple(logits.shape) != wanted:
        found = "none" if logits is None else tuple(logits.shape)
        raise invalid(
            own.path,
            f"its forward returns logits of shape {found} instead of {wanted}",
            "Return CausalLMOutput(logits=logits) with logits of shape (batch, tokens, vocabulary).",
        )
    return logits.float()


def _apart(one: Any, other: Any) -> float:
    return float((one - other).abs().max())


def _try_padding(model: Any, ids: Any, logits: Any, allowed: float, own: OwnArchitecture) -> None:
    """The promise `masks_padding`: tokens before the text that the mask hides change nothing."""
    import torch

    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], dim=1)
    mask = torch.cat([torch.zeros_like(ids[:, :3]), torch.ones_like(ids)], dim=1)
    if _apart(_logits(model, padded, own, mask)[:, 3:], logits) > allowed:
        raise invalid(
            own.path,
            "its configuration says masks_padding, and padding before a text changes its logits",
            "Keep hidden tokens out of every state, convolution and position, or leave masks_padding out: batches then have equal lengths.",
        )


def _try_generation(model: Any, ids: Any, allowed: float, own: OwnArchitecture) -> None:
    """Each step of generation sees all tokens before it: its logits are those of one pass over the whole text."""
    import torch
    from transformers import GenerationConfig

    asked = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    settings: Any = GenerationConfig(**asked, return_dict_in_generate=True, output_logits=True)  # type: ignore[no-untyped-call]
    before, model.generation_config = model.generation_config, settings
    try:
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    finally:
        model.generation_config = before
    whole = _logits(model, written.sequences, own)[0, ids.shape[1] - 1 : -1]
    if _apart(torch.cat(written.logits).float(), whole) > allowed:
        raise no_cache(own.path)


def without_checkpointing(model: Any) -> str | None:
    """Let a model whose file does not know gradient checkpointing pass it over; the note says so."""
    if getattr(model, "supports_gradient_checkpointing", False):
        return None
    model.gradient_checkpointing_enable = _pass_over
    return (
        f"{type(model).__name__} does not support gradient checkpointing: activations are kept, whatever the run file asks for."
    )


def _pass_over(*_: Any, **__: Any) -> None:
    """Stands for `gradient_checkpointing_enable` where there is nothing to enable."""
