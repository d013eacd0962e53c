"""The run file: every setting's name, type, unit, default and explanation, once.

`RunConfig` is what `ftf train run.yaml` reads, what the Python face takes and what a run
directory keeps (`run.yaml`, each value marked default, recipe, recommended or yours).
A rule about one field stands on the field; a rule about several in `RunConfig.conflicts`.
Defaults are the documented ones, under today's names. Importing this module loads no torch.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from finetuneflow.errors import ConfigError

CONFIG_VERSION = 1
MAX_FILE_BYTES = 1_000_000
# Suites that are known by name -> their file beside the starter model.
BUNDLED_SUITES = {"starter": "acceptance.yaml", "starter-preferred": "preferred.yaml"}
Origin = Literal["default", "recipe", "recommended", "yours"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StringList = Annotated[list[str], BeforeValidator(_as_list)]


class Section(BaseModel):
    """A group of settings. Unknown keys are errors; values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Model(Section):
    base: str = Field(
        "starter", description="Base model: `starter` (bundled), a local folder, or a hub id such as `Qwen/Qwen3-0.6B`."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model; the commit found is recorded.")
    trust_remote_code: str | None = Field(
        None, description="Commit hash whose own Python code you have read and allow to run. Off unless it is that exact commit."
    )
    module: str | None = Field(
        None,
        description="Python file with an architecture of your own, registered with transformers' Auto classes. Naming it allows it to run.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Storage type of frozen weights. `auto`: bfloat16 where the device computes in it, else float32."
    )
    adapter: str | None = Field(
        None, description="Adapter to start from: the folder of one, or of a finished run. null: a fresh adapter on the base."
    )
    adapter_start: Literal["continue", "merge", "stack"] = Field(
        "continue",
        description="What becomes of that adapter: `continue` trains it further, `merge` writes it into the base before a new one is trained, "
        "`stack` keeps it frozen below a new one (the result holds both).",
    )


class Data(Section):
    train: StringList = Field(default_factory=list, description="Training files, any common format, each also .gz or .zst.")
    eval: StringList = Field(
        default_factory=list, description="Evaluation files. Empty: a share of the training data is held out."
    )
    eval_fraction: float = Field(
        0.1, ge=0.0, le=0.5, description="Share held out when no evaluation file is given; 0 turns evaluation off."
    )
    mapping: dict[str, str] = Field(
        default_factory=dict,
        description="Columns by name for a shape that is not recognised: prompt, answer, system, context, text, messages, rating, …",
    )
    eval_limit: int = Field(
        1000,
        ge=1,
        description="Examples held out at most, whatever the share: more would cost time and hardly sharpen the figure.",
    )
    tree_paths: Literal["best", "all"] = Field(
        "best", description="Of a conversation tree: the best-ranked path, or every path as an example of its own."
    )
    encoding: str | None = Field(None, description="Text encoding of the files; null: detected.")
    limit: int | None = Field(None, ge=1, description="Use only this many examples, the first usable ones in file order.")
    reject_threshold: float = Field(0.1, ge=0.0, le=1.0, description="Share of unusable rows above which the run does not start.")
    template: str = Field(
        "auto", description="Chat template: `auto` (the tokenizer's own, else `plain`), a built-in name, or a .jinja file."
    )
    template_consent: bool = Field(False, description="Allow a template that differs from the tokenizer's own.")
    supervise: Literal["assistant", "last", "all"] = Field(
        "assistant", description="What enters the loss: every assistant turn, the last one only, or everything."
    )
    max_length: int = Field(2048, ge=8, le=1_048_576, description="Tokens per example at most.")
    overlong: Literal["drop", "cut", "split"] = Field(
        "cut", description="Examples longer than `max_length`: drop, cut (never without supervised tokens) or split."
    )
    min_rating_gap: float = Field(
        0.0, ge=0.0, description="Rated answers to one prompt make a pair only if their ratings (or ranks) differ by this much."
    )
    good_rating: float | None = Field(
        None, description="Rating from which an answer counts as good (kto); null: the median of all ratings."
    )
    rating_pairs: Literal["best", "adjacent"] = Field(
        "best", description="Pairs out of ratings: the best answer against each other one, or each against the next worse."
    )
    max_pairs_per_prompt: int = Field(4, ge=1, le=1000, description="Pairs made of the rated answers to one prompt at most.")
    replay: StringList = Field(
        default_factory=list, description="Files of general data mixed into training against forgetting (sft and pretrain)."
    )
    replay_share: float = Field(
        0.1, gt=0.0, lt=1.0, description="Share of the training examples in each epoch that comes from the `replay` files."
    )


class Method(Section):
    kind: Literal["lora", "qlora", "dora", "ia3", "prefix", "full"] = Field("lora", description="How the model is tuned.")
    r: int = Field(16, ge=1, le=1024, description="Rank of the adapter matrices.")
    alpha: float = Field(32, gt=0, description="Adapter scaling numerator: the update is scaled by alpha / r.")
    dropout: float = Field(0.05, ge=0.0, lt=1.0, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field(
        "auto",
        description="Layers that get an adapter: `auto` (the architecture's usual ones), `all-linear`, a list of names, or a regular expression.",
    )
    modules_to_save: list[str] = Field(
        default_factory=list, description="Layers trained in full and saved with the adapter, such as lm_head."
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead of alpha / r.")
    num_virtual_tokens: int = Field(20, ge=1, le=4096, description="Length of the trained prefix (prefix tuning only).")
    double_quantization: bool = Field(
        True, description="Quantise the 4-bit constants too (QLoRA only; saves 0.37 bit per parameter)."
    )

    @property
    def is_adapter(self) -> bool:
        return self.kind != "full"


Objective = Literal["sft", "pretrain", "dpo", "kto", "orpo", "cpo", "simpo", "reward", "grpo", "rloo", "ppo"]


class Training(Section):
    objective: Objective = Field(
        "sft",
        description="`sft`: conversations; `pretrain`: continued pre-training on text; `dpo`, `orpo`, `cpo`, `simpo`: pairs of a preferred "
        "and a rejected answer; `kto`: answers rated good or bad; `reward`: a model that scores answers, from pairs; "
        "`grpo`, `rloo`, `ppo`: rewards of the model's own answers.",
    )
    epochs: float = Field(3, gt=0, le=1000, description="Passes over the training data.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps, whatever `epochs` says.")
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="Peak learning rate; null: what suits the objective and the method, as the plan says."
    )
    batch_size: int = Field(4, ge=1, le=4096, description="Examples per device and forward pass (micro-batch).")
    eval_batch_size: int = Field(4, ge=1, le=4096, description="Examples per device in evaluation.")
    gradient_accumulation: int = Field(4, ge=1, le=4096, description="Micro-batches per optimizer step.")
    speed: Literal["auto", "reference"] = Field(
        "auto",
        description="`auto`: the fast path, as far as it is proven equal on the model at the start of the run; `reference`: the plain one.",
    )
    fuse_loops: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compile norms, rotary positions and gates into single loops (sft, pretrain): `auto`: where the run is long enough "
        "to earn the compile time back, as measured once on this machine.",
    )
    token_budget: int | None = Field(
        None,
        ge=1,
        le=1_048_576,
        description="Most tokens in one forward pass of the fast path (sft, pretrain); null: what suits the device, and never more than "
        "batch_size rows of max_length. The rows of a step stay the same.",
    )
    group_by_length: bool = Field(
        False, description="Rows of like length meet in a step: less padding, at the price of a little less randomness."
    )
    warmup_ratio: float = Field(
        0.03, ge=0.0, le=1.0, description="Share of all steps in which the learning rate rises from zero."
    )
    weight_decay: float = Field(0.01, ge=0.0, le=1.0, description="Decoupled weight decay.")
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Learning-rate schedule after warm-up."
    )
    max_grad_norm: float = Field(1.0, ge=0.0, description="Gradient clipping by global norm; 0 turns it off.")
    optimizer: Literal["auto", "paged_adamw_8bit", "adamw_8bit", "adamw_torch_fused", "adamw_torch", "adafactor"] = Field(
        "auto", description="`auto`: paged_adamw_8bit on CUDA, adamw_torch elsewhere (paged memory needs CUDA)."
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="Compute type. `auto`: bf16 where the hardware has it, else fp16 on CUDA, else fp32."
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="Recompute activations to save memory. `auto`: on with CUDA, off on CPU."
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="`cuda` refuses to fall back to the CPU.")
    log_steps: int = Field(10, ge=1, description="Optimizer steps between log lines.")
    eval_steps: int = Field(100, ge=1, description="Optimizer steps between evaluations.")
    save_steps: int = Field(200, ge=1, description="Optimizer steps between checkpoints.")
    keep_checkpoints: int = Field(3, ge=1, description="Checkpoints kept; the best one is never deleted.")
    load_best: bool = Field(True, description="End with the weights of the lowest evaluation loss.")
    patience: int | None = Field(3, ge=1, description="Stop after this many evaluations without improvement; null: never.")
    oom: Literal["stop", "retry"] = Field(
        "stop", description="Out of memory: stop and explain, or retry with half the micro-batch at the same effective batch."
    )
    memory_check: Literal["refuse", "warn"] = Field(
        "refuse", description="A run that is predicted to need clearly more memory than there is: refuse it, or warn and start."
    )
    country: str | None = Field(
        None,
        pattern=r"^[A-Z]{3}$",
        description="Country of the machine (ISO code such as FRA) for CO2; null: the world's average.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; null: measured at start.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Seed of the split, the order, dropout and initial adapter weights.")
    report_to: list[Literal["wandb", "trackio", "mlflow", "tensorboard"]] = Field(
        default_factory=list, description="Experiment trackers to feed as well."
    )

    @property
    def effective_batch(self) -> int:
        """Examples per optimizer step and device."""
        return self.batch_size * self.gradient_accumulation


