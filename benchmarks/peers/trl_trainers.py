"""TRL's SFTTrainer and DPOTrainer on finished tokens.

Settings, all optional; without any, TRL's own defaults hold:

    weights        type the base is loaded in (TRL: float32)
    autocast       bf16 mixed precision
    layout         [micro-batch, "padded" or "free"]: "free" lays the rows of a micro-batch one behind the other, which is
                   what TRL's packing does too, but keeps the rows of a step together, so that all learn the same step
    attention      sdpa or eager
    checkpointing  whether activations are recomputed (TRL: yes)
    adapter        type of LoRA's own weights (PEFT: float32; TRL makes them bfloat16 over a 4-bit base)
    compute        type that 4-bit weights are expanded to (bitsandbytes: float32)
    compile        torch.compile
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.recorder import Recorder
from benchmarks.speed_cells import SEED, Cell, cell


def main(job: dict[str, Any]) -> None:
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    transformers.set_seed(SEED)
    made, rows = cell(job["cell"]), json.loads((Path(job["folder"]) / "tokens.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["base"])
    model = load(made, job["base"], job["settings"])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = trainer_arguments(made, job["steps"], job["settings"]) | {"output_dir": scratch}
        trainer = (_dpo if made.rows.objective == "dpo" else _sft)(made, arguments, model, tokenizer, rows, job["settings"])
        trainer.add_callback(Recorder())
        trainer.train()


def load(made: Cell, base: str, settings: dict[str, Any]) -> Any:
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": getattr(torch, settings.get("weights", "float32"))}
    if "attention" in settings:
        options["attn_implementation"] = settings["attention"]
    if made.method == "qlora":
        compute = {"bnb_4bit_compute_dtype": getattr(torch, settings["compute"])} if "compute" in settings else {}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **compute
        )
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    if made.method == "lora" and settings.get("adapter") == "bfloat16":
        return get_peft_model(model, lora(), autocast_adapter_dtype=False)
    return model


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer_arguments(made: Cell, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    size = settings["layout"][0] if "layout" in settings else 1 if made.rows_name == "long" else made.rows.batch
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": made.rows.batch // size,
        "max_length": made.rows.max_length,
        "max_steps": steps,
        "learning_rate": made.learning_rate,
        "lr_scheduler_type": "constant",
        "seed": SEED,
        "use_cpu": True,
        "bf16": settings.get("autocast", False),
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    if "checkpointing" in settings:
        arguments["gradient_checkpointing"] = settings["checkpointing"]
    if settings.get("compile"):
        arguments["torch_compile"] = True
    return arguments


def _sft(made: Cell, arguments: dict[str, Any], model: Any, tokenizer: Any, rows: list[Any], settings: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    free = settings.get("layout", (0, "padded"))[1] == "free"
    if free:
        arguments = arguments | {"max_length": None}  # TRL wants it so; the rows are cut already
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments, padding_free=free),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]),
        processing_class=tokenizer,
        peft_config=None if made.method == "full" or hasattr(model, "peft_config") else lora(),
    )


def _dpo(made: Cell, arguments: dict[str, Any], model: Any, tokenizer: Any, rows: list[Any], settings: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class OnTokens(DPOTrainer):
        """Takes rows as they are, where TRL would tokenize text by itself."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    def sides(row: dict[str, Any]) -> dict[str, Any]:
        cut = row["prompt_length"]
        return {
            "prompt_ids": row["chosen_ids"][:cut],
            "chosen_ids": row["chosen_ids"][cut:],
            "rejected_ids": row["rejected_ids"][cut:],
        }

    return OnTokens(
        model=model,
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list([sides(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=None if hasattr(model, "peft_config") else lora(),
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
