"""Rewards: what each built-in pays, what a user's own function may do, and how a reward model reads an answer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finetuneflow.config import Reinforcement, build_config, dump_config
from finetuneflow.errors import ConfigError, FineTuneFlowError, ModelError, TrainingError
from finetuneflow.evaluation.reward_model import RewardModel, can_share, load_reward_model
from finetuneflow.evaluation.rewards import BUILT_IN, Reward, as_trl, last_number, load_rewards
from finetuneflow.inference import Ending
from finetuneflow.models.adapters import TRAINED, AdapterSpec
from models.tiny import tiny_tokenizer
from training.ppo_bench import PpoBench, tiny

PROMPT = [{"role": "user", "content": "What is 3 + 4?"}]


def reward(text: str, **settings: Any) -> Reward:
    (found,) = load_rewards(Reinforcement(reward=[text], **settings))
    return found


def pays(text: str, completion: str, answer: str | None = None, **settings: Any) -> float:
    return reward(text, **settings).score([PROMPT], [completion], [answer])[0]


# --- built-in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "completion", "answer", "value"),
    [
        ("length:4", "one two three four", None, 1.0),
        ("length:4", "one two", None, 0.5),
        ("length:4", "one two three four, five!", None, 0.75),
        ("length:4", "", None, 0.0),
        ("length:2", "one two three four five six", None, 0.0),
        ("contains_answer", "It is Paris, of course.", "paris", 1.0),
        ("contains_answer", "14 apples", "4", 0.0),
        ("contains_answer", "It is 4.", "4.", 1.0),
        ("exact_answer", " Paris. ", "paris", 1.0),
        ("exact_answer", "It is Paris.", "Paris", 0.0),
        ("number", "First 3, then 4: 7 in all", "3 + 4 = 7\n#### 7", 1.0),
        ("number", "#### 1,234 because 99 is left over", "1234", 1.0),
        ("number", "It costs 0.5 euros", "1/2 = .50", 1.0),
        ("number", "It is -7", "7", 0.0),
        ("number", "no idea", "7", 0.0),
        ("similarity", "the cat sat", "the cat sat", 1.0),
        ("similarity", "the cat", "a dog", 0.0),
        ("regex:^Yes", "Yes, it is", None, 1.0),
        ("regex:^Yes", "No: Yes", None, 0.0),
        ("regex:a:b", "xa:by", None, 1.0),
        ("starts_with:Sure", "  Sure thing", None, 1.0),
        ("starts_with:Sure", "sure thing", None, 0.0),
        ("ends_with:.", "It is.\n", None, 1.0),
        ("ends_with:.", "It is", None, 0.0),
        ("no_repetition", "one two three four five", None, 1.0),
        ("no_repetition", "a b c a b c a b c", None, 3 / 7),
        ("no_repetition", "", None, 1.0),
    ],
)
def test_a_built_in_reward_pays_what_it_says(text: str, completion: str, answer: str | None, value: float) -> None:
    assert pays(text, completion, answer) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", 42.0),
        ("x = 3\n#### $1,000.50 for 2", 1000.5),
        ("from 1 to 10.", 10.0),
        ("-3", -3.0),
        ("none", None),
        ("7 ####", 7.0),
    ],
)
def test_the_last_number_or_the_marked_one_is_the_result(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_an_answer_is_paid_for_ending_by_itself() -> None:
    tokenizer = tiny_tokenizer()
    (ends,) = load_rewards(Reinforcement(reward=["ends"]), ending=Ending(tokenizer, frozenset({3})))
    assert ends.score([PROMPT] * 2, ["a", "a"], [None] * 2, [[100, 3], [100, 101]]) == [1.0, 0.0]
    with pytest.raises(TrainingError) as caught:
        reward("ends").score([PROMPT], ["a"], [None], [[3]])
    assert caught.value.code == "REWARD_FAILED"


def test_an_endless_pattern_is_given_up_and_pays_nothing() -> None:
    assert pays("regex:(a+)+$", "a" * 40 + "b") == 0.0


def test_every_built_in_is_explained_in_a_line() -> None:
    assert len(BUILT_IN) >= 10
    assert all(20 < len(built_in.explanation) < 100 and "\n" not in built_in.explanation for built_in in BUILT_IN.values())


@pytest.mark.parametrize("text", ["contains_answer", "exact_answer", "number", "similarity"])
def test_a_row_without_the_expected_answer_is_named(text: str) -> None:
    with pytest.raises(TrainingError) as caught:
        reward(text).score([PROMPT] * 2, ["7", "7"], ["7", ""], rows=["data.jsonl:1", "data.jsonl:2"])
    assert caught.value.code == "REWARD_FAILED" and "data.jsonl:2" in str(caught.value.where)


# --- what the run file may say ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("lenght:4", "does not exist"),
        ("length", "length:WORDS"),
        ("length:many", "many"),
        ("length:0", "at least 1"),
        ("regex:(", "cannot use"),
        ("number:7", "takes nothing"),
        ("starts_with:", "starts_with:TEXT"),
        ("model:", "does not exist"),
        ("pay.py:f", "reward_folder"),
    ],
)
def test_a_mistake_shows_before_training_and_says_what_to_write(text: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        reward(text)
    assert caught.value.code == "REWARD_INVALID" and word in caught.value.message and caught.value.remedy


def test_a_run_without_a_reward_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        load_rewards(Reinforcement())
    assert caught.value.code == "REWARD_INVALID" and "contains_answer" in str(caught.value.remedy)


def test_weights_must_match_the_rewards() -> None:
    rewards = load_rewards(Reinforcement(reward=["number", "length:5"], reward_weights=[2.0, 0.5]))
    assert [r.weight for r in rewards] == [2.0, 0.5] and [r.weight for r in load_rewards(Reinforcement(reward=["number"]))] == [
        1.0
    ]
    with pytest.raises(ConfigError) as caught:
        load_rewards(Reinforcement(reward=["number", "length:5"], reward_weights=[1.0]))
    assert "1 values for 2 rewards" in caught.value.message


def test_rewards_load_no_torch_unless_a_model_is_one() -> None:
    code = (
        "import sys; from finetuneflow.evaluation.rewards import load_rewards; from finetuneflow.config import Reinforcement\n"
        "r, = load_rewards(Reinforcement(reward=['number'])); assert r.score([[]], ['7'], ['7']) == [1.0]\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- functions of the user ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "pay.py").write_text(
        "import math\n"
        "def half(completion): return 0.5\n"
        "def same(completion, answer=None): return completion == answer\n"
        "def asked(completion, answer=None, prompt=None): return len(prompt[0]['content'])\n"
        "def many(completions, answers): return [len(c) for c in completions]\n"
        "def few(completions): return [1.0]\n"
        "def bad(completion): return 1 / len(completion)\n"
        "def odd(completion): return float('nan')\n"
        "def words(completion): return 'good'\n"
        "def none(completion): return None\n"
        "def other(text): return 1.0\n"
        "def huge(completion): return 10**5000\n"
        "def leaves(completion): raise SystemExit(0)\n"
        "def late(completions): return (1 / len(c) for c in completions)\n"
        "def mixed(completion, prompts): return 1.0\n"
    )
    return tmp_path / "rewards"


@pytest.mark.parametrize(
    ("name", "values"), [("half", [0.5, 0.5]), ("same", [1.0, 0.0]), ("asked", [14.0, 14.0]), ("many", [3.0, 2.0])]
)
def test_a_function_of_the_user_gets_what_it_asks_for(folder: Path, name: str, values: list[float]) -> None:
    own = reward(f"pay.py:{name}", reward_folder=str(folder))
    found = own.score([PROMPT] * 2, ["yes", "no"], ["yes", "yes"])
    assert found == values and all(type(value) is float for value in found)


def test_a_file_of_rewards_may_hold_dataclasses(folder: Path) -> None:
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Pay:\n    sum: float\n"
    (folder / "classes.py").write_text(text + "def f(completion): return Pay(2.0).sum\n")
    assert reward("classes.py:f", reward_folder=str(folder)).score([PROMPT], ["yes"], [None]) == [2.0]


@pytest.mark.parametrize(
    ("name", "row", "word"),
    [
        ("bad", "d:2", "ZeroDivisionError"),
        ("odd", "d:1", "nan"),
        ("words", "d:1", "good"),
        ("none", "d:1", "None"),
        ("few", None, "1 values for 2 answers"),
        ("huge", "d:1", "something of type int"),
        ("leaves", "d:1", "SystemExit"),
        ("late", None, "ZeroDivisionError"),
    ],
)
def test_a_function_that_fails_is_named_with_the_row(folder: Path, name: str, row: str | None, word: str) -> None:
    own = reward(f"pay.py:{name}", reward_folder=str(folder))
    with pytest.raises(TrainingError) as caught:
        own.score([PROMPT] * 2, ["yes", ""], [None] * 2, rows=["d:1", "d:2"])
    error = caught.value
    assert error.code == "REWARD_FAILED" and f"pay.py:{name}" in error.message and word in error.message
    assert error.where == (f"row {row}" if row else None)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("pay.py:nothing", "does not define"),
        ("pay.py:math", "does not define"),
        ("gone.py:half", "not in the reward folder"),
        ("../outside.py:half", "outside the reward folder"),
        ("link.py:half", "outside the reward folder"),
        ("pay.py:other", "takes (text)"),
        ("pay.py:mixed", "takes (completion, prompts)"),
        ("broken.py:half", "SyntaxError"),
        ("exit.py:half", "SystemExit"),
        ("a\0.py:half", "outside the reward folder"),
    ],
)
def test_only_functions_of_files_in_the_folder_are_run(folder: Path, text: str, word: str) -> None:
    outside = folder.parent / "outside.py"
    outside.write_text("raise SystemExit('this file must not be run')")
    (folder / "link.py").symlink_to(outside)
    (folder / "broken.py").write_text("def half(:\n")
    (folder / "exit.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ConfigError) as caught:
        reward(text, reward_folder=str(folder))
    assert caught.value.code == "REWARD_INVALID" and word in caught.value.message


def test_an_absolute_path_outside_the_folder_is_refused(folder: Path) -> None:
    outside = folder.parent / "outside.py"
    outside.write_text("raise SystemExit('this file must not be run')")
    with pytest.raises(ConfigError):
        reward(f"{outside}:half", reward_folder=str(folder))


# --- for the library's trainers ---------------------------------------------------------------------------------


def test_a_reward_is_called_as_the_library_calls_its_own(folder: Path) -> None:
    function = as_trl(reward("pay.py:same", reward_folder=str(folder)))
    conversational = [[{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]]
    columns = {"answer": ["yes", "yes"], "place": ["d:1", "d:2"], "trainer_state": None}
    assert function(prompts=[PROMPT] * 2, completions=conversational, completion_ids=[[1], [2]], **columns) == [1.0, 0.0]
    assert function(["What?", "What?"], ["yes", "no"], answer=["yes", "no"]) == [1.0, 1.0]
    assert function.__name__ == "pay_py_same"


def test_the_librarys_call_names_the_row_of_a_mistake(folder: Path) -> None:
    function = as_trl(reward("pay.py:bad", reward_folder=str(folder)))
    with pytest.raises(TrainingError) as caught:
        function([PROMPT] * 2, ["yes", ""], place=["d:1", "d:2"])
    assert caught.value.where == "row d:2"


# --- reward models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("rewards") / "base", layers=2)


def classifier(base: Path) -> Any:
    """A scoring model on the base whose head is fixed by a seed, as transformers builds it."""
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        model.score.weight.data.normal_()
    return model


def as_run(base: Path, folder: Path, *, objective: str = "reward", kind: str = "lora") -> Path:
    """What a finished run leaves beside its weights."""
    tokenizer = tiny_tokenizer(320)
    values = {
        "model": {"base": str(base)},
        "data": {"train": ["x"]},
        "method": {"kind": kind},
        "training": {"objective": objective},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(dump_config(build_config(values)[0], {}))
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "template.json").write_text(json.dumps({"name": "own", "source": tokenizer.chat_template}))
    (folder / "environment.json").write_text(json.dumps({"setup": {"storage_dtype": "float32"}}))
    return folder


def adapter_run(base: Path, folder: Path) -> tuple[Path, Any]:
    """A reward run made with PEFT alone, and its model in memory."""
    from peft import LoraConfig, get_peft_model

    run = as_run(base, folder)
    model: Any = get_peft_model(
        classifier(base), LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(run / "adapter")
    return run, model.eval()


COMPLETIONS = ["It is 7.", "No.", "", "seven " * 12, "<|im_end|> is a word here"]


def scores_by_hand(model: Any, base: Path, completions: list[str]) -> list[float]:
    """Each conversation alone, rendered by the chat template, through the last hidden state of its last token."""
    tokenizer = tiny_tokenizer(320)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = []
    for completion in completions:
        text = f"<|im_start|>user\n{PROMPT[0]['content']}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>\n"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            found.append(float(inner.score(inner.model(torch.tensor([ids])).last_hidden_state[0, -1])[0]))
    return found


def score(model: RewardModel, completions: list[str]) -> list[float]:
    return Reward("model", 1.0, model).score([PROMPT] * len(completions), completions, [None] * len(completions))


def test_a_reward_run_scores_the_last_token_of_each_conversation(base: Path, tmp_path: Path) -> None:
    run, model = adapter_run(base, tmp_path / "run")
    found = score(load_reward_model(run, batch_size=2), COMPLETIONS[:4])
    assert found == pytest.approx(scores_by_hand(model, base, COMPLETIONS[:4]), abs=1e-5)
    assert len(set(found)) == 4


def test_a_control_token_in_an_answer_is_text(base: Path, tmp_path: Path) -> None:
    """Written out in an answer it must not end the turn for the reward model."""
    run, _ = adapter_run(base, tmp_path / "run")
    ids = load_reward_model(run).encode(PROMPT, COMPLETIONS[4], "row")
    assert ids.count(3) == 2, "the ends of the two turns"


def test_a_full_reward_run_is_read_from_its_model_folder(base: Path, tmp_path: Path) -> None:
    run = as_run(base, tmp_path / "run", kind="full")
    model = classifier(base).eval()
    model.save_pretrained(run / "model")
    assert score(load_reward_model(run), COMPLETIONS[:4]) == pytest.approx(scores_by_hand(model, base, COMPLETIONS[:4]), abs=1e-5)


def test_a_plain_folder_with_one_label_is_a_reward_model(base: Path, tmp_path: Path) -> None:
    model = classifier(base).eval()
    model.save_pretrained(tmp_path / "scorer")
    tiny_tokenizer(320).save_pretrained(tmp_path / "scorer")
    (loaded,) = load_rewards(Reinforcement(reward=[f"model:{tmp_path / 'scorer'}"]))
    found = loaded.score([PROMPT] * 2, COMPLETIONS[:2], [None] * 2)
    assert found == pytest.approx(scores_by_hand(model, base, COMPLETIONS[:2]), abs=1e-5)


def test_an_encoder_is_asked_through_its_own_head(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(**shape, num_labels=1, pad_token_id=0)).eval()
    model.save_pretrained(tmp_path / "bert")
    tiny_tokenizer(320).save_pretrained(tmp_path / "bert")
    scorer = load_reward_model(tmp_path / "bert", batch_size=4)
    with torch.no_grad():
        expected = [float(model(torch.tensor([scorer.encode(PROMPT, text, "r")])).logits) for text in COMPLETIONS[:3]]
    assert score(scorer, COMPLETIONS[:3]) == pytest.approx(expected, abs=1e-5)


def two_labels(base: Path, folder: Path) -> Path:
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(folder)
    return folder


def headless(base: Path, folder: Path) -> Path:
    """A causal model whose configuration only claims to be a scoring one."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "score"}, "label2id": {"score": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def unfinished(base: Path, folder: Path) -> Path:
    return as_run(base, folder)


