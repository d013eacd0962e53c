"""Rules about the base model: its chat template, its tokens, its licence, its code. Sources on each page (`rules/CODE.md`)."""

from __future__ import annotations

import re
from typing import Any

from finetuneflow.knowledge.situation import LORA_KINDS, Hit, Situation, count, gb, rule
from finetuneflow.knowledge.values import ModelFacts

# A mark by which each built-in template is known, and the control tokens that it writes (tests hold both against the templates).
TEMPLATE_MARKS = {
    "chatml": "<|im_start|>",
    "llama2": "[INST]",
    "llama3": "<|start_header_id|>",
    "mistral": "[INST]",
    "gemma": "<start_of_turn>",
    "phi3": "<|end|>",
    "phi4": "<|im_sep|>",
    "alpaca": "### Response:",
    "vicuna": "ASSISTANT:",
    "plain": "Assistant:",
}
CONTROL_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|end|>",),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
}

# Identifiers of the hub's model cards. Creative Commons NC, and makers' own licences for research alone.
NON_COMMERCIAL = re.compile(r"(?:^|[-_.])(?:nc|non-?commercial|research(?:-only)?|mrl|mnpl|cc-by-nc[-\w.]*)(?:$|[-_.])", re.I)
TERMS = {
    "llama2": "no use to improve other models; a licence of its own above 700 million monthly users",
    "llama3": "the name of a tuned model begins with `Llama 3`; a licence of its own above 700 million monthly users",
    "llama3.1": "the name of a tuned model begins with `Llama`; a licence of its own above 700 million monthly users",
    "llama3.2": "the name of a tuned model begins with `Llama`; a licence of its own above 700 million monthly users",
    "llama3.3": "the name of a tuned model begins with `Llama`; a licence of its own above 700 million monthly users",
    "llama4": "the name of a tuned model begins with `Llama`; a licence of its own above 700 million monthly users",
    "gemma": "a list of prohibited uses that you have to pass on with the tuned model",
    "openrail": "restrictions of use that you have to pass on with the tuned model",
    "bigscience-bloom-rail-1.0": "restrictions of use that you have to pass on with the tuned model",
    "bigcode-openrail-m": "restrictions of use that you have to pass on with the tuned model",
    "creativeml-openrail-m": "restrictions of use that you have to pass on with the tuned model",
}
MERGED = re.compile(r"(?:^|[-_./\\])merged(?:$|[-_./\\])", re.I)


def _own_template(s: Situation, model: ModelFacts) -> str | None:
    """The model's template where another one is named that writes something else."""
    name, own = s.config.data.template, model.chat_template
    if own is None or name in ("auto", "own") or name not in TEMPLATE_MARKS or TEMPLATE_MARKS[name] in own:
        return None
    return own


def _family(template: str) -> str:
    known = [name for name, mark in TEMPLATE_MARKS.items() if mark in template]
    return f"looks like {known[0]}" if known else "is of another kind"


@rule("TEMPLATE_UNLIKE_MODEL", "error", "A chat template unlike the model's own")
def template_unlike_model(s: Situation, model: ModelFacts) -> Hit | None:
    own = _own_template(s, model)
    if own is None or s.config.data.template_consent:
        return None
    name = s.config.data.template
    return Hit(
        "data.template",
        f"{name}; the one of {model.name} {_family(own)}",
        f"The model's own template never writes {TEMPLATE_MARKS[name]!r}: turns and their end token would be learned anew, and the "
        "model forgets when to stop. The run refuses this without data.template_consent.",
        {"data.template": "auto"},
        safe=True,
    )


@rule("TEMPLATE_REPLACED", "warning", "The model's own chat template is replaced")
def template_replaced(s: Situation, model: ModelFacts) -> Hit | None:
    own = _own_template(s, model)
    if own is None or not s.config.data.template_consent:
        return None
    examples = f" from {s.data.examples:,} examples" if s.data else ""
    return Hit(
        "data.template",
        f"{s.config.data.template}, with consent; the one of {model.name} {_family(own)}",
        f"What the model learned about turns in its own format is not used: it has to be learned anew{examples}, and every "
        "program that serves the model must know the new format.",
        {"data.template": "auto", "data.template_consent": False},
    )


@rule("BASE_WITHOUT_TEMPLATE", "advice", "A base model without a chat template")
def base_without_template(s: Situation, model: ModelFacts) -> Hit | None:
    if model.chat_template is not None or not model.config or s.config.data.template not in ("auto", "own"):
        return None  # without a config no file of the model was read
    if s.config.training.objective != "sft" or (s.data is not None and s.data.kinds == ("text",)):
        return None
    examples = f" {s.data.examples:,} examples have to teach it." if s.data else ""
    return Hit(
        "model.base",
        f"{model.name} has no chat template",
        "It was never taught to answer or to stop. `User: … / Assistant: …` is used and kept with the result."
        f"{examples} With fewer than some 1,000 examples, an instruct version of the model is the better start.",
    )


