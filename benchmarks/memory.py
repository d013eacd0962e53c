"""Predicted against measured peak memory: shapes x methods x batches x lengths x objectives, each in a process of its own.

Every setting trains two optimizer steps (a mixture of experts ten: its kernels' cache fills) through `ftf train`'s own engine on random weights, so that the optimizer's states
exist when the second step needs its activations. Measured is the highest resident memory of the process (CPU), or
CUDA's highest allocated and reserved bytes. Half of the settings were held out: the estimate's constants were fixed
before those were measured.

    python -m benchmarks memory                     measure, predict, write results/memory.json and the plot
    python -m benchmarks.memory --device cuda       the same on a GPU (results/memory_cuda.json)
    python -m benchmarks.memory --again             predict anew for stored measurements
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, run_contender, write_result

PLOT = Path(__file__).parents[1] / "docs" / "images" / "memory_predicted_measured.png"
ROWS = 24

# The shapes are those of known models (Llama, SmolLM2-135M/-360M, GPT-2, Mixtral, Qwen3), some of them made smaller.
LLAMA = {
    "model_type": "llama",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-30m": {**LLAMA, "vocab_size": 32_000, "hidden_size": 384, "intermediate_size": 1_024, "num_hidden_layers": 10, "num_attention_heads": 6, "num_key_value_heads": 6},
    "llama-135m": {**LLAMA, "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "llama-360m": {**LLAMA, "vocab_size": 49_152, "hidden_size": 960, "intermediate_size": 2_560, "num_hidden_layers": 32, "num_attention_heads": 15, "num_key_value_heads": 5},
    "gpt2-124m": {"model_type": "gpt2", "vocab_size": 50_257, "n_positions": 1_024, "n_embd": 768, "n_layer": 12, "n_head": 12, "eos_token_id": 1, "bos_token_id": 1},
    "moe-140m": {**LLAMA, "model_type": "mixtral", "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1_024, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3-130m": {**LLAMA, "model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 512, "intermediate_size": 1_536, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """`prompt`: share of each row that is prompt, and so not supervised. Of the objectives that draw answers `length` is the
    prompt's, `new_tokens` the answers', and `more` holds settings of their own."""

    shape: str
    method: str
    batch: int
    length: int
    checkpointing: bool = False
    held_out: bool = False
    optimizer: str = "auto"
    dropout: float = 0.05
    accumulation: int = 1
    precision: str = "auto"
    prompt: float = 0.25
    steps: int = 2
    objective: str = "sft"
    new_tokens: int = 0
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        objective = "" if self.objective == "sft" else f" {self.objective}"
        width = f"{self.batch}x{self.length}" + (f"+{self.new_tokens}" if self.new_tokens else "")
        extra = [f"{key} {value}" for key, value in (("accumulate", self.accumulation),) if value != 1]
        extra += [self.optimizer] if self.optimizer != "auto" else []
        extra += [self.precision] if self.precision != "auto" else []
        extra += ["checkpointing"] if self.checkpointing else []
        extra += [f"{key.rpartition('.')[2]} {value}" for key, value in self.more]
        return f"{self.shape}{objective} {self.method} {width}" + "".join(f", {text}" for text in extra)


ONE_ROUND = (("reinforcement.rollout_size", 8), ("reinforcement.update_epochs", 1))  # what repeats takes time, not memory

SETTINGS = (
    Setting("starter", "lora", 4, 256),
    Setting("starter", "full", 8, 512, held_out=True),
    Setting("llama-30m", "lora", 4, 512),
    Setting("llama-30m", "qlora", 8, 256, held_out=True),
    Setting("llama-30m", "full", 2, 512),
    Setting("llama-30m", "full", 4, 1024, checkpointing=True, held_out=True),
    Setting("llama-135m", "lora", 4, 256),
    Setting("llama-135m", "lora", 2, 1024, checkpointing=True),
    Setting("llama-135m", "lora", 8, 128, precision="fp32", held_out=True),
    Setting("llama-135m", "qlora", 2, 512),
    Setting("llama-135m", "dora", 2, 256),
    Setting("llama-135m", "full", 2, 256),
    Setting("llama-135m", "full", 4, 128, accumulation=2, held_out=True),
    Setting("llama-135m", "full", 1, 512, checkpointing=True, optimizer="adamw_8bit", held_out=True),
    Setting("llama-360m", "lora", 1, 512),
    Setting("llama-360m", "qlora", 2, 256, checkpointing=True, held_out=True),
    Setting("llama-360m", "full", 1, 128, optimizer="adafactor", held_out=True),
    Setting("gpt2-124m", "lora", 2, 512),
    Setting("gpt2-124m", "full", 2, 256, held_out=True),
    Setting("moe-140m", "lora", 2, 512, steps=10),
    Setting("moe-140m", "full", 2, 128, held_out=True, steps=10),
    Setting("qwen3-130m", "lora", 2, 256),
    Setting("qwen3-130m", "qlora", 4, 256, checkpointing=True, held_out=True),
    Setting("qwen3-130m", "dora", 1, 512, held_out=True),
    # Preferences: a row of a pair is two.
    Setting("llama-30m", "lora", 2, 512, objective="dpo"),
    Setting("llama-135m", "lora", 2, 256, objective="dpo", held_out=True),
    Setting("llama-30m", "full", 2, 256, objective="dpo"),
    Setting("llama-135m", "full", 1, 256, objective="dpo", held_out=True),
    Setting("llama-135m", "lora", 2, 256, objective="dpo", checkpointing=True, held_out=True),
    Setting("qwen3-130m", "qlora", 1, 256, objective="dpo", held_out=True),
    Setting("llama-30m", "lora", 4, 512, objective="kto"),
    Setting("llama-135m", "full", 2, 256, objective="kto", held_out=True),
    Setting("llama-30m", "lora", 2, 512, objective="orpo"),
    Setting("llama-135m", "full", 1, 256, objective="orpo", held_out=True),
    Setting("llama-135m", "lora", 2, 256, objective="simpo", held_out=True),
    Setting("llama-30m", "lora", 4, 512, objective="reward"),
    Setting("llama-135m", "full", 2, 256, objective="reward", held_out=True),
    # Drawn answers: prompts and new tokens.
    Setting("llama-30m", "lora", 4, 128, new_tokens=64, accumulation=4, objective="grpo"),
    Setting("llama-135m", "lora", 2, 128, new_tokens=32, accumulation=8, objective="grpo"),
    Setting("llama-135m", "full", 2, 64, new_tokens=32, accumulation=4, objective="grpo", held_out=True),
    Setting("llama-30m", "lora", 4, 256, new_tokens=32, accumulation=8, objective="rloo", held_out=True),
    Setting("llama-30m", "lora", 4, 128, new_tokens=32, objective="ppo", more=ONE_ROUND),
    Setting("llama-135m", "lora", 2, 128, new_tokens=32, objective="ppo", held_out=True, more=ONE_ROUND),
    Setting("llama-30m", "full", 4, 64, new_tokens=32, objective="ppo", more=ONE_ROUND),
    Setting("llama-135m", "full", 2, 64, new_tokens=32, objective="ppo", held_out=True, more=ONE_ROUND),
)  # fmt: skip


# --- measuring ----------------------------------------------------------------------------------------


def save_base(shape: str, folder: Path) -> None:
    """Random weights of the shape in bfloat16, as models are published, and a tokenizer of one token per character."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    characters = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def write_rows(path: Path, setting: Setting) -> None:
    """Rows a little longer than the limit, and some a little shorter, so that batches are full and padded."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz "
    with path.open("w") as file:
        for index in range(ROWS):
            longer = 5.0 if setting.shape == "starter" else 1.1  # the starter's tokens are longer than a character
            length = round(setting.length * (longer if index % 2 else 0.8))
            prompt = round(length * setting.prompt)
            text, other = ("".join(rng.choice(letters) for _ in range(length)) for _ in range(2))
            file.write(json.dumps(row_of(setting, text, other[prompt:], prompt, index)) + "\n")


def row_of(setting: Setting, text: str, other: str, prompt: int, index: int) -> dict[str, Any]:
    """A row in the form that the objective takes. `other`: an ending as long as that of `text`."""
    if setting.objective == "sft":
        return {"instruction": text[:prompt], "output": text[prompt:]}
    if setting.objective == "kto":
        return {"prompt": text[:prompt], "completion": text[prompt:], "label": index % 4 < 2}
    if setting.new_tokens:
        return {"prompt": text[: setting.length - 17], "answer": "none"}  # the template writes 17 characters around it
    return {"prompt": text[:prompt], "chosen": text[prompt:], "rejected": other}


def run_config(setting: Setting, base: str, rows: str, device: str) -> dict[str, Any]:
    values = base_config(setting, base, rows, device)
    if setting.new_tokens:
        values["reinforcement"] = {"reward": ["length:20"], "max_new_tokens": setting.new_tokens, "samples_per_prompt": 4}
        values["training"]["eval_batch_size"] = setting.batch
    for key, value in setting.more:
        section, _, name = key.partition(".")
        values[section][name] = value
    return values


def base_config(setting: Setting, base: str, rows: str, device: str) -> dict[str, Any]:
    return {
        "name": "memory",
        "model": {"base": base},
        "data": {"train": rows, "max_length": setting.length, "eval_fraction": 0},
        "method": {"kind": setting.method, "target_modules": "auto" if "moe" in setting.shape else "all-linear", "dropout": setting.dropout},
        "training": {
            "objective": setting.objective,
            "device": device,
            "max_steps": setting.steps,
            "epochs": 100,
            "batch_size": setting.batch,
            "gradient_accumulation": setting.accumulation,
            "gradient_checkpointing": "on" if setting.checkpointing else "off",
            "optimizer": setting.optimizer,
            "precision": setting.precision,
            "learning_rate": 1e-5,
            "log_steps": 1,
            "threads": 2,
        },
        "evaluation": {"samples": 0},
    }  # fmt: skip


def measure(index: int, folder: str, device: str) -> None:
    """One setting, in this process. Prints what was measured and what the run knew about its data."""
    import torch

    from finetuneflow.config import build_config
    from finetuneflow.training.progress import peak_resident_bytes
    from finetuneflow.training.run import train
    from finetuneflow.training.setup import bf16_is_fast
    from finetuneflow.workspace import Workspace

    setting, home = SETTINGS[index], Path(folder)
    rows = home / f"rows-{index}.jsonl"
    write_rows(rows, setting)
    base = "starter" if setting.shape == "starter" else str(home / setting.shape)
    config, origins = build_config(run_config(setting, base, str(rows), device))
    peaks: dict[str, int] = {}

    def sink(event: dict[str, Any]) -> None:
        if event["event"] == "phase":
            peaks[event["name"]] = peak_resident_bytes()

    began = time.perf_counter()
    result = train(config, workspace=Workspace(home / f"workspace-{index}"), origins=origins, sinks=[sink])
    manifest = json.loads((result.run_dir / "data" / "manifest.json").read_text())
    cuda = {"reserved_bytes": torch.cuda.max_memory_reserved()} if device == "cuda" else {}
    print(
        json.dumps(
            {
                "measured_bytes": result.metrics["peak_memory_bytes"],
                "before_loading_bytes": peaks["loading"],
                "before_training_bytes": peaks["training"],
                **cuda,
                "trainable_parameters": result.metrics["trainable_parameters"],
                "total_parameters": result.metrics["total_parameters"],
                "supervised_share": manifest["supervised_share"],
                "bf16": bf16_is_fast(device),
                "seconds": time.perf_counter() - began,
            }
        )
    )


# --- predicting ---------------------------------------------------------------------------------------


def predict(setting: Setting, measured: dict[str, Any], device: str, memory_bytes: int) -> dict[str, Any]:
    """The estimate as planning asks for it: from the model's config.json, the run file, the machine and the data's figures."""
    from finetuneflow.config import build_config
    from finetuneflow.knowledge.memory import estimate
    from finetuneflow.knowledge.shapes import shape_from_config
    from finetuneflow.knowledge.values import DataFacts, Device, Machine

    machine = Machine((Device(device, device, memory_bytes, bf16=measured["bf16"]),), memory_bytes, cores=2)  # type: ignore[arg-type]
    config, _ = build_config(run_config(setting, "base", "rows.jsonl", device))
    data = DataFacts(
        examples=ROWS,
        mean_tokens=setting.length,
        length_percentiles=(setting.length,) * 101,
        supervised_share=measured["supervised_share"],
        counted=True,
    )
    found = estimate(shape_from_config(model_config(setting.shape)), config, machine, data=data)
    # CUDA's counters do not see the context.
    predicted = found.total_bytes - (found.breakdown["runtime"] if device == "cuda" else 0)
    return {
        "predicted_bytes": predicted,
        "error": predicted / measured["measured_bytes"] - 1,
        "phase": found.phase,
        "breakdown": found.breakdown,
    }


def model_config(shape: str) -> dict[str, Any]:
    if shape != "starter":
        return SHAPES[shape]
    from finetuneflow.models.starter import starter_path

    return dict(json.loads((starter_path() / "config.json").read_text()))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [abs(row["error"]) for row in rows]
    return {"settings": len(rows), "within_15_percent": sum(error <= 0.15 for error in errors), "worst": max(errors, default=0.0)}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Predicted over measured on logarithmic axes with the 15 % band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 6.0), dpi=120)
    values = [row[key] / 1e9 for row in rows for key in ("measured_bytes", "predicted_bytes")]
    ends = [min(values) * 0.8, max(values) * 1.25]
    axes.fill_between(ends, [0.85 * x for x in ends], [1.15 * x for x in ends], color="#dbe7f3", label="within 15 %")
    axes.plot(ends, ends, color="#5b7083", linewidth=1)
    for held_out, marker, label in ((False, "o", "seen while constants were fixed"), (True, "^", "held out")):
        chosen = [row for row in rows if row["held_out"] is held_out]
        points = [[row[key] / 1e9 for row in chosen] for key in ("measured_bytes", "predicted_bytes")]
        axes.plot(*points, marker, markersize=6, color="#b5482a" if held_out else "#1f5f8b", label=f"{label} ({len(chosen)})")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured peak (GB)", ylabel="predicted peak (GB)")
    ticks = [tick for tick in (0.5, 1, 2, 3, 5, 8, 12, 20, 40, 80) if ends[0] <= tick <= ends[1]]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_title("Peak memory of training runs, predicted and measured")
    axes.legend(loc="upper left", frameon=False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", choices=("fit", "held-out"), help="measure these settings alone; the others keep their stored figures"
    )
    parser.add_argument("--objective", help="measure the settings of this objective alone")
    parser.add_argument("--again", action="store_true", help="predict anew, measure nothing")
    options = parser.parse_args(arguments)
    name = "memory" if options.device == "cpu" else "memory_cuda"
    path = RESULTS / f"{name}.json"
    stored = {row["name"]: row for row in json.loads(path.read_text())["settings"]} if path.is_file() else {}
    memory_bytes = _memory_bytes(options.device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for index, setting in enumerate(SETTINGS):
            chosen = not options.again and options.only in (None, "held-out" if setting.held_out else "fit")
            chosen = chosen and options.objective in (None, setting.objective)
            if chosen:
                if setting.shape != "starter" and not (Path(folder) / setting.shape).is_dir():
                    save_base(setting.shape, Path(folder) / setting.shape)
                measured = run_contender("benchmarks.memory", "measure", str(index), folder, options.device)
            elif setting.name in stored:
                measured = stored[setting.name]["measured"]
            else:
                continue
            row = {"name": setting.name, **asdict(setting), "measured": measured, "measured_bytes": measured["measured_bytes"]}
            row |= predict(setting, measured, options.device, memory_bytes)
            print(
                f"{row['name']:60} {row['measured_bytes'] / 1e9:6.2f} {row['predicted_bytes'] / 1e9:6.2f} {row['error']:+.1%}",
                flush=True,
            )
            rows.append(row)
    held_out = [row for row in rows if row["held_out"]]
    write_result(name, {"summary": summary(rows), "summary_held_out": summary(held_out), "settings": rows})
    plot(rows, PLOT if options.device == "cpu" else PLOT.with_stem(PLOT.stem + "_cuda"))


def _memory_bytes(device: str) -> int:
    if device == "cpu":
        from finetuneflow.hardware import probe_memory

        return probe_memory().total_bytes
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(int(sys.argv[2]), sys.argv[3], sys.argv[4])
    else:
        main(*sys.argv[1:])
