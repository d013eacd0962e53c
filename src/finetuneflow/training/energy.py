"""Energy and CO2 of a run as it happens, measured by codecarbon where it is installed.

    with measured_energy("FRA") as energy:
        ...
    energy.kwh, energy.co2_kg, energy.source     or None, with energy.reason

Nothing here can make a run fail or wait: codecarbon starts in a thread of its own, whatever it raises becomes `reason`.
It is told to write no file, to call no server and to ask nobody where the machine stands; settings a user has for it
elsewhere (`~/.codecarbon.config`, `CODECARBON_…`) are overruled for all of that. It never asks for a password.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from finetuneflow.errors import ConfigError
from finetuneflow.knowledge.facts import carbon_intensity

SAMPLE_SECONDS = 15.0  # between two readings; each takes a few milliseconds
SHORTEST_SECONDS = 1.0  # a shorter measurement is not worth its figure
PATIENCE_SECONDS = 10.0  # for codecarbon to start or stop; finding out the processor takes it one to two seconds


@dataclass(slots=True)
class Energy:
    """What a run used. All None until it has ended, and afterwards where it could not be measured: then `reason` says why.

    `kwh`: electricity of GPU, processor and memory, without what the building adds. `co2_kg`: kg of CO2 equivalents by
    the country's mix. `seconds`: how long the body took; the first one or two, in which codecarbon starts, count with the mean
    power of the rest. `source`: which version, and how the power was found.
    """

    kwh: float | None = None
    co2_kg: float | None = None
    seconds: float | None = None
    source: str | None = None
    reason: str | None = "The run has not ended yet."


@contextlib.contextmanager
def measured_energy(country: str | None = None) -> Iterator[Energy]:
    """Measure what happens inside. `country`: as `carbon_intensity` takes it; None: the world's average mix.

    Raises nothing of its own; what the body raises passes through, measured all the same.
    """
    energy = Energy()
    meter = _Meter(country)
    began = time.monotonic()
    meter.start()
    try:
        yield energy
    finally:
        try:
            meter.finish(energy, time.monotonic() - began)
        except Exception as error:  # a measurement must never cost a run
            energy.reason = f"codecarbon failed: {type(error).__name__}: {str(error)[:200]}"


class _Meter:
    """codecarbon's tracker behind a thread: `start` returns at once, `finish` waits `PATIENCE_SECONDS` at most."""

    def __init__(self, country: str | None) -> None:
        self.country = country
        self.tracker: Any = None
        self.problem: str | None = None
        self._starting: threading.Thread | None = None
        self._started_at = 0.0

    def start(self) -> None:
        self._starting = _in_thread(self._start)

    def _start(self) -> None:
        try:
            self.tracker = _tracker(_intensity(self.country)[0])
            self.tracker.start()
            self._started_at = time.monotonic()
        except ImportError:
            self.problem = "codecarbon is not installed: pip install 'finetuneflow[energy]'"
        except Exception as error:  # whatever a foreign library meets on a foreign machine
            self.problem = f"codecarbon could not start: {type(error).__name__}: {str(error)[:200]}"

    def finish(self, energy: Energy, seconds: float) -> None:
        assert self._starting is not None
        self._starting.join(PATIENCE_SECONDS)
        if self._starting.is_alive():
            energy.reason = f"codecarbon did not start within {PATIENCE_SECONDS:g} s of the run's end."
            return
        if self.problem is not None:
            energy.reason = self.problem
            return
        measured = time.monotonic() - self._started_at
        stopping = _in_thread(self._stop)
        stopping.join(PATIENCE_SECONDS)
        data = getattr(self.tracker, "final_emissions_data", None)
        if stopping.is_alive() or self.problem is not None or data is None:
            energy.reason = self.problem or "codecarbon did not stop in time, or gave no figures."
            return
        if measured < SHORTEST_SECONDS:
            energy.reason = f"The run was too short to be measured ({seconds:.1f} s, of which codecarbon saw {measured:.1f})."
            return
        intensity, mix = _intensity(self.country)
        energy.kwh = float(data.energy_consumed) * max(seconds / measured, 1.0)
        energy.co2_kg = energy.kwh * intensity / 1000
        energy.seconds = seconds
        energy.source = f"codecarbon {data.codecarbon_version}, offline; {_how(self.tracker, data)}; {intensity:g} g/kWh ({mix})"
        energy.reason = None

    def _stop(self) -> None:
        try:
            self.tracker.stop()
        except Exception as error:
            self.problem = f"codecarbon could not stop: {type(error).__name__}: {str(error)[:200]}"


def _in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True, name="energy")
    thread.start()
    return thread


def _intensity(country: str | None) -> tuple[float, str]:
    """gCO2e per kWh and whose; a country that is not in the table counts as the world (the measured energy still holds)."""
    try:
        carbon = carbon_intensity(country)
    except ConfigError:
        carbon = carbon_intensity(None)
    return carbon.grams_per_kwh, f"{carbon.name}, {carbon.year}"


def _tracker(grams_per_kwh: float) -> Any:
    if sys.platform == "darwin" and platform.machine() != "arm64":
        raise RuntimeError("on Macs with Intel processors it would ask for the administrator's password")
    logging.getLogger("codecarbon").disabled = True  # it speaks before it has read its log_level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from codecarbon import OfflineEmissionsTracker

        return OfflineEmissionsTracker(
            country_iso_code="USA",  # it wants one; the factor below is what counts
            force_carbon_intensity_g_co2e_kwh=grams_per_kwh,
            tracking_mode="process",
            measure_power_secs=SAMPLE_SECONDS,
            log_level="critical",
            output_methods=[],
            output_handlers=[],
            output_dir=".",
            emissions_endpoint=False,
            electricitymaps_api_token="",
            cloud_provider=None,
            cloud_region=None,
            pue=1.0,
            allow_multiple_runs=True,  # otherwise it takes over the handlers of SIGINT and SIGTERM and leaves a lock file
        )


_CPU_MODES = {
    "intel_rapl": "processor by its energy counters (RAPL)",
    "cpu_load": "processor estimated from its load and rated power, its energy counters are not readable",
    "constant": "processor at a constant share of its rated power, nothing better is readable",
}


def _how(tracker: Any, data: Any) -> str:
    """How the power was found, in words."""
    modes = [mode for hardware in getattr(tracker, "_hardware", ()) if (mode := getattr(hardware, "_mode", None))]
    parts = [_CPU_MODES.get(mode, f"processor by {mode}") for mode in modes] or ["processor by its own sensors"]
    if data.gpu_count:
        parts.insert(0, f"{data.gpu_model} by the driver's counters")
    return ", ".join([*parts, "memory estimated"])