def pickled(base: Path, folder: Path) -> Path:
    classifier(base).save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (two_labels, "REWARD_INVALID"),
        (headless, "MODEL_CORRUPT"),
        (unfinished, "RUN_NOT_FINISHED"),
        (pickled, "MODEL_NO_SAFETENSORS"),
        (lambda base, folder: as_run(base, folder, objective="dpo"), "REWARD_INVALID"),
        (lambda base, folder: folder, "MODEL_NOT_FOUND"),
    ],
)
def test_what_is_no_reward_model_is_refused(base: Path, tmp_path: Path, make: Any, code: str) -> None:
    with pytest.raises(FineTuneFlowError) as caught:
        load_reward_model(make(base, tmp_path / "folder"))
    assert caught.value.code == code and caught.value.remedy


# --- on the policy's base ------------------------------------------------------------------------------------------


def test_on_the_policys_base_it_scores_as_alone_and_changes_nothing(base: Path, tmp_path: Path) -> None:
    run, model = adapter_run(base, tmp_path / "reward")
    ppo = PpoBench(tmp_path, base, AdapterSpec(r=4, modules_to_save=["lm_head"]), rewards=None)
    trainer = ppo.build(reinforcement__reward=[f"model:{run}"])
    assert set(trainer.model.peft_config) == {TRAINED, "value", "reward"}
    plain = ppo.model()[0].eval()
    (shared,) = trainer.rewards
    found = shared.score([PROMPT] * 4, COMPLETIONS[:4], [None] * 4)
    assert found == pytest.approx(scores_by_hand(model, base, COMPLETIONS[:4]), abs=1e-5)
    assert trainer.model.base_model.active_adapters == [TRAINED]
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(trainer.model(ids).logits, plain(ids).logits)
    trained = {id(p) for p in (*trainer.actors.policy_parameters, *trainer.actors.value_parameters)}
    assert all(p.requires_grad == (id(p) in trained) for p in trainer.model.parameters())


