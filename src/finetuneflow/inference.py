"""Ask a model: load a base with its adapters, switch them, generate in batches, stream.

    load_generator(run, adapter folder, model folder, hub id or "starter")  ->  Generator
        .generate(prompts)   batched; an answer does not depend on its neighbours in the batch
        .stream(messages)    text as it comes, never half a character
        .view("name" / None) the same weights with one adapter, or with none

Evaluation, comparison, chat and the samples shown during training all go through `Generator`.
"""

from __future__ import annotations

import bisect
import collections.abc as abc
import contextlib
import hashlib
import itertools
import queue
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from finetuneflow.data.examples import Message
from finetuneflow.errors import EvaluationError, ModelError

DEFAULT_BATCH = 32
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
# State-space models that keep padding out of their state; other models without attention do not.
MASK_PADDING = frozenset({"mamba", "mamba2", "falcon_mamba", "mamba_swelu"})
# A model whose config states no limit (Mamba) has none that matters here.
NO_LIMIT = 1 << 30


class PromptTemplate(Protocol):
    """What generation needs of a chat template (`data.templates.Template`)."""

    @property
    def turn_end(self) -> Sequence[int]:
        """Token ids that end an assistant turn, in order."""

    @property
    def stop(self) -> str:
        """The same as text."""

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> Sequence[int]:
        """Token ids of the conversation and the opening of the assistant's turn."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are drawn. Temperature 0 is greedy; `top_p` keeps the likeliest tokens of that total probability.

    Sampling is seeded per prompt, so an answer is the same alone, in any batch and after a resume.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise EvaluationError(
                "DECODING_INVALID",
                f"These decoding settings cannot be used: {self}.",
                remedy="max_new_tokens at least 1, temperature 0 or more, top_p above 0 and at most 1.",
            )


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `text` has no outer white space, `ids` no stop token; `stopped`: the model ended its turn by itself."""

    text: str
    ids: tuple[int, ...]
    stopped: bool
    prompt_tokens: int


