"""Pre-train the starter model from nothing: `python -m finetuneflow.models.starter.pretrain`.

Writes a complete model folder: a byte-level BPE tokenizer learned from the generated corpus, its
chat template, and a small Llama-shaped language model. The chat tokens are reserved but never
seen here, so the result is a base model: it continues text and does not answer.

Training has four rounds, one for each stage of the corpus. `--minutes` is a ceiling: as long as it
is not reached a run depends on the seed alone, up to the order of floating-point sums; when it is,
the learning rate goes to zero with the clock.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from finetuneflow.models.starter.corpus import Stage, documents, fingerprint

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
PADDING = "<|pad|>"

# The `generation` block marks what the assistant says, for training on answers alone.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

EMBEDDING_SCALE = 0.25
TOKENIZER_DOCUMENTS = 60_000
HELD_OUT_ROWS = 64
HELD_OUT_SEED_OFFSET = 1_000_003


@dataclass(frozen=True)
class Round:
    """One pass over one stage of the corpus, with a learning rate of its own."""

    stage: Stage
    num_tokens: int
    peak_learning_rate: float


@dataclass(frozen=True)
class Recipe:
    """All that decides the result, in tokens, steps and minutes."""

    seed: int = 1
    rounds: tuple[Round, ...] = (
        Round("reading", num_tokens=4_000_000, peak_learning_rate=1.5e-3),
        Round("facts", num_tokens=3_140_000, peak_learning_rate=2.5e-3),
        Round("recollection", num_tokens=4_000_000, peak_learning_rate=2.5e-3),
        Round("rehearsal", num_tokens=3_200_000, peak_learning_rate=2e-3),
    )
    limit_minutes: float = 60.0
    vocab_size: int = 3_200
    hidden_size: int = 256
    intermediate_size: int = 640
    num_layers: int = 6
    num_heads: int = 4
    row_tokens: int = 256
    rows_per_step: int = 8
    initial_scale: float = 0.05
    warmup_steps: int = 80
    weight_decay: float = 0.05
    compiled: bool = True

    @property
    def step_tokens(self) -> int:
        return self.row_tokens * self.rows_per_step


@dataclass(frozen=True)
class Outcome:
    """What a run did, for the model card."""

    num_parameters: int
    num_tokens: int
    minutes: float
    training_loss: float
    held_out_loss: float
    corpus_sha256: str


def train_tokenizer(seed: int, vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn the merges from the first documents of the corpus; no merge contains a digit."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(seed), TOKENIZER_DOCUMENTS), trainer)
    # Without merges over digits the plain byte-level split gives the same tokens, and it is the
    # one which other runtimes know.
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        extra_special_tokens=[END_OF_TEXT, START_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised model with tied embeddings, in float32."""
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=recipe.initial_scale,
        bos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    plant_looking_back(model, recipe.seed)
    return model