class Preference(Section):
    """Settings of the objectives that learn from preferences: dpo, kto, orpo, cpo, simpo and reward."""

    loss: Literal[
        "auto",
        "sigmoid",
        "ipo",
        "hinge",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "sigmoid_norm",
        "kto",
        "apo_zero_unpaired",
    ] = Field(
        "auto",
        description="Variant of the loss. `auto`: sigmoid for dpo and cpo, kto for kto. cpo knows sigmoid, hinge and ipo; "
        "kto knows kto and apo_zero_unpaired; the others are variants of dpo.",
    )
    beta: float | None = Field(
        None,
        gt=0,
        le=10,
        description="How closely the policy is held to the reference; documented range 0.1 to 0.5. "
        "orpo: weight of the odds ratio; simpo: scale of the rewards, 2 to 2.5 in its paper. None: 0.1, and 2 for simpo.",
    )
    label_smoothing: float = Field(
        0.0, ge=0.0, lt=0.5, description="Share of pairs assumed to be labelled the wrong way round (dpo, cpo)."
    )
    simpo_gamma: float = Field(0.5, ge=0.0, le=10, description="simpo: margin that the chosen answer's reward must exceed.")
    cpo_alpha: float = Field(1.0, ge=0.0, le=10, description="cpo: weight of the ordinary loss on the chosen answer.")
    desirable_weight: float = Field(1.0, gt=0, le=100, description="kto: weight of the answers rated good.")
    undesirable_weight: float = Field(1.0, gt=0, le=100, description="kto: weight of the answers rated bad.")
    center_rewards: float = Field(
        0.0, ge=0.0, le=10, description="reward: pulls the mean reward towards zero (0.01 in its paper); 0 turns it off."
    )
    reference: Literal["live", "cached"] = Field(
        "live",
        description="Log-probabilities of the reference: computed in every step, or once before training and kept on disk (dpo).",
    )

    def beta_of(self, objective: str) -> float:
        """The beta that is used. SimPO's scales mean log-probabilities per token, and needs 20 times that of sums (Meng et al. 2024)."""
        if self.beta is not None:
            return self.beta
        return 2.0 if objective == "simpo" else 0.1