class Generator:
    """A model, its tokenizer and its template, ready to answer.

    `adapter` says which weights answer: "active" (as loaded), the name of a loaded adapter, or None (the base alone).
    Not safe for two threads at once: adapters are switched in the model itself.
    """

    def __init__(
        self, model: Any, tokenizer: Any, template: PromptTemplate, *, name: str = "model", adapter: str | None = "active"
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.name = name
        self.active = adapter

    # --- adapters ---------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters loaded on the base."""
        return tuple(getattr(self.model, "peft_config", {}))

    def view(self, adapter: str | None, *, name: str | None = None) -> Generator:
        """The same weights in memory, answering with `adapter` (None: the base alone) from now on."""
        self._require_adapter(adapter)
        return Generator(self.model, self.tokenizer, self.template, name=name or adapter or "base", adapter=adapter)

    @contextlib.contextmanager
    def adapter(self, name: str | None) -> Iterator[Generator]:
        """Inside, this generator answers with the adapter `name`, or without any (None)."""
        self._require_adapter(name)
        before, self.active = self.active, name
        try:
            yield self
        finally:
            self.active = before

    def _require_adapter(self, name: str | None) -> None:
        if name not in (None, "active", *self.adapters):
            loaded = ", ".join(self.adapters) or "none"
            raise ModelError("ADAPTER_NOT_FOUND", f"No adapter {name!r} is loaded.", remedy=f"Loaded: {loaded}.")

    @contextlib.contextmanager
    def ready(self) -> Iterator[Any]:
        """The model in evaluation mode with this generator's adapter; training mode and adapter are restored.

        Between training steps gradients are only switched off: buffers that a model renews on the way (rotary tables)
        would be tensors of inference mode, which a later backward pass refuses.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with self._switched(), torch.no_grad() if was_training else torch.inference_mode():
                yield self.model
        finally:
            self.model.train(was_training)

    @contextlib.contextmanager
    def _switched(self) -> Iterator[None]:
        from finetuneflow.models.adapters import base_only, switch_adapter

        if self.active is None:
            with base_only(self.model):
                yield
        elif self.active == "active":
            yield
        else:
            before = self.model.active_adapter
            switch_adapter(self.model, self.active)
            try:
                yield
            finally:
                switch_adapter(self.model, before)

    def fingerprint(self) -> str:
        """Identity of the weights that answer: a hash of 64 values of each tensor, and of the adapter in use.

        Any training step changes it; it needs no file, so it also serves a model still being trained.
        """
        digest = hashlib.sha256(f"{self.active}|{getattr(self.model, 'active_adapter', '')}".encode())
        with torch.no_grad():
            for name, parameter in sorted(self.model.named_parameters()):
                flat = parameter.detach().reshape(-1)
                picked = flat[torch.linspace(0, max(len(flat) - 1, 0), min(64, len(flat)), device=flat.device).long()]
                digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
                digest.update(picked.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    # --- generating -------------------------------------------------------------------------

    @property
    def context_length(self) -> int:
        """Tokens the model can see at once, less what a trained prefix takes."""
        config = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        limits = [value for key in CONTEXT_KEYS if isinstance(value := getattr(config, key, None), int) and value > 0]
        prefix = 0
        if self.active is not None and self.adapters:
            name = self.model.active_adapter if self.active == "active" else self.active
            prefix = getattr(self.model.peft_config[name], "num_virtual_tokens", None) or 0
        return (limits[0] if limits else NO_LIMIT) - prefix

    @property
    def ending(self) -> Ending:
        """What ends an answer: the template's turn end, and the end tokens of tokenizer and model."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        tokens = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list | tuple) else [ends])} - {None}
        turn_end = tuple(self.template.turn_end)
        if len(turn_end) == 1 or (turn_end and turn_end[0] in self.tokenizer.all_special_ids):
            return Ending(self.tokenizer, frozenset(tokens | {turn_end[0]}))
        return Ending(self.tokenizer, frozenset(tokens), self.template.stop if turn_end else "")

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> tuple[int, ...]:
        """Token ids of one prompt; an error when the model's context has no room for it and one token of answer."""
        ids = tuple(self.template.prompt_ids(messages, tools))
        if len(ids) >= self.context_length:
            raise EvaluationError(
                "PROMPT_TOO_LONG",
                f"The prompt has {len(ids):,} tokens; {self.name} sees {self.context_length:,} at most, answer included.",
                where=f"prompt beginning {messages[0].content[:60]!r}" if messages else None,
                remedy="Shorten the prompt, drop earlier turns, or use a model with a longer context.",
            )
        return ids

    def recent(self, messages: Sequence[Message], *, room: int) -> list[Message]:
        """A conversation without its oldest exchanges where that is needed to leave `room` tokens for the answer.

        The system message stays, and the last turn always does, even if it does not fit.
        """
        system, turns = list(messages[:1]), list(messages[1:])
        if system and system[0].role != "system":
            system, turns = [], list(messages)
        while len(self.template.prompt_ids([*system, *turns])) + room > self.context_length:
            later = [i for i in range(1, len(turns)) if turns[i].role == "user"]
            if not later:
                break
            turns = turns[later[0] :]
        return [*system, *turns]

    def generate(
        self,
        prompts: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = DEFAULT_BATCH,
    ) -> list[Generation]:
        """Answer all prompts, in their order."""
        decoding = Decoding(max_new_tokens, temperature, top_p, seed)
        ids = [self.prompt_ids(messages) for messages in prompts]
        answers: dict[int, Generation] = {}
        for batch in self.plan_batches(ids, decoding, batch_size=batch_size):
            answers.update(zip(batch, self.generate_batch([ids[i] for i in batch], decoding), strict=True))
        return [answers[i] for i in range(len(ids))]

    def plan_batches(self, prompts: Sequence[Sequence[int]], decoding: Decoding, *, batch_size: int) -> list[list[int]]:
        """Which prompts (by index) are answered together: neighbours in length, the longest first.

        A prompt so near the context limit that its answer must be shorter goes alone, so that padding never
        costs it a token. A model that padding before a text would disturb answers prompts of equal lengths together.
        """
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        config = self.model.config
        recurrent = carries_padding(config)
        batches: list[list[int]] = []
        for i in order:
            alone = len(prompts[i]) + decoding.max_new_tokens > self.context_length
            last = batches[-1] if batches else []
            mates = last and len(last) < batch_size and (not recurrent or len(prompts[last[0]]) == len(prompts[i]))
            crowded = last and len(prompts[last[0]]) + decoding.max_new_tokens > self.context_length
            if alone or crowded or not mates:
                batches.append([i])
            else:
                last.append(i)
        return batches

    def generate_batch(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[Generation]:
        """Answer one batch of token ids, left padded, in one go."""
        ending = self.ending
        with self.ready():
            rows = self._run(prompts, decoding)
        cuts = [ending.cut(row) for row in rows]
        return [
            Generation(text.strip(), tuple(kept), stopped, len(prompt))
            for (kept, text, stopped), prompt in zip(cuts, prompts, strict=True)
        ]

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield one answer piece by piece; the pieces together are `Generation.text`. Closing the iterator stops the model."""
        decoding = Decoding(max_new_tokens, temperature, top_p, seed)
        prompt = self.prompt_ids(messages)
        ending = self.ending
        with contextlib.closing(self._stream_ids(prompt, decoding)) as tokens:
            before_end = itertools.takewhile(lambda token: token not in ending.tokens, tokens)
            yield from trimmed(before_text(whole_characters(before_end, self.tokenizer), ending.text))

    def _stream_ids(self, prompt: Sequence[int], decoding: Decoding) -> abc.Generator[int, None, None]:
        """Token ids of the answer as they come, end tokens included. The model runs in a thread of its own."""
        arriving: queue.Queue[int | BaseException | None] = queue.Queue()
        cancelled = threading.Event()

        def work() -> None:
            try:
                with self.ready():
                    self._run([prompt], decoding, on_token=arriving.put, cancelled=cancelled)
                arriving.put(None)
            except BaseException as error:  # handed to the consumer, which raises it
                arriving.put(error)

        thread = threading.Thread(target=work, name="ftf-stream", daemon=True)
        thread.start()
        try:
            while (item := arriving.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            cancelled.set()
            thread.join()

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        *,
        on_token: Callable[[int], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> list[list[int]]:
        """Token ids of the answers, those that end them included; `generate` leaves some behind an end too."""
        from finetuneflow.decode_loop import Greedy, answer_rows, serves

        ids, mask = left_padded(prompts, self.tokenizer.pad_token_id or 0, device=self.model.device)
        limit = min(decoding.max_new_tokens, self.context_length - ids.shape[1])
        sampling = SeededSampling(decoding, prompts) if decoding.temperature > 0 else None
        if not serves(self.model):
            return self._run_generate(ids, mask, limit, sampling, on_token=on_token, cancelled=cancelled)
        choice, ended = sampling or Greedy(), self.ending.ended
        return answer_rows(self.model, ids, mask, limit=limit, choice=choice, ended=ended, on_token=on_token, cancelled=cancelled)

    def _run_generate(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        limit: int,
        sampling: SeededSampling | None,
        *,
        on_token: Callable[[int], None] | None,
        cancelled: threading.Event | None,
    ) -> list[list[int]]:
        """The same by transformers' own loop, which knows every model."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        pad = self.tokenizer.pad_token_id or 0
        settings = GenerationConfig(max_new_tokens=limit, do_sample=False, use_cache=True, pad_token_id=pad)  # type: ignore[no-untyped-call]
        stop = StopAt(self.ending, prompt_width=ids.shape[1], cancelled=cancelled)
        with plain_defaults(self.model, settings):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([sampling] if sampling else []),
                stopping_criteria=StoppingCriteriaList([stop]),
                streamer=_Streamer(on_token) if on_token else None,
            )
        return output[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


# --- the parts of a generation step -----------------------------------------------------------


def carries_padding(config: Any) -> bool:
    """Whether padding before a text changes what the model makes of it, so that a batch needs equal lengths.

    A model of the user's own says by `masks_padding` in its configuration class that it does not.
    """
    from finetuneflow.models.own import is_own

    if is_own(config):
        return not getattr(type(config), "masks_padding", False)
    return not hasattr(config, "num_attention_heads") and config.model_type not in MASK_PADDING


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of token ids; special tokens and "clean-ups" of blanks left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def left_padded(prompts: Sequence[Sequence[int]], pad: int, *, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask of shape (prompts, longest prompt), the padding before each prompt."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


@dataclass(frozen=True, slots=True)
class Ending:
    """What ends an answer: any of `tokens`; and `text`, for a turn end that is several ordinary tokens (they may merge
    with what stands before them, so only their text is sure)."""

    tokenizer: Any
    tokens: frozenset[int]
    text: str = ""

    def cut(self, ids: Sequence[int]) -> tuple[list[int], str, bool]:
        """Token ids and text before the end, and whether there was one."""
        kept = list(itertools.takewhile(lambda token: token not in self.tokens, ids))
        text, stopped = decode(self.tokenizer, kept), len(kept) < len(ids)
        if not self.text or self.text not in text:
            return kept, text, stopped
        text = text[: text.index(self.text)]
        whole = bisect.bisect_right(range(len(kept) + 1), len(text), key=lambda n: len(decode(self.tokenizer, kept[:n]))) - 1
        return kept[:whole], text, True

    def reached(self, answers: torch.Tensor) -> torch.Tensor:
        """For each row, whether its newest token completes an end."""
        newest = answers[:, -1]
        done = torch.isin(newest, torch.tensor(sorted(self.tokens), dtype=newest.dtype, device=newest.device))
        if not self.text:
            return done
        return done | torch.tensor([self._text_in(tail) for tail in answers[:, -self._tail :].tolist()], device=done.device)

    def ended(self, answer: Sequence[int]) -> bool:
        """Whether the newest token of this answer completes an end."""
        return answer[-1] in self.tokens or (bool(self.text) and self._text_in(answer[-self._tail :]))

    @property
    def _tail(self) -> int:
        """Tokens that `text` may lie in: at most one per byte; four more for what it may have merged with."""
        return len(self.text.encode()) + 4

    def _text_in(self, ids: Sequence[int]) -> bool:
        return self.text in decode(self.tokenizer, ids)


class StopAt:
    """Stopping criterion: a row is done when its answer has reached its end, all are when cancelled."""

    def __init__(self, ending: Ending, *, prompt_width: int, cancelled: threading.Event | None = None) -> None:
        self.ending = ending
        self.prompt_width = prompt_width
        self.cancelled = cancelled
        self.done: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.cancelled is not None and self.cancelled.is_set():
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        reached = self.ending.reached(input_ids[:, self.prompt_width :])
        self.done = reached if self.done is None else self.done | reached
        return self.done


class SeededSampling:
    """Draw each row's token from its own random stream. As a processor of `generate`, it leaves that token of the scores alone.

    A row's stream depends on the seed and its prompt alone, so batches, their order and resumes do not change an answer.
    """

    def __init__(self, decoding: Decoding, prompts: Sequence[Sequence[int]]) -> None:
        self.temperature = decoding.temperature
        self.top_p = decoding.top_p
        self.streams = [random.Random(f"{decoding.seed}:{list(prompt)}") for prompt in prompts]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, float("-inf")).scatter(1, self.draw(scores)[:, None], 0.0)

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""
        self.streams = [self.streams[row] for row in rows]

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """One token per row of scores."""
        probabilities, order = torch.softmax(scores.double() / self.temperature, dim=-1).sort(dim=-1, descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        total = torch.where(before < self.top_p, probabilities, 0.0).cumsum(dim=-1)
        drawn = torch.tensor([[stream.random()] for stream in self.streams], dtype=total.dtype, device=total.device)
        place = torch.searchsorted(total, drawn * total[:, -1:], right=True).clamp(max=total.shape[1] - 1)
        return order.gather(1, place)[:, 0]


@contextlib.contextmanager
def plain_defaults(model: Any, settings: Any) -> Iterator[None]:
    """Keep a checkpoint's own sampling defaults (repetition penalty, suppressed tokens, …) out of a measurement."""
    owners = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = settings
        yield
    finally:
        for owner, kept in zip(owners, before, strict=True):
            owner.generation_config = kept


class _Streamer:
    """Tells of generated token ids one by one; the first call brings the prompt, which is passed over."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token = on_token
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            for token in value.reshape(-1).tolist():
                self.on_token(token)
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing: the end is told by the thread itself, after an error too."""


def whole_characters(tokens: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """Tokens in, text out: a character whose bytes are spread over several tokens comes when its last one is there.

    Only the tokens since the piece before last are decoded anew, so the work stays proportional to the length.
    """
    ids: list[int] = []
    window = shown = 0
    for token in tokens:
        ids.append(token)
        known = decode(tokenizer, ids[window:shown])
        text = decode(tokenizer, ids[window:])
        if len(text) > len(known) and not text.endswith("�"):
            window, shown = shown, len(ids)
            yield text[len(known) :]
    rest = decode(tokenizer, ids[window:])[len(decode(tokenizer, ids[window:shown])) :]
    if rest:  # bytes that never became a character: shown as �
        yield rest


def before_text(pieces: Iterable[str], end: str) -> Iterator[str]:
    """Pieces up to the text `end`; what may be its beginning is held back until that is clear."""
    held = ""
    for piece in pieces:
        held += piece
        if end and end in held:
            yield held[: held.index(end)]
            return
        doubtful = next((n for n in range(min(len(end) - 1, len(held)), 0, -1) if held.endswith(end[:n])), 0)
        yield held[: len(held) - doubtful]
        held = held[len(held) - doubtful :]
    yield held


def trimmed(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces without white space before the first and after the last visible character, and without empty ones."""
    blanks, begun = "", False
    for piece in pieces:
        piece = blanks + piece if begun else piece.lstrip()
        visible = piece.rstrip()
        blanks = piece[len(visible) :]
        if visible:
            begun = True
            yield visible


# --- loading ------------------------------------------------------------------------------------


def load_generator(
    source: str | Path,
    *,
    adapter: bool = True,
    adapters: Mapping[str, Path] | None = None,
    checkpoint: str | int | None = None,
    template: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    module: str | None = None,
) -> Generator:
    """Load what `source` names: a run directory, an adapter folder, a model folder, a hub id, or "starter".

    Of a run, `adapter=False` loads the base alone, asked through the run's own tokenizer and template, and
    `checkpoint` (a step, or a folder name under `checkpoints/`) takes the weights of that moment.
    `adapters` puts further ones on the same base, switched by name. Run names are resolved by the caller.
    `module`: the Python file of an architecture of one's own; of a run, the copy it keeps unless one is named.
    """
    from finetuneflow.models.source import ModelSource

    folder = Path(source)
    options = {"device": device, "dtype": dtype}
    if (folder / "run.yaml").is_file():
        generator = _from_run(folder, with_adapter=adapter, checkpoint=checkpoint, module=module, options=options)
    elif (folder / "adapter_config.json").is_file():
        found = ModelSource("", revision, module=module)
        generator = _from_adapter(folder, with_adapter=adapter, template=template, source=found, options=options)
    else:
        generator = _from_model(ModelSource(str(source), revision, module=module), template=template, options=options)
    if adapters:
        from finetuneflow.models.adapters import load_adapters

        generator.model = (
            _with_more(generator.model, adapters) if generator.adapters else load_adapters(generator.model, adapters)
        )
    generator.model.eval()
    return generator


def _with_more(model: Any, adapters: Mapping[str, Path]) -> Any:
    from finetuneflow.models.adapters import check_adapter_dir

    for name, adapter_dir in adapters.items():
        check_adapter_dir(adapter_dir)
        model.load_adapter(str(adapter_dir), adapter_name=name)
    return model


def _from_model(source: Any, *, template: str, options: Mapping[str, Any]) -> Generator:
    from finetuneflow.data.templates import resolve_template
    from finetuneflow.models.load import load_base

    loaded = load_base(source, **options)
    return Generator(loaded.model, loaded.tokenizer, resolve_template(loaded.tokenizer, template), name=Path(source.base).name)


def _from_adapter(folder: Path, *, with_adapter: bool, template: str, source: Any, options: Mapping[str, Any]) -> Generator:
    """An adapter folder on the base its config names; its own tokenizer files, if it has some, come first.

    Of `source`, revision and module count.
    """
    from finetuneflow.data.templates import resolve_template
    from finetuneflow.models.adapters import check_adapter_dir
    from finetuneflow.models.load import load_with_adapters

    config = check_adapter_dir(folder)
    named = str(config.get("base_model_name_or_path") or "")
    base = replace(source, base=named, revision=source.revision or config.get("revision"))
    loaded = load_with_adapters(base, {"default": folder} if with_adapter else {}, **options)
    tokenizer = _tokenizer_of(folder) or loaded.tokenizer
    return Generator(loaded.model, tokenizer, resolve_template(tokenizer, template, consent=True), name=folder.name)


def _from_run(
    run: Path, *, with_adapter: bool, checkpoint: str | int | None, module: str | None, options: Mapping[str, Any]
) -> Generator:
    from finetuneflow.config import load_config
    from finetuneflow.data.templates import template_of_run
    from finetuneflow.models.load import dtype_of_run, load_base, load_with_adapters
    from finetuneflow.models.own import kept_in
    from finetuneflow.models.source import ModelSource, source_of

    config, _ = load_config(run / "run.yaml")
    if config.training.objective == "reward":
        raise ModelError(
            "MODEL_SCORES_ONLY",
            f"{run.resolve().name} is a reward model: it scores answers and writes none.",
            remedy="Evaluate it with `ftf evaluate` on pairs, without a suite, or use it in a run as reinforcement.reward: model:FOLDER.",
        )
    module = module or kept_in(run, config.model.module)
    if options["dtype"] == "auto":
        options = {**options, "dtype": dtype_of_run(run)}
    source = replace(source_of(config.model), module=module)
    if config.method.is_adapter:
        quantize = {"quantize": "nf4", "double_quant": config.method.double_quantization} if config.method.kind == "qlora" else {}
        wanted = {"tuned": _weights_dir(run, checkpoint, final="adapter")} if with_adapter else {}
        # A checkpoint of a stacked adapter holds the upper one alone; the final weights hold both.
        below = config.model.adapter if checkpoint is not None and config.model.adapter_start == "stack" else None
        loaded = load_with_adapters(source, wanted, below=Path(below) if below else None, **quantize, **options)
    elif with_adapter:
        loaded = load_base(ModelSource(str(_weights_dir(run, checkpoint, final="model")), module=module), **options)
    else:
        loaded = load_base(source, **options)
    tokenizer = _tokenizer_of(run / "tokenizer") or loaded.tokenizer
    name = run.resolve().name if with_adapter else "base"
    return Generator(loaded.model, tokenizer, template_of_run(run, tokenizer), name=name)


def _weights_dir(run: Path, checkpoint: str | int | None, *, final: str) -> Path:
    """The folder of a run's weights: the final ones, or those of an intact checkpoint."""
    from finetuneflow.training.checkpoints import checkpoint_dir, find_damage, list_complete
    from finetuneflow.workspace import safe_join

    root = run / "checkpoints"
    if checkpoint is None:
        if (run / final).is_dir():
            return run / final
        raise ModelError(
            "RUN_NOT_FINISHED",
            f"{run.name} has no final weights ({final}/): it did not end.",
            remedy="Resume it with `ftf resume`, or name a checkpoint.",
            context={"checkpoints": [c.path.name for c in list_complete(root)]},
        )
    named = str(checkpoint)
    folder = checkpoint_dir(root, int(named)) if named.isdigit() else safe_join(root, named)
    if (damage := find_damage(folder)) is not None:
        there = ", ".join(c.path.name for c in list_complete(root)) or "none"
        raise ModelError(
            "CHECKPOINT_UNUSABLE", f"{folder.name} cannot be used: {damage}.", remedy=f"Complete checkpoints: {there}."
        )
    return folder


def _tokenizer_of(folder: Path) -> Any | None:
    from finetuneflow.models.tokenizer import TOKENIZER_FILES, load_tokenizer

    return load_tokenizer(folder)[0] if any((folder / name).is_file() for name in TOKENIZER_FILES) else None