def _orthonormal_rows(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random directions at right angles to each other and to the first axis."""
    basis = torch.linalg.qr(torch.randn(size - 1, size - 1, generator=generator))[0][:count]
    return torch.cat([torch.zeros(count, 1), basis], dim=1)


@torch.no_grad()
def plant_looking_back(model: LlamaForCausalLM, seed: int) -> None:
    """Start from a model which can already repeat what stood earlier in the text.

    Finding an earlier occurrence of the current token and reading off what followed takes two
    attention heads that are useless without each other, so gradient descent needs tens of
    millions of tokens to stumble on the pair. Here one head of the first layer looks one token
    back, one head of the second layer compares what it found with the current token, and
    training only has to keep and refine them. All other branches start silent.
    """
    generator = torch.Generator().manual_seed(seed)
    config, layers = model.config, model.model.layers
    half = config.head_dim // 2
    size = config.hidden_size
    for layer in layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embeddings = model.model.embed_tokens.weight
    embeddings.normal_(0.0, EMBEDDING_SCALE, generator=generator)
    embeddings[:, 0] = 3 * EMBEDDING_SCALE  # a constant, for the head that ignores content
    model.model.norm.weight.fill_(0.1)  # else tied embeddings make every token predict itself
    found, noted = _orthonormal_rows(2 * config.head_dim, size, generator).chunk(2)
    copied = _orthonormal_rows(config.head_dim, size, generator)

    # Rotary positions: a key turned one step ahead meets the query of the next token. The
    # quickest frequencies tell neighbours apart best.
    angles = config.rope_parameters["rope_theta"] ** (-torch.arange(8) / half)
    query, key = torch.zeros(2, config.head_dim, size)
    query[:8, 0] = 2.0
    key[:8, 0], key[half : half + 8, 0] = 2.0 * angles.cos(), 2.0 * angles.sin()
    _set_first_head(layers[0].self_attn, query, key, value=found, output=0.5 * noted)

    # The slow frequencies hardly turn within a row, so there content decides and not distance.
    slow = [*range(half // 2, half), *range(half + half // 2, 2 * half)]
    query, key = torch.zeros(2, config.head_dim, size)
    query[slow], key[slow] = 2.5 * found[: len(slow)], 2.5 * noted[: len(slow)]
    _set_first_head(layers[1].self_attn, query, key, value=copied, output=4.0 * copied)


def _set_first_head(attention: torch.nn.Module, query: Tensor, key: Tensor, *, value: Tensor, output: Tensor) -> None:
    head = slice(0, query.shape[0])
    attention.q_proj.weight[head] = query
    attention.k_proj.weight[head] = key
    attention.v_proj.weight[head] = value
    attention.o_proj.weight[:, head] = output.T


def rows(tokenizer: PreTrainedTokenizerFast, seed: int, stage: Stage, row_tokens: int) -> Iterator[list[int]]:
    """Rows of exactly `row_tokens` tokens: documents end to end, cut wherever a row is full."""
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    stream = documents(seed, stage)
    pending: list[int] = []
    while True:
        for encoding in tokenizer.backend_tokenizer.encode_batch(list(islice(stream, 1_000))):
            pending.append(end_of_text)
            pending.extend(encoding.ids)
        whole = len(pending) - len(pending) % row_tokens
        for start in range(0, whole, row_tokens):
            yield pending[start : start + row_tokens]
        pending = pending[whole:]


def next_token_loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats for every token of a batch but the first of each row."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch, use_cache=False).logits
    predictions = logits[:, :-1].flatten(0, 1).float()
    return cross_entropy(predictions, batch[:, 1:].flatten())


def held_out_loss(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, seed: int, row_tokens: int) -> float:
    """Loss on the stream of a seed that training never uses."""
    stream = rows(tokenizer, seed + HELD_OUT_SEED_OFFSET, "recollection", row_tokens)
    batch = torch.tensor(list(islice(stream, HELD_OUT_ROWS)))
    with torch.inference_mode():
        return next_token_loss(model, batch).item()


def learning_rate(recipe: Recipe, peak: float, step: int, progress: float) -> float:
    """A short linear warm-up, then a straight line down to nothing at the end of the round."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    return peak * warmup * max(0.0, 1.0 - progress)


def _optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train_round(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, index: int) -> tuple[float, int]:
    """Train one round in place; return the mean loss of its last steps and the steps done."""
    this = recipe.rounds[index]
    loss_of = torch.compile(next_token_loss) if recipe.compiled else next_token_loss
    optimizer = _optimizer(model, recipe)
    stream = rows(tokenizer, recipe.seed + index, this.stage, recipe.row_tokens)
    num_steps = this.num_tokens // recipe.step_tokens
    limit_minutes = recipe.limit_minutes * this.num_tokens / sum(r.num_tokens for r in recipe.rounds)
    started = time.monotonic()
    losses: list[float] = []
    for step in range(num_steps):
        minutes = (time.monotonic() - started) / 60
        progress = max(step / num_steps, minutes / limit_minutes)
        if progress >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, this.peak_learning_rate, step, progress)
        batch = torch.tensor(list(islice(stream, recipe.rows_per_step)))
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"{this.stage} {step}/{num_steps} loss {fmean(losses[-100:]):.4f} {minutes:.1f} min", flush=True)
    return fmean(losses[-100:]), len(losses)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out_dir: Path) -> None:
    """Write the model in bfloat16 with its tokenizer, readable by everyone."""
    stop_tokens = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
    model.generation_config = GenerationConfig(eos_token_id=stop_tokens, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    for path in out_dir.iterdir():
        path.chmod(0o644)


def pretrain(recipe: Recipe, out_dir: Path) -> Outcome:
    """Run the whole recipe, leaving in `out_dir` the model as it is after every round."""
    started = time.monotonic()
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(recipe.seed, recipe.vocab_size)
    model = build_model(recipe, tokenizer)
    loss, num_steps = 0.0, 0
    for index in range(len(recipe.rounds)):
        loss, steps_done = train_round(model, tokenizer, recipe, index)
        num_steps += steps_done
        save(model, tokenizer, out_dir)
    return Outcome(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_tokens=num_steps * recipe.step_tokens,
        minutes=round((time.monotonic() - started) / 60, 1),
        training_loss=round(loss, 4),
        held_out_loss=round(held_out_loss(model, tokenizer, recipe.seed, recipe.row_tokens), 4),
        corpus_sha256=fingerprint(recipe.seed),
    )


def main() -> None:
    defaults = Recipe()
    parser = argparse.ArgumentParser(description="Pre-train the starter model from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--minutes", type=float, default=defaults.limit_minutes)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(
        seed=arguments.seed,
        limit_minutes=arguments.minutes,
        compiled=not arguments.no_compile,
    )
    print(json.dumps(asdict(pretrain(recipe, arguments.out)), indent=2))


if __name__ == "__main__":
    main()
