"""A LoRA fine-tuning of a 25M Llama shape: our trainer against TRL's SFTTrainer on the same rows, padded, fp32.

Equal work is asked of both: same tokens, same labels, same order of rows, same optimizer. The mean losses are shown beside the
speeds; where they differ, the speeds mean nothing. Packing and the fast path are not part of this comparison.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import peak_rss_bytes, run_contender, spread, write_result

STEPS, BATCH, REPEATS = 12, 8, 3


def rows(count: int, vocabulary: int) -> list[dict[str, Any]]:
    """Token rows of 40 to 200 tokens; the second half of each is supervised."""
    import random

    rng = random.Random(1)
    made = []
    for index in range(count):
        ids = [rng.randrange(5, vocabulary) for _ in range(rng.randint(40, 200))]
        made.append({"index": index, "input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return made


def model(vocabulary: int) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        use_cache=False,
    )
    return get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def arguments(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }


def contender(who: str) -> None:
    import torch
    from datasets import Dataset

    torch.set_num_threads(2)
    vocabulary = 8_000
    made = rows(STEPS * BATCH, vocabulary)
    useful = sum(len(row["input_ids"]) for row in made)
    with tempfile.TemporaryDirectory() as folder:
        trainer = (_ours if who == "ftf" else _trl)(made, vocabulary, folder)
        began = time.perf_counter()
        loss = trainer.train().training_loss
        seconds = time.perf_counter() - began
    assert isinstance(trainer.train_dataset, Dataset)
    print(json.dumps({"seconds": seconds, "tokens_per_second": useful / seconds, "loss": loss, "peak_bytes": peak_rss_bytes()}))


def _ours(made: list[dict[str, Any]], vocabulary: int, folder: str) -> Any:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, TrainingArguments

    from finetuneflow.config import Training
    from finetuneflow.data.batches import Collator
    from finetuneflow.training.callbacks import Monitor
    from finetuneflow.training.progress import Progress
    from finetuneflow.training.trainer import SupervisedTrainer

    class InFileOrder(SupervisedTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    settings = Training(log_steps=10_000, save_steps=10_000, eval_steps=10_000)
    monitor = Monitor(lambda name, /, **fields: {}, Progress(), settings, Path(folder), evaluates=False)
    trainer = InFileOrder(
        model=model(vocabulary),
        args=TrainingArguments(**arguments(folder), logging_strategy="no"),
        train_dataset=Dataset.from_list(made),
        data_collator=Collator(0),
        monitor=monitor,
        checkpoints_dir=Path(folder),
        keep_checkpoints=1,
        places=str,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trl(made: list[dict[str, Any]], vocabulary: int, folder: str) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    config = SFTConfig(
        **arguments(folder), max_length=512, activation_checkpointing=False, logging_strategy="no", pad_to_multiple_of=8
    )
    dataset = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in made])
    return SFTTrainer(model=model(vocabulary), args=config, train_dataset=dataset, processing_class=tokenizer)


def main() -> None:
    found: dict[str, list[dict[str, Any]]] = {"ftf": [], "trl": []}
    for _ in range(REPEATS):
        for who, results in found.items():
            results.append(run_contender("benchmarks.sft_against_trl", who))
    speed = {who: spread([r["tokens_per_second"] for r in results]) for who, results in found.items()}
    write_result(
        "sft_against_trl",
        {
            "useful_tokens_per_second": speed,
            "ratio_of_medians": speed["ftf"]["median"] / speed["trl"]["median"],
            "mean_loss": {who: results[0]["loss"] for who, results in found.items()},
            "peak_bytes": {who: spread([r["peak_bytes"] for r in results]) for who, results in found.items()},
        },
    )


if __name__ == "__main__":
    contender(sys.argv[1])
