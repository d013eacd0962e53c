"""The error family: what happened, where, and what to do about it.

    FineTuneFlowError
    ├── ConfigError      a run file or option that cannot be used
    ├── DataError        a dataset, file or template that cannot be used
    ├── ModelError       a base model, tokenizer or adapter that cannot be loaded
    ├── HardwareError    something this machine lacks
    ├── TrainingError    a run that had to stop (non-finite loss, out of memory, …)
    ├── ResumeError      a run that cannot be continued as asked
    ├── EvaluationError  a measurement that cannot be made
    ├── ExportError      an export that was refused or failed its check
    └── StorageError     disk, permissions, locks, names

Every error carries a stable code out of `CODES` (tests hold that), so programs can
branch on it, `ftf explain CODE` can describe it and translations can find it.
One bad row of a dataset is not an exception: it is a `data.examples.Problem`.
"""

from __future__ import annotations

from typing import Any

# One home for every error code: code -> what it means in one sentence.
CODES: dict[str, str] = {
    # configuration
    "CONFIG_UNKNOWN_KEY": "The run file has a key that no setting answers to.",
    "CONFIG_INVALID_VALUE": "A setting has a value of the wrong type or outside its range.",
    "CONFIG_UNREADABLE": "The run file is missing, not valid YAML, or too large.",
    "CONFIG_CONFLICT": "Two settings contradict each other.",
    # storage
    "STORAGE_BAD_NAME": "A name holds characters or parts that could leave the workspace.",
    "STORAGE_DISK_FULL": "There is not enough free space for what was about to be written.",
    "STORAGE_NOT_WRITABLE": "A folder cannot be written by this user.",
    "STORAGE_EXISTS": "The target exists already and is never overwritten unasked.",
    "RUN_NOT_FOUND": "No run of that name is in the workspace.",
    "RUN_BUSY": "Another process is working on this run.",
    "EXTRA_MISSING": "An optional package that this command needs is not installed.",
    # hardware
    "GPU_NOT_AVAILABLE": "A GPU was asked for and none can be used.",
    "OUT_OF_MEMORY": "The device or the machine ran out of memory.",
    # models and adapters
    "MODEL_NOT_FOUND": "No folder and no hub model of that name exists, or it is not a model.",
    "MODEL_ACCESS_DENIED": "The hub refuses access: the model is gated or private.",
    "MODEL_OFFLINE": "The hub could not be reached and the cache does not hold the model.",
    "MODEL_RATE_LIMITED": "The hub limits the rate of requests.",
    "MODEL_UNSUPPORTED_ARCH": "The model is not a causal language model that can be trained here.",
    "MODEL_NO_SAFETENSORS": "The model has no weights in the safetensors format.",
    "MODEL_REMOTE_CODE": "The model's repository asks for code of its own to be run.",
    "MODEL_CORRUPT": "Files of the model are damaged or do not fit each other.",
    "MODEL_NO_TOKENIZER": "The model's folder holds no tokenizer.",
    "MODEL_IS_ADAPTER": "An adapter was named where a base model is needed.",
    "MODEL_BAD_DTYPE": "A precision was named that does not exist.",
    "ADAPTER_NOT_FOUND": "No adapter is in that folder, or none of that name is loaded.",
    "ADAPTER_PICKLE": "An adapter is stored as a pickle and is not opened.",
    "ADAPTER_CORRUPT": "Files of an adapter are damaged.",
    "ADAPTER_BASE_MISMATCH": "An adapter does not fit the base model.",
    "ADAPTER_TARGET_MISSING": "A target module is not in the model.",
    "ADAPTER_TARGET_HEAD": "The output layer was named as a target of a low-rank adapter.",
    "ADAPTER_NEEDS_QUANTIZED_BASE": "QLoRA was asked for on a base that is not quantised.",
    "ADAPTER_UNSUPPORTED": "This kind of adapter does not exist for the architecture.",
    "ADAPTER_NOT_MERGEABLE": "This adapter cannot be merged into its base.",
    # training
    "TRAINING_NON_FINITE": "The loss or a gradient became NaN or infinite.",
    "TRAINING_NO_TRAINABLE_PARAMETERS": "Nothing in the model would be trained.",
    "TRAINING_NO_DATA": "No usable example was left to train on.",
    "TRAINING_NO_SUPERVISED_TOKENS": "No token of the dataset would enter the loss.",
    "TRAINING_NO_TURN_END": "No label teaches the model to end its turn.",
    "TRAINING_DOUBLED_BOS": "Examples start with two beginning-of-sequence tokens.",
    "TRAINING_FAILED": "The run stopped on an unexpected error.",
    "RESUME_NO_CHECKPOINT": "The run has no complete checkpoint to resume from.",
    "RESUME_CHANGED": "Configuration, data, tokenizer or code differ from the interrupted run.",
    "RESUME_FINISHED": "The run ended already; there is nothing to resume.",
    # evaluation and inference
    "DECODING_INVALID": "The settings of generation (length, temperature, top_p) cannot be used.",
    "PROMPT_TOO_LONG": "A prompt leaves the model no room for an answer in its context.",
    "RUN_NOT_FINISHED": "The run has no final weights yet.",
    "CHECKPOINT_UNUSABLE": "The checkpoint asked for is missing or damaged.",
    "SUITE_INVALID": "A file of acceptance prompts, or one item of it, cannot be used.",
    "JUDGES_INVALID": "A file of judge functions cannot be loaded, or names a judge that is not there.",
    "EVALUATION_NO_DATA": "There is nothing to measure: no usable example, prompt or answer.",
    "EVALUATION_RECORD_INVALID": "A saved evaluation cannot be read, or belongs to other prompts.",
}


class FineTuneFlowError(Exception):
    """Base of all errors a user can cause or meet.

    `where` names the place (file:line, setting, step), `remedy` says what to do next,
    `context` holds the same facts for programs. No field ever holds a secret.
    """

    exit_code = 1

    def __init__(
        self,
        code: str,
        message: str,
        *,
        where: str | None = None,
        remedy: str | None = None,
        context: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.where = where
        self.remedy = remedy
        self.context = context or {}

    def __str__(self) -> str:
        lines = [f"{self.message} [{self.code}]"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  what to do: {self.remedy}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The one JSON shape of an error: `{detail, error_code, context}`."""
        context = dict(self.context)
        if self.where:
            context["where"] = self.where
        if self.remedy:
            context["remedy"] = self.remedy
        return {"detail": self.message, "error_code": self.code, "context": context}


class ConfigError(FineTuneFlowError):
    exit_code = 2


class DataError(FineTuneFlowError):
    exit_code = 3


class ModelError(FineTuneFlowError):
    exit_code = 4


class HardwareError(FineTuneFlowError):
    exit_code = 5


class TrainingError(FineTuneFlowError):
    exit_code = 6


class ResumeError(FineTuneFlowError):
    exit_code = 7


class EvaluationError(FineTuneFlowError):
    exit_code = 8


class ExportError(FineTuneFlowError):
    exit_code = 9


class StorageError(FineTuneFlowError):
    exit_code = 10


def missing_extra(package: str, extra: str) -> FineTuneFlowError:
    """The error for an optional dependency that is not installed."""
    return FineTuneFlowError(
        "EXTRA_MISSING",
        f"This needs the package {package!r}, which is not installed.",
        remedy=f"pip install 'finetuneflow[{extra}]'",
        context={"package": package, "extra": extra},
    )