@rule("TEMPLATE_TOKENS_UNTRAINED", "warning", "Control tokens that the adapter cannot learn")
def template_tokens_untrained(s: Situation, model: ModelFacts) -> Hit | None:
    method, name = s.config.method, s.config.data.template
    if (
        method.kind not in (*LORA_KINDS, "ia3")
        or model.chat_template is not None
        or not model.config
        or name not in CONTROL_TOKENS
    ):
        return None
    tokens = CONTROL_TOKENS[name]
    missing = [token for token in tokens if s.added_tokens is not None and token not in s.added_tokens]
    if missing:
        return Hit(
            "data.template",
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not in the tokenizer of {model.name}",
            f"{len(missing)} of the {len(tokens)} control tokens of {name} are spelled out letter by letter in every turn, and "
            "users can write them too. `plain` needs no tokens of its own.",
            {"data.template": "plain"},
        )
    saved = {module.rsplit(".", 1)[-1] for module in method.modules_to_save}
    embedding = s.shape.embedding_name if s.shape else "embed_tokens"
    head = s.shape.head_name if s.shape else "lm_head"
    needed = [embedding] if s.shape and s.shape.tied else [embedding, head]
    if saved & {embedding, head}:
        return None
    cost = ""
    if s.shape is not None:
        size = s.shape.embedding_parameters + s.shape.head_parameters
        cost = f" That trains {count(size)} more parameters ({gb(16 * size)})."
    return Hit(
        "method.modules_to_save",
        f"template {name} on {model.name}, a base model",
        f"{', '.join(tokens)} may never have been trained there: their embeddings are frozen, and the end of a turn has to be "
        f"learned through the adapter alone. Train {' and '.join(needed)} too, or use template plain.{cost}",
        {"method.modules_to_save": [*method.modules_to_save, *needed]},
    )


# --- terms, code, origin ------------------------------------------------------------------------------


@rule("MODEL_GATED", "warning", "A model that asks for consent before it is downloaded")
def model_gated(s: Situation, model: ModelFacts) -> Hit | None:
    if not model.gated:
        return None
    size = f" before {gb(2 * s.shape.num_parameters)} are downloaded" if s.shape else ""
    return Hit(
        "model.base",
        f"{model.name} is gated",
        f"The hub answers 401 or 403 until you have accepted its terms on the model's page and HF_TOKEN holds a token that may "
        f"read gated repositories. See to it{size}; consent can take days.",
    )


@rule("LICENCE_NON_COMMERCIAL", "warning", "A base model that must not be used commercially")
def licence_non_commercial(s: Situation, model: ModelFacts) -> Hit | None:
    if not model.licence or not NON_COMMERCIAL.search(model.licence):
        return None
    return Hit(
        "model.base",
        f"{model.name}: {model.licence}",
        "Tuned weights and adapters are derived from the base and fall under the same licence, which excludes commercial use. "
        "That holds for what this run makes, whoever owns the data.",
    )


@rule("LICENCE_WITH_TERMS", "advice", "A base model whose licence binds what you make of it")
def licence_with_terms(s: Situation, model: ModelFacts) -> Hit | None:
    terms: Any = TERMS.get((model.licence or "").lower())
    if terms is None:
        return None
    return Hit("model.base", f"{model.name}: {model.licence}", f"Its terms hold for tuned models too: {terms}.")


@rule("MODEL_OWN_CODE", "error", "A model that wants to run code of its own")
def model_own_code(s: Situation, model: ModelFacts) -> Hit | None:
    if not model.has_own_code or s.config.model.trust_remote_code or s.config.model.module:
        return None
    return Hit(
        "model.trust_remote_code",
        f"{model.name} brings Python code; consent: none",
        "It would run with your rights and could read your files and tokens. The run stops unless model.trust_remote_code names "
        "the exact commit that you have read; a model of the same family without own code is safer.",
    )


@rule("BASE_IS_MERGED", "advice", "A merged model as the base of another run")
def base_is_merged(s: Situation, model: ModelFacts) -> Hit | None:
    if not MERGED.search(s.config.model.base) or s.config.training.objective != "sft":
        return None
    rounding = "bfloat16 keeps 8 significant bits, so each merge rounds every weight by up to 0.2 %"
    return Hit(
        "model.base",
        s.config.model.base,
        f"An adapter that was merged cannot be taken out, compared or trained further; {rounding}. Train from the original base "
        "(`ftf resume` goes on with an adapter) and merge once, at the very end.",
    )
