"""Energy of a run: measured where codecarbon is, a reason where it is not, and never in a run's way."""

from __future__ import annotations

import builtins
import hashlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from finetuneflow.training import energy as module
from finetuneflow.training.energy import Energy, measured_energy


def _work(seconds: float) -> None:
    end, block = time.monotonic() + seconds, b"x" * 4_000_000
    while time.monotonic() < end:
        hashlib.sha256(block)  # lets other threads run, as tensor operations do


def test_a_second_of_work_uses_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("codecarbon")
    monkeypatch.chdir(tmp_path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # A user's own settings for codecarbon must not make it talk or write.
    monkeypatch.setenv("CODECARBON_EMISSIONS_ENDPOINT", "http://127.0.0.1:9/")
    monkeypatch.setenv("CODECARBON_CO2_SIGNAL_API_TOKEN", "x")
    monkeypatch.setenv("CODECARBON_OUTPUT_METHODS", "csv,api")
    monkeypatch.setenv("CODECARBON_ALLOW_MULTIPLE_RUNS", "false")
    handlers = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    began = time.monotonic()
    with measured_energy("FRA") as energy:
        entered = time.monotonic() - began
        assert energy.kwh is None
        _work(5)
    assert entered < 0.2  # starting happens beside the run
    assert energy.reason is None
    assert energy.kwh is not None and 1e-7 < energy.kwh < 1e-2
    assert energy.co2_kg == pytest.approx(energy.kwh * 56 / 1000)
    assert energy.source is not None and energy.source.startswith("codecarbon 3.") and "France" in energy.source
    assert energy.seconds == pytest.approx(5, abs=1)
    assert list(tmp_path.iterdir()) == []
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert not [thread for thread in threading.enumerate() if thread.name == "energy"]


def test_the_source_says_how_the_power_was_found() -> None:
    pytest.importorskip("codecarbon")
    with measured_energy() as energy:
        _work(4)
    assert energy.source is not None and "memory estimated" in energy.source and "World" in energy.source
    counters = Path("/sys/class/powercap/intel-rapl").exists() and os.access("/sys/class/powercap/intel-rapl", os.R_OK)
    if sys.platform == "linux" and not counters:
        assert "estimated from its load" in energy.source


def test_an_unknown_country_still_measures_with_the_worlds_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch)
    with measured_energy("Atlantis") as energy:
        pass
    assert energy.co2_kg == pytest.approx(energy.kwh * 0.481)


def test_a_run_goes_on_where_codecarbon_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "codecarbon":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with measured_energy("FRA") as energy:
        pass
    assert energy.kwh is None and energy.co2_kg is None and energy.source is None
    assert energy.reason is not None and "finetuneflow[energy]" in energy.reason


class _Tracker:
    """Stands for codecarbon's: 2 kWh."""

    _hardware = ()

    def __init__(self, start: float = 0.0, stop: float = 0.0, fails: str | None = None) -> None:
        self.delays, self.fails = {"start": start, "stop": stop}, fails

    def start(self) -> None:
        self._do("start")

    def stop(self) -> None:
        self._do("stop")
        if self.fails != "data":
            self.final_emissions_data = type(
                "Data", (), {"energy_consumed": 2.0, "codecarbon_version": "0", "gpu_count": 1, "gpu_model": "1 x Card"}
            )

    def _do(self, what: str) -> None:
        time.sleep(self.delays[what])
        if self.fails == what:
            raise RuntimeError(f"cannot {what}")


def _pretend(monkeypatch: pytest.MonkeyPatch, **how: Any) -> None:
    monkeypatch.setattr(module, "_tracker", lambda grams: _Tracker(**how))
    monkeypatch.setattr(module, "SHORTEST_SECONDS", 0.0)


@pytest.mark.parametrize(("fails", "words"), [("start", "could not start"), ("stop", "could not stop"), ("data", "no figures")])
def test_whatever_codecarbon_meets_becomes_a_reason(fails: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, fails=fails)
    with measured_energy() as energy:
        pass
    assert energy.kwh is None and words in (energy.reason or "")


@pytest.mark.parametrize("slow", ["start", "stop"])
def test_a_hanging_codecarbon_is_left_behind(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    _pretend(monkeypatch, **{slow: 1.0})
    began = time.monotonic()
    with measured_energy() as energy:
        pass
    assert time.monotonic() - began < 0.8
    assert energy.kwh is None and energy.reason


def test_a_run_shorter_than_the_start_is_said_to_be_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, start=0.2)
    monkeypatch.setattr(module, "SHORTEST_SECONDS", 1.0)
    with measured_energy() as energy:
        pass
    assert energy.kwh is None and "too short" in (energy.reason or "")


def test_seconds_that_codecarbon_missed_count_with_the_mean_power_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, start=0.5)
    with measured_energy() as energy:
        time.sleep(1.0)
    assert energy.kwh == pytest.approx(4.0, rel=0.2)  # it saw 2 kWh in half of the time


def test_an_exception_of_the_run_passes_through_and_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch)
    seen: list[Energy] = []
    with pytest.raises(KeyError), measured_energy("USA") as energy:
        seen.append(energy)
        raise KeyError
    assert seen[0].kwh is not None and seen[0].kwh >= 2.0 and "1 x Card by the driver's counters" in (seen[0].source or "")


def test_it_keeps_silent(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("codecarbon")
    logging.getLogger("codecarbon").handlers.clear()
    with measured_energy() as energy:
        _work(4)
    assert energy.kwh is not None
    assert capfd.readouterr() == ("", "")
