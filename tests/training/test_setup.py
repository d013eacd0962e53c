"""Every substitution that the hardware makes necessary is chosen, and said."""

from __future__ import annotations

from typing import Any

import pytest

from finetuneflow.config import build_config
from finetuneflow.errors import HardwareError
from finetuneflow.training import setup as setups
from finetuneflow.training.setup import Setup, choose_setup


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def choose(monkeypatch: pytest.MonkeyPatch, *, bf16: bool = False, **settings: Any) -> tuple[Setup, dict[str, Any]]:
    """The setup for some settings, and its decisions by setting."""
    monkeypatch.setattr(setups, "bf16_is_fast", lambda device: bf16)
    values: dict[str, Any] = {"training": {"threads": 1}}
    for key, value in settings.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    found = choose_setup(build_config(values)[0])
    return found, {decision.setting: decision for decision in found.decisions}


@pytest.mark.parametrize(
    ("wanted", "bf16", "compute", "said"),
    [
        ("auto", True, "bfloat16", True),
        ("auto", False, "float32", True),
        ("bf16", True, "bfloat16", False),
        ("bf16", False, "float32", True),
        ("fp16", True, "float32", True),
        ("fp32", True, "float32", False),
    ],
)
def test_the_precision_is_what_the_machine_computes_fast_and_a_substitute_is_said(
    monkeypatch: pytest.MonkeyPatch, wanted: str, bf16: bool, compute: str, said: bool
) -> None:
    found, decisions = choose(monkeypatch, bf16=bf16, training__precision=wanted)
    assert found.compute_dtype == compute and ("training.precision" in decisions) == said


@pytest.mark.parametrize(
    ("wanted", "optimizer", "said"),
    [
        ("auto", "adamw_torch_fused", True),
        ("paged_adamw_8bit", "adamw_8bit", True),
        ("adamw_8bit", "adamw_8bit", False),
        ("adafactor", "adafactor", False),
    ],
)
def test_paged_memory_is_replaced_on_a_cpu(monkeypatch: pytest.MonkeyPatch, wanted: str, optimizer: str, said: bool) -> None:
    found, decisions = choose(monkeypatch, training__optimizer=wanted)
    assert found.optimizer == optimizer and ("training.optimizer" in decisions) == said


@pytest.mark.parametrize(
    ("kind", "rate", "used"),
    [
        ("full", 2e-4, 2e-5),
        ("full", 5e-4, 2e-5),
        ("full", 1.99e-4, 1.99e-4),
        ("full", 1e-5, 1e-5),
        ("lora", 2e-4, 2e-4),
        ("qlora", 1e-2, 1e-2),
    ],
)
def test_full_fine_tuning_lowers_a_rate_made_for_adapters_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, kind: str, rate: float, used: float
) -> None:
    found, decisions = choose(monkeypatch, method__kind=kind, training__learning_rate=rate)
    assert found.learning_rate == used
    assert ("training.learning_rate" in decisions) == (used != rate)
    if used != rate:
        assert (
            decisions["training.learning_rate"].warning == "LEARNING_RATE_LOWERED" and decisions["training.learning_rate"].advice
        )


@pytest.mark.parametrize(("kind", "dtype", "bf16", "storage"), [
    ("lora", "auto", True, "bfloat16"), ("lora", "auto", False, "float32"), ("lora", "float32", True, "float32"),
    ("full", "auto", True, "float32"), ("full", "bfloat16", True, "float32"),
])  # fmt: skip
def test_weights_that_are_trained_are_kept_in_32_bits(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str, bf16: bool, storage: str
) -> None:
    found, decisions = choose(monkeypatch, bf16=bf16, method__kind=kind, model__dtype=dtype, training__learning_rate=1e-5)
    assert found.storage_dtype == storage and ("model.dtype" in decisions) == (dtype == "bfloat16")


@pytest.mark.parametrize(("wanted", "used"), [("auto", False), ("on", True), ("off", False)])
def test_activations_are_recomputed_on_a_cpu_only_when_asked(monkeypatch: pytest.MonkeyPatch, wanted: str, used: bool) -> None:
    assert choose(monkeypatch, training__gradient_checkpointing=wanted)[0].gradient_checkpointing is used


def test_cuda_is_never_quietly_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HardwareError) as caught:
        choose(monkeypatch, training__device="cuda")
    assert caught.value.code == "GPU_NOT_AVAILABLE" and "ftf doctor" in str(caught.value)


def test_threads_are_measured_unless_given_and_an_earlier_choice_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetuneflow import hardware

    monkeypatch.setattr(hardware, "measure_threads", lambda *a, **k: hardware.ThreadChoice(3, {3: 1.0}, "measured here"))
    config = build_config({})[0]
    measured = choose_setup(config)
    assert measured.threads == 3 and any(
        d.setting == "training.threads" and d.reason == "measured here" for d in measured.decisions
    )
    assert choose_setup(config, threads=2).threads == 2
    assert choose_setup(build_config({"training": {"threads": 5}})[0]).threads == 5


def test_every_decision_has_a_reason_and_the_setup_can_be_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    found, decisions = choose(monkeypatch, method__kind="full", model__dtype="float16", training__optimizer="paged_adamw_8bit")
    assert decisions and all(decision.reason.endswith((".", "threads")) for decision in decisions.values())
    assert json.loads(json.dumps(found.to_dict()))["device"] == "cpu"
