"""`README.md` of a package: the model card, filled from the run. What was not measured is said to be unknown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from finetuneflow.config import parse_yaml
from finetuneflow.errors import FineTuneFlowError
from finetuneflow.export.record import OBJECTIVE_NAMES, RunRecord
from finetuneflow.export.redact import Redactor
from finetuneflow.export.report import adapter_size, used_learning_rate
from finetuneflow.export.text import duration, figure, inline, rate, size, visible
from finetuneflow.export.verify import Check
from finetuneflow.models.own import BUILT_IN, kept_record

FENCE = "---"
FRONT_MATTER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


def card_text(record: RunRecord, check: Check, redactor: Redactor, *, files_kind: str) -> str:
    """The card as Markdown with YAML front matter. `files_kind`: "adapter" or "model" (whole weights)."""
    sections = [
        _front_matter(record, files_kind),
        _opening(record, files_kind),
        _usage(record, files_kind),
        _intended_use(record),
        _training_data(record),
        _procedure(record),
        _results(record),
        _check(check, record, files_kind),
        _limits(record),
        _versions(record),
    ]
    return redactor.text("\n\n".join("\n".join(lines) for lines in sections if lines) + "\n")


def _front_matter(record: RunRecord, files_kind: str) -> list[str]:
    tags = ["finetuneflow", record.config.method.kind, record.config.training.objective]
    fields: dict[str, Any] = {
        "base_model": base_name(record),
        "library_name": "peft" if files_kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    if license_name := base_license(record):
        fields["license"] = license_name
    return [FENCE, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=10_000).strip(), FENCE]


def base_name(record: RunRecord) -> str:
    """The base model as others know it, on one line: its hub id, or the last part of a local folder (not the path to it)."""
    base = record.config.model.base
    folder = Path(os.path.expanduser(base))
    name = folder.name if folder.is_absolute() or folder.is_dir() else base
    return " ".join(visible(name).split())


def base_license(record: RunRecord) -> str | None:
    """The licence that the base model's own card states, if that card is on this disk."""
    for readme in _base_cards(record.config.model.base):
        try:
            head = FRONT_MATTER.match(readme.read_text(encoding="utf-8", errors="replace"))
            fields = parse_yaml(head.group(1), where=str(readme)) if head else None
        except (OSError, FineTuneFlowError):
            continue
        if isinstance(fields, dict) and isinstance(fields.get("license"), str):
            return str(fields["license"])
    return None


def _base_cards(base: str) -> Iterable[Path]:
    if base == "starter":
        yield Path(__file__).parents[1] / "models/starter/README.md"
        return
    folder = Path(os.path.expanduser(base))
    if folder.is_dir():
        yield folder / "README.md"
        return
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(base, "README.md")
    except (ImportError, ValueError):  # no hub client, or a name no hub model can have
        return
    if isinstance(cached, str):
        yield Path(cached)


def _opening(record: RunRecord, files_kind: str) -> list[str]:
    what = "A PEFT adapter" if files_kind == "adapter" else "A complete model"
    made = OBJECTIVE_NAMES[record.config.training.objective].lower()
    return [
        f"# {inline(record.name)}",
        "",
        f"{what} made from **{inline(base_name(record))}** with FineTuneFlow: {made}, {record.method}.",
    ]


def _usage(record: RunRecord, files_kind: str) -> list[str]:
    base = base_name(record)
    note, architecture = _own_architecture(record)
    quoted = repr(base.replace("`", "'"))  # a backtick could end the code block
    if files_kind == "adapter":
        load = [
            *architecture,
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'here = "."  # the folder of this file',
            f"base = AutoModelForCausalLM.from_pretrained({quoted})"
            + ("" if "/" in base else "  # the folder of that base model"),
            "model = PeftModel.from_pretrained(base, here)",
        ]
    else:
        load = [
            *architecture,
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'here = "."  # the folder of this file',
            "model = AutoModelForCausalLM.from_pretrained(here)",
        ]
    if record.config.training.objective == "sft":
        ask = [
            'messages = [{"role": "user", "content": "Hello!"}]',
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        ]
    else:
        ask = ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    end = [
        "output = model.generate(**inputs, max_new_tokens=100)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:]))',
    ]
    return ["## Use", "", *note, "```python", *load, "tokenizer = AutoTokenizer.from_pretrained(here)", *ask, *end, "```"]


def _own_architecture(record: RunRecord) -> tuple[list[str], list[str]]:
    """For an architecture that transformers does not bring: a word about its code, and the lines that register it."""
    if kept := kept_record(record.run_dir):
        stem = kept["file"].removesuffix(".py")
        note = (
            f"The architecture {inline(kept['model_type'])} is defined in `{kept['file']}` beside this file (SHA-256 `{kept['sha256']}`). "
            f"Read it before you run it. FineTuneFlow takes it as `model.module` of a run file."
        )
        return [note, ""], [f"import {stem}  # registers the architecture; this folder must be on Python's path"]
    if (model_type := base_model_type(record.config.model.base)) in BUILT_IN:
        note = f"The architecture {model_type} is part of FineTuneFlow (`pip install finetuneflow[train]`)."
        return [note, ""], [f"from {BUILT_IN[model_type]} import register", "", "register()"]
    return [], []