# Values of `preference.loss` that an objective knows.
LOSSES_OF: dict[str, tuple[str, ...]] = {
    "dpo": tuple(
        loss for loss in get_args(Preference.model_fields["loss"].annotation) if loss not in ("kto", "apo_zero_unpaired")
    ),
    "kto": ("auto", "kto", "apo_zero_unpaired"),
    "cpo": ("auto", "sigmoid", "hinge", "ipo"),
}


class Reinforcement(Section):
    """Settings of the objectives that learn from rewards of their own answers: grpo, rloo and ppo."""

    reward: StringList = Field(
        default_factory=list,
        description="What is rewarded; several are added. A built-in function (`ftf rewards` lists them), `file.py:function` from `reward_folder`, "
        "or `model:` with the folder of a finished reward run.",
    )
    reward_weights: list[float] = Field(default_factory=list, description="Weight of each reward; empty: all count 1.")
    reward_folder: str | None = Field(
        None, description="The only folder that reward functions are read from. null: no function of your own is run."
    )
    samples_per_prompt: int = Field(8, ge=2, le=1024, description="Answers drawn for each prompt and compared (grpo, rloo).")
    max_new_tokens: int = Field(128, ge=1, le=32768, description="Length limit of a drawn answer, in tokens.")
    temperature: float = Field(1.0, gt=0, le=5, description="Temperature answers are drawn with.")
    top_p: float = Field(1.0, gt=0, le=1, description="Share of probability answers are drawn from.")
    kl_coefficient: float = Field(
        0.05, ge=0.0, le=10, description="Weight of the divergence from the reference model, per token (ppo: at the start)."
    )
    kl_target: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="ppo: divergence per answer, in nats, that the coefficient is steered to. null: it stays as it is.",
    )
    kl_horizon: int = Field(10_000, ge=1, description="ppo: answers over which the coefficient adapts.")
    clip_range: float = Field(0.2, gt=0, le=1, description="How far the probability ratio counts in a step.")
    value_clip_range: float = Field(0.2, gt=0, le=10, description="ppo: how far a value estimate may move in a step.")
    value_coefficient: float = Field(0.1, ge=0, le=10, description="ppo: weight of the value loss.")
    entropy_coefficient: float = Field(0.0, ge=0, le=1, description="ppo: weight of an entropy bonus.")
    gamma: float = Field(1.0, gt=0, le=1, description="ppo: discount of later rewards.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="ppo: bias against variance of the advantage estimate (GAE).")
    rollout_size: int = Field(64, ge=2, le=65536, description="ppo: answers drawn before each round of updates.")
    update_epochs: int = Field(4, ge=1, le=100, description="ppo: passes over the drawn answers in a round of updates.")
    whiten_rewards: bool = Field(False, description="ppo: scale the rewards of a round to unit variance.")
    missing_end_penalty: float = Field(
        1.0, ge=0, le=100, description="ppo: taken off the reward of an answer that did not end by itself."
    )


class Evaluation(Section):
    samples: int = Field(
        5, ge=0, le=100, description="Held-out prompts answered after training, shown beside the expected answer."
    )
    max_new_tokens: int = Field(128, ge=1, le=32768, description="Length limit of a generated answer, in tokens.")
    suite: str | None = Field(
        None, description="Acceptance prompts (YAML) to run after training; `starter` and `starter-preferred` are bundled."
    )
    at_steps: list[int] = Field(
        default_factory=list,
        description="Optimizer steps after which samples and suite are asked during training too, such as [5000, 10000].",
    )


class RunConfig(Section):
    version: Literal[1] = Field(1, description="Version of this file's format.")
    name: str = Field("run", description="Name of the run; a date and number are appended.", max_length=60)
    model: Model = Field(default_factory=Model)
    data: Data = Field(default_factory=Data)
    method: Method = Field(default_factory=Method)
    training: Training = Field(default_factory=Training)
    preference: Preference = Field(default_factory=Preference)
    reinforcement: Reinforcement = Field(default_factory=Reinforcement)
    evaluation: Evaluation = Field(default_factory=Evaluation)

    def with_absolute_paths(self) -> RunConfig:
        """The same with every local path made absolute: a run must be found and resumed from any folder."""

        def absolute(text: str) -> str:
            path = os.path.expanduser(text)
            return str(Path(path).resolve()) if os.path.exists(path) else text

        data = self.data.model_copy(
            update={
                "train": [absolute(path) for path in self.data.train],
                "eval": [absolute(path) for path in self.data.eval],
                "replay": [absolute(path) for path in self.data.replay],
                "template": absolute(self.data.template) if self.data.template.endswith(".jinja") else self.data.template,
            }
        )
        base = self.model.base if self.model.base == "starter" else absolute(self.model.base)
        module = self.model.module and absolute(self.model.module)
        adapter = self.model.adapter and absolute(self.model.adapter)
        rewards = self.reinforcement
        suite = self.evaluation.suite
        return self.model_copy(
            update={
                "data": data,
                "model": self.model.model_copy(update={"base": base, "module": module, "adapter": adapter}),
                "reinforcement": rewards.model_copy(
                    update={
                        "reward": [
                            f"model:{absolute(text.removeprefix('model:'))}" if text.startswith("model:") else text
                            for text in rewards.reward
                        ],
                        "reward_folder": rewards.reward_folder and absolute(rewards.reward_folder),
                    }
                ),
                "evaluation": self.evaluation.model_copy(
                    update={"suite": absolute(suite) if suite and suite not in BUNDLED_SUITES else suite}
                ),
            }
        )

    def conflicts(self) -> list[str]:
        """Combinations that cannot work, each with the way out."""
        found = []
        if not self.data.train:
            found.append("data.train is empty: name at least one file, e.g. `--set data.train=my.jsonl`.")
        if self.training.precision == "fp16" and self.training.device == "cpu":
            found.append("training.precision fp16 needs a GPU: use bf16, fp32 or auto on the CPU.")
        if self.method.kind == "full" and self.method.modules_to_save:
            found.append("method.modules_to_save has no effect with kind full (everything is trained): remove it.")
        return [*found, *self._objective_conflicts()]

    def cannot_stack(self) -> bool:
        """Whether stacking is asked for where it has no form; full fine-tuning merges whatever adapter it is given."""
        if self.model.adapter is None or self.model.adapter_start != "stack":
            return False
        return (
            self.method.kind not in ("lora", "full") or bool(self.method.modules_to_save) or self.training.objective == "reward"
        )

    def _objective_conflicts(self) -> Iterator[str]:
        """Settings that the objective cannot be trained with."""
        training, method, drawn = self.training, self.method, self.reinforcement
        objective = training.objective
        if objective in LOSSES_OF and self.preference.loss not in LOSSES_OF[objective]:
            yield f"preference.loss {self.preference.loss} is no loss of {objective}: choose {', '.join(LOSSES_OF[objective])}."
        if objective == "kto" and training.batch_size < 2:
            yield "kto compares answers of different prompts within a micro-batch: set training.batch_size to 2 or more."
        if objective == "ppo" and method.kind == "prefix":
            yield "ppo needs an adapter inside the layers, which a trained prefix is not: use method.kind lora, or grpo."
        if self.cannot_stack():
            yield (
                "model.adapter_start stack adds two plain LoRA adapters up: use it with method.kind lora, without modules_to_save, "
                "for an objective other than reward; or continue, or merge."
            )
        if objective in ("grpo", "rloo", "ppo"):
            if not drawn.reward:
                yield f"{objective} learns from rewards: name at least one in reinforcement.reward (`ftf rewards` lists them); in a pipeline a reward stage before it will do."
            if drawn.reward_weights and len(drawn.reward_weights) != len(drawn.reward):
                yield f"reinforcement.reward_weights has {len(drawn.reward_weights)} values for {len(drawn.reward)} rewards."
            yield from (f"The reward {name} {problem}." for name, problem in self.rewards_not_allowed())
        if objective in ("grpo", "rloo") and training.effective_batch % drawn.samples_per_prompt:
            yield (
                f"{objective} draws {drawn.samples_per_prompt} answers to each prompt, and a step has {training.effective_batch}: make "
                "training.batch_size x training.gradient_accumulation a multiple of reinforcement.samples_per_prompt."
            )

    def rewards_not_allowed(self) -> list[tuple[str, str]]:
        """(reward, why it cannot be read): functions of the user's own that lie outside `reinforcement.reward_folder`."""
        found = []
        for name in self.reinforcement.reward:
            file, _, function = name.rpartition(":")
            if not file.endswith(".py") or not function.isidentifier():
                continue
            if self.reinforcement.reward_folder is None:
                found.append(
                    (name, "is a function of your own: set reinforcement.reward_folder to the folder it may be read from")
                )
            elif os.path.isabs(file) or ".." in Path(file).parts:
                found.append((name, "lies outside reinforcement.reward_folder: name the file as it is called in that folder"))
        return found


# --- reading ------------------------------------------------------------------------------------


# NUL and halves of surrogate pairs, which YAML writes as escapes: the system takes no path with them, and no file such text.
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader that also refuses a key given twice, text no path can hold, and aliases (a few lines can expand to gigabytes)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not supported", event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if found := _UNUSABLE.search(value):
            problem = f"a value holds the character {found[0]!r}, which no path and no text file can"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None) or key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands here twice or is no plain name", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 reads `2e-4` as text (it wants `2.0e-4`); everybody writes learning rates that way.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML safely: no tags that build objects, no aliases, no duplicate keys, bounded size."""
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(
            "CONFIG_UNREADABLE",
            f"The file is larger than {MAX_FILE_BYTES:,} characters.",
            where=where,
            remedy="Settings alone are never that long: check that this is the file that was meant, and name data by its path.",
        )
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError("CONFIG_UNREADABLE", f"Not valid YAML: {problem}.", where=place, remedy="Mend that line.") from error
    except RecursionError as error:
        raise ConfigError(
            "CONFIG_UNREADABLE",
            "The file is nested too deeply.",
            where=where,
            remedy="No setting lies more than a few levels deep: look for brackets or braces that are not closed.",
        ) from error
    except (ValueError, AttributeError, IndexError) as error:  # impossible dates, endless numbers, empty tags
        problem = f"A value cannot be read: {str(error)[:120]}."
        raise ConfigError("CONFIG_UNREADABLE", problem, where=where, remedy="Put that value in quotes.") from error