def test_a_run_is_paid_by_a_reward_model_on_its_own_base(base: Path, tmp_path: Path) -> None:
    run, _ = adapter_run(base, tmp_path / "reward")
    ppo = PpoBench(tmp_path, base, rewards=None)
    trainer = ppo.train(training__max_steps=2, reinforcement__reward=[f"model:{run}", "ends"])
    assert trainer.state.global_step == 2 and list(trainer.model.peft_config) == [TRAINED]
    (line, *_) = [event["metrics"] for event in ppo.events() if event["event"] == "log"]
    assert {"reward_model:reward", "reward_ends"} <= line.keys() and line["reward_std"] > 0


def test_a_base_is_shared_only_where_the_adapter_belongs_to_it(base: Path, tmp_path: Path) -> None:
    run, _ = adapter_run(base, tmp_path / "reward")
    config = PpoBench(tmp_path, base).config()

    def of(**model: Any) -> Any:
        return config.model_copy(update={"model": config.model.model_copy(update=model)})

    assert can_share(run, config) and can_share(run, of(adapter="earlier"))
    assert not can_share(run, of(base="another"))
    assert not can_share(run, of(adapter="earlier", adapter_start="stack"))
    assert not can_share(run, config.model_copy(update={"method": config.method.model_copy(update={"kind": "full"})}))
    assert not can_share(run, config.model_copy(update={"method": config.method.model_copy(update={"kind": "qlora"})}))
    (run / "base").mkdir()
    assert not can_share(run, config), "its adapter belongs to a merged base"


def test_a_damaged_reward_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run, _ = adapter_run(base, tmp_path / "reward")
    path = run / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if ".score." not in name}, str(path))
    with pytest.raises(ModelError) as caught:
        PpoBench(tmp_path, base, rewards=None).build(reinforcement__reward=[f"model:{run}"])
    assert caught.value.code == "ADAPTER_CORRUPT"


def test_prompts_with_tool_calls_are_read_in_both_forms() -> None:
    from finetuneflow.evaluation.reward_model import as_messages

    plain = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "name": "add", "arguments": {"x": 1}}]}
    nested = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "add", "arguments": '{"x": 1}'}}]}
    assert as_messages([plain]) == as_messages([nested])
    assert as_messages([plain])[0].tool_calls[0].arguments == {"x": 1}
