"""LoRA and QLoRA of a 135M-parameter Llama shape (random weights), 20 steps each through `ftf train`'s own engine.

The shape is the usual small one: hidden 576, 30 layers, 9 heads, 3 key/value heads, feed-forward 1,536, vocabulary 49,152, tied.
Peak memory is the resident memory of the whole process, imports included; `baseline_bytes` is what the process held before
the model was loaded.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import peak_rss_bytes, run_contender, write_result

STEPS, BATCH = 20, 4


def save_base(folder: Path) -> Path:
    """The model and a byte-level tokenizer trained on the spot."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2_048,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


def write_rows(path: Path) -> None:
    rng = random.Random(0)
    words = [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "river",
        "stone",
        "cloud",
        "green",
        "seven",
        "mountain",
        "letter",
        "window",
        "garden",
        "music",
    ]
    text = lambda n: " ".join(rng.choice(words) for _ in range(n))  # noqa: E731
    with path.open("w") as file:
        for _ in range(200):
            file.write(json.dumps({"instruction": text(8), "output": text(24)}) + "\n")


def contender(kind: str, folder: str) -> None:
    from finetuneflow.config import build_config
    from finetuneflow.training.run import train
    from finetuneflow.workspace import Workspace

    home = Path(folder)
    config, origins = build_config(
        {
            "name": f"bench-{kind}",
            "model": {"base": str(home / "base")},
            "data": {"train": str(home / "rows.jsonl"), "max_length": 256, "eval_fraction": 0},
            "method": {"kind": kind, "target_modules": "all-linear"},
            "training": {"max_steps": STEPS, "batch_size": BATCH, "gradient_accumulation": 1, "log_steps": 5, "threads": 2},
            "evaluation": {"samples": 0},
        }
    )
    import peft  # noqa: F401 - so that the baseline holds the libraries
    import torch  # noqa: F401
    from transformers import Trainer  # noqa: F401

    baseline = peak_rss_bytes()
    began = time.perf_counter()
    metrics = train(config, workspace=Workspace(home / f"ws-{kind}"), origins=origins).metrics
    losses = [round(point["loss"], 3) for point in metrics["train_loss_curve"]]
    print(
        json.dumps(
            {
                "kind": kind,
                "baseline_bytes": baseline,
                "peak_bytes": peak_rss_bytes(),
                "train_seconds": metrics["train_runtime"],
                "tokens_per_second": metrics["train_tokens_per_second"],
                "total_seconds": time.perf_counter() - began,
                "trainable_parameters": metrics["trainable_parameters"],
                "total_parameters": metrics["total_parameters"],
                "losses": losses,
            }
        )
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder) / "base")
        write_rows(Path(folder) / "rows.jsonl")
        results = [run_contender("benchmarks.adapters_135m", kind, folder) for kind in ("lora", "qlora")]
    write_result("adapters_135m", {"steps": STEPS, "batch": BATCH, "contenders": results})


if __name__ == "__main__":
    contender(*sys.argv[1:3])
