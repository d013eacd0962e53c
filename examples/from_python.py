"""The same from Python: train, measure, export. `conversations.jsonl` is a file of yours, in the folder the script runs in."""

import finetuneflow as ftf

config, origins = ftf.build_config(
    {
        "name": "from-python",
        "model": {"base": "starter"},
        "data": {"train": ["conversations.jsonl"], "max_length": 256},
        "method": {"kind": "lora", "target_modules": "all-linear"},
        "training": {"learning_rate": 1e-3, "epochs": 1},
    }
)
result = ftf.train(config, origins=origins, sinks=[print])
print(result.status, result.metrics["eval_loss"])
print(ftf.export(result.run_dir, to="adapter").dir)
