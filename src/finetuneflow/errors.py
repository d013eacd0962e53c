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
    # command line
    "CLI_USAGE": "The command line has an unknown option or verb, a missing argument or a value out of range.",
    "UNEXPECTED": "A mistake of FineTuneFlow itself; the trace on standard error belongs into a report.",
    # storage
    "STORAGE_BAD_NAME": "A name holds characters or parts that could leave the workspace.",
    "STORAGE_DISK_FULL": "There is not enough free space for what was about to be written.",
    "STORAGE_NOT_WRITABLE": "A folder cannot be written by this user.",
    "STORAGE_UNUSABLE": "A path is of the wrong kind, or the system refuses it.",
    "STORAGE_EXISTS": "The target exists already and is never overwritten unasked.",
    "RUN_NOT_FOUND": "No run of that name is in the workspace.",
    "RUN_BUSY": "Another process is working on this run.",
    "RUN_DAMAGED": "The events of a run or a pipeline hold something that FineTuneFlow did not write.",
    "EXTRA_MISSING": "An optional package that this command needs is not installed.",
    # templates, tokens and the loss mask
    "TEMPLATE_UNKNOWN": "No chat template of that name is built in, and no file of that name exists.",
    "TEMPLATE_INVALID": "A chat template is not valid Jinja, too large, or wants other files.",
    "TEMPLATE_UNSAFE": "A chat template tried to reach what a template may not touch.",
    "TEMPLATE_TOO_COSTLY": "A chat template loops or grows beyond the sandbox's limits.",
    "TEMPLATE_REFUSED": "The chat template itself refuses this conversation.",
    "TEMPLATE_NO_SPANS": "The answers cannot be found in what the chat template writes.",
    "TEMPLATE_MISMATCH": "The chosen template writes something else than the tokenizer's own template.",
    "TOKENIZER_UNSUPPORTED": "The tokenizer has no fast form, so characters cannot be traced to tokens.",
    "TEXT_FORGES_CONTROL": "A text holds the name of a control token that this tokenizer cannot write as plain text.",
    "TEXT_PRIVATE_CHARACTERS": "A text holds private-use characters that are reserved for finding spans.",
    "ROW_TOO_LONG": "A row has more tokens than max_length allows, and the policy drops such rows.",
    "ROW_NO_ANSWER_LEFT": "Nothing of the answer fits into max_length.",
    "ROW_NO_ANSWER": "A row has no answer that could be trained on.",
    "ROW_PROMPT_TOO_LONG": "The last question of a prompt is longer than max_length by itself.",
    "ROW_PROMPTS_DIFFER": "The template writes the prompt of a pair differently before its two answers.",
    "ROW_ANSWERS_ALIKE": "The two answers of a pair are the same tokens, as they are or after cutting.",
    # datasets: the file as a whole
    "DATASET_NOT_FOUND": "There is no such dataset file.",
    "DATASET_UNREADABLE": "The dataset file cannot be read or is damaged.",
    "DATASET_NOT_A_DATASET": "The file is a document, an archive or something else that holds no rows.",
    "DATASET_EMPTY": "The dataset file is empty.",
    "DATASET_BAD_HEADER": "The header line of a table cannot be used.",
    "DATASET_TOO_MANY_COLUMNS": "A table has more columns than any dataset of examples.",
    "DATASET_EXPANDS_TOO_MUCH": "A compressed file becomes suspiciously large when decompressed.",
    "DATASET_BAD_MAPPING": "The column mapping does not name enough to make an example.",
    "DATASET_TOO_MANY_REJECTED": "More rows were rejected than the limit allows.",
    "DATASET_NOTHING_USABLE": "No row of the dataset can be used.",
    "DATASET_TOO_SMALL": "There are too few different examples to hold some out for evaluation.",
    "DATASET_BAD_SPLIT": "The evaluation fraction is not between 0 and 1.",
    # datasets: one row (a Problem, never an exception)
    "ROW_BAD_JSON": "A row is not valid JSON.",
    "ROW_TRUNCATED": "The file ends in the middle of its data.",
    "ROW_TOO_DEEP": "A row nests deeper than the limit.",
    "ROW_DUPLICATE_KEY": "An object names the same key twice.",
    "ROW_BAD_NUMBER": "A number is NaN, infinite or too large for a float.",
    "ROW_INVALID_ENCODING": "A row holds bytes that are not valid text in the file's encoding.",
    "ROW_LONE_SURROGATE": "A row holds half of a surrogate pair.",
    "ROW_NUL_CHARACTER": "A row holds the NUL character.",
    "ROW_NOT_AN_OBJECT": "A row is a number, null or a list where an object is expected.",
    "ROW_WRONG_CELL_COUNT": "A table row has more or fewer cells than the header.",
    "ROW_UNKNOWN_SHAPE": "The columns of a row match no known format.",
    "ROW_MISSING_COLUMN": "A column named by the mapping is missing in a row.",
    "ROW_WRONG_TYPE": "A value has a type that cannot be read as text or turns.",
    "ROW_NO_PROMPT": "A row has an answer but nothing that it answers.",
    "ROW_EMPTY_ANSWER": "The answer of a row is empty.",
    "ROW_EMPTY_TEXT": "The text of a row is empty.",
    "ROW_NO_MESSAGES": "A conversation has no turns.",
    "ROW_NO_ASSISTANT": "A conversation has no assistant turn to learn.",
    "ROW_NOTHING_SUPERVISED": "Every assistant turn of a conversation is excluded from the loss.",
    "ROW_UNKNOWN_ROLE": "A turn has a role that is not system, user, assistant or tool.",
    "ROW_SAME_ROLE_TWICE": "Two turns of the same role follow each other and cannot be joined.",
    "ROW_LONE_MESSAGE": "A row is a single message instead of a conversation.",
    "ROW_BAD_TOOL_CALL": "A tool call or its result is incomplete or not valid.",
    "ROW_BAD_TOOLS": "The tool definitions of a row are not valid.",
    "ROW_MEDIA": "A row needs images, sound or files, which are not supported.",
    "ROW_BAD_PREFERENCE": "A preference pair has no usable difference or no shared prompt.",
    "ROW_NO_PARTNER": "A rated answer has no other answer to the same prompt that is rated better or worse.",
    "ROW_NO_PREFERENCE": "A vote prefers neither answer, so it makes no pair.",
    "ROW_BAD_RATING": "The scores of several answers are missing or no numbers.",
    "ROW_BAD_LABEL": "A label is neither true nor false.",
    "ROW_BAD_TREE": "A message names a parent that is not in the same tree before it.",
    "ROW_NOT_AN_EXAMPLE": "A row is recognised as something that is not training data.",
    # hardware
    "GPU_NOT_AVAILABLE": "A GPU was asked for and none can be used.",
    "MEMORY_WONT_FIT": "The run is predicted to need clearly more memory than the device has.",
    "OUT_OF_MEMORY": "The device or the machine ran out of memory.",
    # models and adapters
    "MODEL_NOT_FOUND": "No folder and no hub model of that name exists, or it is not a model.",
    "MODEL_ACCESS_DENIED": "The hub refuses access: the model is gated or private.",
    "MODEL_OFFLINE": "The hub could not be reached and the cache does not hold the model.",
    "MODEL_RATE_LIMITED": "The hub limits the rate of requests.",
    "MODEL_UNSUPPORTED_ARCH": "The model is not a causal language model that can be trained here.",
    "MODEL_NO_SAFETENSORS": "The model has no weights in the safetensors format.",
    "MODEL_REMOTE_CODE": "The model's repository asks for code of its own to be run.",
    "MODEL_PICKLE": "A checkpoint holds more than tensors and numbers and is not opened, because that could run code.",
    "MODEL_CORRUPT": "Files of the model are damaged or do not fit each other.",
    "MODEL_NO_TOKENIZER": "The model's folder holds no tokenizer.",
    "MODEL_IS_ADAPTER": "An adapter was named where a base model is needed.",
    "MODEL_MODULE_NOT_FOUND": "The Python file that model.module names does not exist.",
    "MODEL_MODULE_FAILED": "The Python file of a model of one's own raised an error.",
    "MODEL_MODULE_INVALID": "The Python file of a model of one's own does not bring what is needed.",
    "MODEL_MODULE_MISMATCH": "The base model is of another architecture than the one that model.module brings.",
    "MODEL_SCORES_ONLY": "A reward model was asked to answer.",
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
    "OBJECTIVE_UNSUPPORTED": "The objective cannot be trained with this model, method or template.",
    "TRAINING_NO_DATA": "No usable example was left to train on.",
    "TRAINING_NO_SUPERVISED_TOKENS": "No token of the dataset would enter the loss.",
    "TRAINING_NO_TURN_END": "No label teaches the model to end its turn.",
    "TRAINING_DOUBLED_BOS": "Examples start with two beginning-of-sequence tokens.",
    "TRAINING_FAILED": "The run stopped on an unexpected error.",
    "TRAINING_INTERRUPTED": "The run was interrupted from the keyboard before it could save.",
    "RESUME_NO_CHECKPOINT": "The run has no complete checkpoint to resume from.",
    "RESUME_CHANGED": "Configuration, data, tokenizer or code differ from the interrupted run.",
    "RESUME_FINISHED": "The run ended already; there is nothing to resume.",
    "VERIFY_FAILED": "A run that was to prove exact resuming ended with an error of its own.",
    "PIPELINE_GATE": "A stage of a pipeline did not reach what its gate asks for.",
    "REWARD_INVALID": "A reward of the run file does not exist, is written wrongly, or lies where no code is run from.",
    "REWARD_FAILED": "A reward function raised an error, or gave something that is no finite number.",
    # evaluation and inference
    "DECODING_INVALID": "The settings of generation (length, temperature, top_p) cannot be used.",
    "PROMPT_TOO_LONG": "A prompt leaves the model no room for an answer in its context.",
    "RUN_NOT_FINISHED": "The run has no final weights yet.",
    "CHECKPOINT_UNUSABLE": "The checkpoint asked for is missing or damaged.",
    "SUITE_INVALID": "A file of acceptance prompts, or one item of it, cannot be used.",
    "JUDGES_INVALID": "A file of judge functions cannot be loaded, or names a judge that is not there.",
    "EVALUATION_NO_DATA": "There is nothing to measure: no usable example, prompt or answer.",
    "EVALUATION_RECORD_INVALID": "A saved evaluation cannot be read, or belongs to other prompts.",
    # export
    "EXPORT_NO_RUN": "The folder named holds no run.",
    "EXPORT_NO_WEIGHTS": "The run has no finished weights to export yet.",
    "EXPORT_RUN_DAMAGED": "A file of the run directory cannot be read.",
    "EXPORT_UNSUPPORTED": "This kind of run cannot be exported to that target.",
    "EXPORT_BASE_CHANGED": "The base model found now is not the one the run was trained on.",
    "EXPORT_BAD_MEMBER": "Something that is no plain file would get into a package.",
    "EXPORT_CHECK_FAILED": "The export, loaded again, does not answer as the trained model does.",
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