def load_config(path: Path | str, overrides: list[str] | None = None) -> tuple[RunConfig, dict[str, Origin]]:
    """Read a run file and `key=value` overrides. Returns the configuration and where each set value came from."""
    return build_config(load_values(path), overrides, where=str(path))


def load_values(path: Path | str) -> dict[str, Any]:
    """What a run file says, as nested settings not yet validated."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            "CONFIG_UNREADABLE",
            f"The run file cannot be read: {error.strerror}.",
            where=str(path),
            remedy="Check the path; `ftf config > run.yaml` writes a file to start from.",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            "CONFIG_UNREADABLE", f"The run file is not UTF-8 (byte {error.start}).", where=str(path), remedy="Save it as UTF-8."
        ) from error
    values = parse_yaml(text, where=str(path)) or {}
    if not isinstance(values, dict):
        raise ConfigError(
            "CONFIG_UNREADABLE", "A run file is a mapping of settings.", where=str(path), remedy="See `ftf config`."
        )
    return values


def build_config(
    values: Mapping[str, Any], overrides: list[str] | None = None, *, where: str = "run file"
) -> tuple[RunConfig, dict[str, Origin]]:
    """Validate settings from a mapping plus `section.key=value` overrides; every error is reported at once."""
    merged = _deep_copy(values)
    for override in overrides or []:
        apply_override(merged, override)
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        raise _explain(error, where) from error
    origins: dict[str, Origin] = {key: "yours" for key in _leaves(merged) if key != "version"}
    return config, origins


def require_runnable(config: RunConfig, *, where: str = "run file") -> None:
    """Raise `CONFIG_CONFLICT` listing every combination that cannot work."""
    if problems := config.conflicts():
        raise ConfigError("CONFIG_CONFLICT", " ".join(problems), where=where, remedy="Change the settings named above.")


def dump_config(config: RunConfig, origins: Mapping[str, Origin], reasons: Mapping[str, str] | None = None) -> str:
    """The complete run file as YAML, with a comment saying where each value came from, and why. Reads back equal."""
    reasons = reasons or {}
    lines = ["# Written by FineTuneFlow. Every setting of the run; the remark says where its value came from."]
    for name, value in config.model_dump(mode="json").items():
        if not isinstance(value, dict):
            lines.append(_yaml_line(name, value, 0, _remark(name, origins, reasons)))
            continue
        lines.append(f"{name}:")
        lines += [_yaml_line(key, inner, 2, _remark(f"{name}.{key}", origins, reasons)) for key, inner in value.items()]
    return "\n".join(lines) + "\n"


def settings() -> Iterator[tuple[str, type[Any], Any, str]]:
    """Every setting as (dotted key, type, default, explanation): the source of help texts, forms and docs."""
    defaults = RunConfig()
    for name, field in RunConfig.model_fields.items():
        value = getattr(defaults, name)
        if isinstance(value, Section):
            for key, inner in type(value).model_fields.items():
                yield f"{name}.{key}", inner.annotation, getattr(value, key), inner.description or ""  # type: ignore[misc]
        else:
            yield name, field.annotation, value, field.description or ""  # type: ignore[misc]


def _remark(key: str, origins: Mapping[str, Origin], reasons: Mapping[str, str]) -> str:
    origin = origins.get(key) or _inner_origin(origins, f"{key}.")
    reason = " ".join(reasons.get(key, "").split())  # a line break would end the comment
    return f"{origin}: {reason}" if reason else origin


def _yaml_line(key: str, value: Any, indent: int, remark: str) -> str:
    # default_flow_style keeps lists and mappings on one line; "..." ends a bare scalar document
    text = (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("\n").removesuffix("\n...")
    )
    return f"{' ' * indent}{key}: {text}  # {remark}"


def _inner_origin(origins: Mapping[str, Origin], prefix: str) -> Origin:
    return next((origin for key, origin in origins.items() if key.startswith(prefix)), "default")


def _deep_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def apply_override(values: dict[str, Any], override: str, *, where: str | None = None) -> None:
    """Write what `section.key=value` says into nested settings; the value is read as YAML. `where`: as it was typed."""
    key, separator, text = override.partition("=")
    where = where or f"--set {key.strip()}"
    if not separator or not key.strip():
        raise ConfigError(
            "CONFIG_INVALID_VALUE",
            f"{override!r} is not of the form section.key=value.",
            where=where,
            remedy="Write e.g. `--set training.epochs=1`.",
        )
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                "CONFIG_INVALID_VALUE",
                f"{section!r} in {override!r} is not a group of settings.",
                where=where,
                remedy="`ftf config` lists every setting by its full name.",
            )
        values = inner
    values[last] = parse_yaml(text, where=where)


def _explain(error: ValidationError, where: str) -> ConfigError:
    """All mistakes of a run file in one error; an unknown key names the nearest known one."""
    known = [key for key, *_ in settings()]
    lines, unknown = [], False
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            unknown = True
            near = _nearest_key(key, known)
            lines.append(f"{key}: unknown setting" + (f"; did you mean {near!r}?" if near else "."))
        else:
            lines.append(f"{key}: {item['msg']} (found {str(item['input'])[:60]!r}).")
    code = "CONFIG_UNKNOWN_KEY" if unknown else "CONFIG_INVALID_VALUE"
    return ConfigError(
        code,
        ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines),
        where=where,
        remedy="`ftf config` lists every setting with its default and meaning.",
        context={"settings": [".".join(str(p) for p in item["loc"]) for item in error.errors()]},
    )


def _nearest_key(key: str, known: list[str]) -> str | None:
    """The known setting most like `key`: by its whole dotted name, else by its last part in any section."""
    sections = {k.split(".")[0] for k in known if "." in k}
    if "." not in key and (near := difflib.get_close_matches(key, sections, n=1, cutoff=0.75)):
        return near[0]
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
        return near[0]
    last = key.rsplit(".", 1)[-1]
    by_last = {k.rsplit(".", 1)[-1]: k for k in known}
    for old, new in FORMER_NAMES.items():
        if last == old:
            return new
    near = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    return by_last[near[0]] if near else None


# What other tools and the reference documents call our settings: a typo helper, not an alias.
FORMER_NAMES = {
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "lr": "training.learning_rate",
    "per_device_train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "training.eval_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "lr_scheduler_type": "training.scheduler",
    "optim": "training.optimizer",
    "logging_steps": "training.log_steps",
    "save_total_limit": "training.keep_checkpoints",
    "load_best_model_at_end": "training.load_best",
    "early_stopping_patience": "training.patience",
    "lora_r": "method.r",
    "lora_rank": "method.r",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "base_model": "model.base",
    "base_model_id": "model.base",
    "model_name_or_path": "model.base",
    "dataset": "data.train",
    "use_rslora": "method.rslora",
}


# --- changing a run file --------------------------------------------------------------------------


def edit_text(text: str, changes: Mapping[str, Any]) -> str:
    """The text of a run file with some settings (dotted key -> value) changed; everything else, comments too, stays.

    Where the file's form does not allow that (settings on one line in braces), the whole is written anew without comments.
    """
    wanted = parse_yaml(text, where="run file") or {}
    for key, value in changes.items():
        *sections, last = key.split(".")
        inner = wanted
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    lines = text.splitlines()
    for key, value in changes.items():
        _edit_line(lines, key, yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n..."))
    edited = "\n".join(lines) + "\n"
    try:
        if parse_yaml(edited, where="run file") == wanted:
            return edited
    except ConfigError:
        pass
    return yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)


def _edit_line(lines: list[str], key: str, value: str) -> None:
    """Change or add `section.name: value` in block style; what comes of other styles is caught by reading it back."""
    section, _, name = key.rpartition(".")
    if not section:
        start, end, indent = 0, len(lines), ""
    else:
        heads = [index for index, line in enumerate(lines) if re.match(rf"{re.escape(section)}\s*:\s*(#.*)?$", line)]
        if not heads:
            lines += [f"{section}:", f"  {name}: {value}"]
            return
        start = heads[0] + 1
        end = next((i for i in range(start, len(lines)) if lines[i].strip() and not lines[i].startswith((" ", "#"))), len(lines))
        first = next((line for line in lines[start:end] if line.strip() and not line.lstrip().startswith("#")), "  x")
        indent = first[: len(first) - len(first.lstrip())]
    for index in range(start, end):
        if found := re.match(rf"({re.escape(indent)}{re.escape(name)}\s*:\s*)([^#]*?)(\s+#.*)?$", lines[index]):
            lines[index] = f"{found.group(1)}{value}{found.group(3) or ''}"
            return
    lines.insert(start, f"{indent}{name}: {value}")