def base_model_type(base: str) -> str | None:
    """What the base's config.json says, where it lies on this disk."""
    try:
        config = json.loads((Path(os.path.expanduser(base)) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("model_type") if isinstance(config, dict) else None
    return found if isinstance(found, str) else None


def _intended_use(record: RunRecord) -> list[str]:
    if record.config.training.objective == "pretrain":
        use = "To continue text of the kind it was trained on. It was not taught to follow instructions by this training."
    else:
        use = "To answer prompts of the kind found in its training data, in the same chat template (`chat_template.jinja`)."
    return ["## Intended use", "", use]


def _training_data(record: RunRecord) -> list[str]:
    lines = ["## Training data", ""]
    files = [("training", f) for f in _files(record, "train")] + [("evaluation", f) for f in _files(record, "eval")]
    if files:
        lines += ["| Use | File | Size | SHA-256 |", "|---|---|---|---|"]
        lines += [
            f"| {use} | {inline(Path(str(f.get('file', '?'))).name)} | {_size(f.get('bytes'))} | {inline(str(f.get('sha256', 'unknown')))} |"
            for use, f in files
        ]
        lines.append("")
    lines.append(
        f"Examples used: {figure(record.data.get('train_examples'))} for training, {figure(record.data.get('eval_examples'))} held out; "
        f"{figure(record.data.get('avg_tokens'), 1)} tokens each on average, at most {record.config.data.max_length:,}."
    )
    return lines


def _files(record: RunRecord, use: str) -> list[dict[str, Any]]:
    return [file for file in record.data.get(use) or [] if isinstance(file, dict)]


def _procedure(record: RunRecord) -> list[str]:
    training, setup = record.config.training, record.environment.get("setup") or {}
    rows = [
        ("Method", record.method),
        ("LoRA rank", adapter_size(record)),
        ("Objective", OBJECTIVE_NAMES[training.objective]),
        (
            "Tokens in the loss",
            {"assistant": "assistant turns", "last": "the last assistant turn", "all": "all"}[record.config.data.supervise],
        ),
        ("Epochs", f"{training.epochs:g}" + (f", at most {training.max_steps:,} steps" if training.max_steps else "")),
        ("Examples per step", f"{training.effective_batch:,} ({training.batch_size} x {training.gradient_accumulation})"),
        ("Learning rate", f"{rate(used_learning_rate(record))}, {training.scheduler}, warm-up {training.warmup_ratio:.0%}"),
        ("Optimizer", f"{setup.get('optimizer') or training.optimizer}, weight decay {training.weight_decay:g}"),
        ("Compute type", str(setup.get("compute_dtype") or training.precision)),
        ("GPU", inline(record.device)),
        ("Seed", str(training.seed)),
    ]
    return ["## Training procedure", "", "| Setting | Value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _results(record: RunRecord) -> list[str]:
    metrics = record.metrics
    rows = [
        ("Train loss", figure(metrics.get("train_loss"))),
        ("Eval loss (held-out examples)", figure(metrics.get("eval_loss"))),
        ("Perplexity", figure(metrics.get("perplexity", metrics.get("eval_perplexity")), 3)),
        ("Training time", duration(metrics.get("train_runtime"))),
        ("Examples per second", figure(metrics.get("train_samples_per_second"), 2)),
        ("Peak memory", _size(metrics.get("peak_memory_bytes"))),
    ]
    if isinstance(share := metrics.get("suite_pass_share"), int | float):
        rows.append(
            (
                f"Acceptance suite {inline(str(metrics.get('suite', '')))}",
                f"{share:.1%} of {figure(metrics.get('suite_prompts'))} prompts passed",
            )
        )
    table = ["| Figure | Value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return ["## Results", "", *table, "", "![Loss curve](train_loss.png)"]


def _size(num_bytes: object) -> str:
    return size(num_bytes) if isinstance(num_bytes, int) else "not measured"


def _check(check: Check, record: RunRecord, files_kind: str) -> list[str]:
    lines = [
        "## Check of these files",
        "",
        f"Loaded again and compared with the trained model ({check.compared}): {check.agreement}.",
    ]
    if record.config.method.kind == "qlora" and files_kind == "model":
        lines += [
            "",
            "It was trained on the base in 4 bits, and its results were measured there; here the adapter is merged into the unquantised base.",
        ]
    return lines


def _limits(record: RunRecord) -> list[str]:
    return [
        "## Limits",
        "",
        f"- It inherits what {inline(base_name(record))} knows, gets wrong and is biased towards; its licence applies as well.",
        "- The figures above come from held-out examples of the same source; they say little about other kinds of input.",
        "- Its answers were not checked for truth or safety. Check them before anyone relies on them.",
    ]


def _versions(record: RunRecord) -> list[str]:
    hardware = record.environment.get("hardware") or {}
    packages = record.environment.get("packages") or hardware.get("packages") or {}
    shown = [f"- {inline(str(name))} {inline(str(version))}" for name, version in packages.items() if version]
    return ["## Versions", "", *shown] if shown else []
