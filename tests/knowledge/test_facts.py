"""Cards, processors, electricity: against data sheets and other people's tables, and names as people and drivers write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetuneflow.errors import ConfigError
from finetuneflow.knowledge import facts
from finetuneflow.knowledge.facts import CARBON, ELECTRICITY, GPUS, RENTS, carbon_intensity, cpu_device, gpu, machine_named
from finetuneflow.knowledge.gpus import ALIASES, CARDS, SOURCES

# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("4070", "RTX 4070"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("rtx 3090ti", "RTX 3090 Ti"),
        ("RTX 3080 12 GB", "RTX 3080 12GB"),
        ("a100-80gb", "A100 SXM 80GB"),
        ("A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("Tesla T4", "T4"),
        ("H100", "H100 SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("V100", "V100 16GB"),
        ("Tesla P100-PCIE-16GB", "P100"),
        ("RTX 6000", "RTX 6000 Ada"),
        ("Quadro RTX 6000", "Quadro RTX 6000"),
        ("A6000", "RTX A6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell Max-Q"),
        ("AMD Instinct MI250X / MI250", "MI250X"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("7900 xt", "RX 7900 XT"),
        ("Apple M3 Max", "M3 Max"),
    ],
)
def test_a_card_is_found_by_the_names_of_people_and_drivers(asked: str, meant: str) -> None:
    assert gpu(asked).name == meant


def test_each_card_is_found_by_its_own_name_and_aliases() -> None:
    assert {name: gpu(name).name for name in GPUS} == {name: name for name in GPUS}
    assert {name: gpu(name).name for name in ALIASES} == ALIASES


@pytest.mark.parametrize(
    "asked",
    [
        "",
        "RTX",
        "super",
        "80gb",
        "gpu",
        "RTX 9999",
        "RTX 4090 48GB",
        "RTX 4090 5090",
        "RTX 2080 Ti Laptop",
        "4090" * 50,
        None,
        4090,
    ],
)
def test_a_name_that_is_no_known_card_is_refused_rather_than_guessed(asked: object) -> None:
    with pytest.raises(ConfigError) as raised:
        gpu(asked)  # type: ignore[arg-type]
    assert raised.value.code == "CONFIG_INVALID_VALUE"
    assert raised.value.remedy


def test_a_misspelt_card_gets_near_names_and_an_intel_card_the_reason() -> None:
    with pytest.raises(ConfigError, match="not in the table") as raised:
        gpu("RTX 4091")
    assert "RTX 4090" in raised.value.context["near"]
    with pytest.raises(ConfigError, match="Only CUDA, ROCm and Apple"):
        gpu("Intel Arc B580")


# --- figures ----------------------------------------------------------------------------------------

# Read off data sheets anew, not off the table: dense 16-bit TFLOPS, bandwidth GB/s, board power W.
PUBLISHED = {
    "A100 SXM 80GB": (312, 2039, 400),
    "H100 SXM": (1979 / 2, 3350, 700),  # printed with sparsity
    "H100 PCIe": (1513 / 2, 2000, 350),
    "H200 SXM": (1979 / 2, 4800, 700),
    "B200": (36_000 / 8 / 2, 64_000 / 8, 1000),  # a HGX of eight, with sparsity
    "L4": (242 / 2, 300, 72),
    "L40S": (733 / 2, 864, 350),
    "A40": (149.7, 696, 300),
    "A16": (17.9, 200, 250 / 4),
    "T4": (65, 320, 70),
    "V100 32GB": (125, 900, 300),
    "RTX 4090": (165.15, 1008, 450),  # waredb.com
    "RTX 3090 Ti": (80, 1008, 450),  # hmc-tech.com
    "RTX 2080 Ti": (53.8, 616, 250),
    "RTX 6000 Ada": (1457 / 4, 960, 300),  # printed as fp8 with sparsity
    "MI300X": (1307.4, 5300, 750),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_rates_are_dense_ones_with_fp32_sums(name: str) -> None:
    rate, bandwidth, watts = PUBLISHED[name]
    device = gpu(name)
    assert device.flops_bf16 == pytest.approx(rate * 1e12, rel=0.02)
    assert device.bandwidth == pytest.approx(bandwidth * 1e9, rel=0.01)
    assert device.power_watts == pytest.approx(watts)


def test_the_table_is_large_and_each_row_is_plausible_and_sourced() -> None:
    assert len(CARDS) >= 60
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert card.source in SOURCES, card.name
        assert 0.9 * card.nominal_gb / 1.0737 <= card.memory_gib <= card.nominal_gb, card.name
        assert 1 <= card.half_tflops / card.fp32_tflops <= 40, card.name
        assert card.bandwidth_gbs > 50 and (card.watts is None or card.watts > 20), card.name
    assert {card.kind for card in CARDS} == {"cuda", "rocm", "mps"}


@pytest.mark.parametrize(("source", "times"), [("turing", 4), ("ga102", 2), ("ada", 2), ("blackwell", 2), ("laptop", 2)])
def test_geforce_cards_keep_the_ratio_of_their_generation(source: str, times: int) -> None:
    cards = [card for card in CARDS if card.source == source and card.name.startswith("RTX")]
    assert cards
    for card in cards:
        assert card.half_tflops == pytest.approx(times * card.fp32_tflops, rel=0.01), card.name


def test_bf16_begins_with_ampere() -> None:
    assert [gpu(name).bf16 for name in ("T4", "V100", "RTX 2080 Ti", "GTX 1080 Ti", "RTX 3060", "A100", "MI100")] == [
        False
    ] * 4 + [True] * 3


def test_memory_is_what_the_driver_reports() -> None:
    # nvidia-smi: 24,564 MiB, 15,360 MiB, 23,034 MiB, 46,068 MiB, 81,559 MiB, 143,771 MiB
    seen = {"RTX 4090": 24_564, "T4": 15_360, "L4": 23_034, "L40S": 46_068, "H100": 81_559, "H200": 143_771}
    for name, mebibytes in seen.items():
        assert gpu(name).memory_bytes == pytest.approx(mebibytes * 2**20, rel=0.003), name


def test_rents_belong_to_cards_and_lie_within_their_range() -> None:
    assert set(RENTS) <= set(GPUS)
    for name, rent in RENTS.items():
        assert 0 < rent.low <= rent.typical <= rent.high, name
        assert rent.source in facts.RENT_SOURCES, name
    assert gpu("RTX 4090").price_per_hour == RENTS["RTX 4090"].typical
    assert gpu("RTX 3060 Laptop").price_per_hour is None


# --- machines and processors ------------------------------------------------------------------------


def test_a_named_machine_has_that_many_cards_and_was_not_looked_at() -> None:
    machine = machine_named("4090", 6)
    assert (machine.device_count, machine.kind, machine.observed) == (6, "cuda", False)
    assert machine.host_memory_bytes == 2 * 6 * machine.device.memory_bytes
    assert machine_named("T4").host_memory_bytes == 32 * 2**30
    assert machine_named("T4", host_memory_bytes=5).host_memory_bytes == 5
    apple = machine_named("M4 Max")
    assert apple.host_memory_bytes == apple.device.memory_bytes


@pytest.mark.parametrize(
    ("name", "count"), [("T4", 0), ("T4", -1), ("T4", 10**9), ("T4", 1.5), ("T4", True), ("T4", None), ("M4 Max", 2)]
)
def test_an_impossible_number_of_cards_is_refused(name: str, count: object) -> None:
    with pytest.raises(ConfigError):
        machine_named(name, count)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        machine_named("T4", 1, -5)


def test_a_processor_is_rated_by_its_best_instructions_and_its_cores() -> None:
    old, avx2, amx = (
        cpu_device(name="x", cores=4, features=features, memory_bytes=8)
        for features in ((), ("AVX2",), ("AVX2", "AVX-512", "AVX-512 BF16", "AMX", "AMX BF16"))
    )
    assert old.flops_fp32 < avx2.flops_fp32 < amx.flops_fp32  # type: ignore[operator]
    assert (avx2.bf16, avx2.flops_bf16) == (False, None) and amx.bf16
    assert cpu_device(name="x", cores=8, features=("AVX2",), memory_bytes=8).flops_fp32 == 2 * avx2.flops_fp32  # type: ignore[operator]
    assert cpu_device(name="x", cores=0, features=(), memory_bytes=8).flops_fp32 > 0  # type: ignore[operator]
    assert cpu_device(name="x", cores=500, features=(), memory_bytes=8).bandwidth == facts.MOST_BANDWIDTH


# --- electricity ------------------------------------------------------------------------------------

# Read off ourworldindata.org/grapher/carbon-intensity-electricity (2023); the world from Ember's review of 2024.
OUR_WORLD_IN_DATA = {"ARG": 354, "AUS": 549, "AUT": 111, "BEL": 138, "BRA": 98, "CAN": 170, "CHN": 582, "DNK": 152, "FIN": 79, "FRA": 56,
                     "DEU": 381, "IND": 713, "NOR": 30, "WORLD": 481}  # fmt: skip


def test_carbon_of_electricity_by_country_with_its_year() -> None:
    assert len(CARBON) >= 41
    for code, grams in OUR_WORLD_IN_DATA.items():
        assert carbon_intensity(code).grams_per_kwh == pytest.approx(grams, abs=1), code
    for carbon in CARBON.values():
        assert 10 <= carbon.grams_per_kwh <= 1000 and 2020 <= carbon.year <= 2025, carbon


def test_carbon_agrees_with_codecarbons_own_table() -> None:
    codecarbon = pytest.importorskip("codecarbon")
    mix = json.loads((Path(codecarbon.__file__).parent / "data" / "private_infra" / "global_energy_mix.json").read_text())
    ours = {code: carbon.grams_per_kwh for code, carbon in CARBON.items() if code != "WORLD"}
    assert ours == {code: pytest.approx(mix[code]["carbon_intensity"], rel=0.15, abs=8) for code in ours}  # editions differ


def test_a_country_goes_by_code_or_name_and_an_unknown_one_is_refused_with_near_names() -> None:
    assert carbon_intensity("fra") == carbon_intensity("France") == carbon_intensity(" FRANCE ")
    assert carbon_intensity(None).country == "WORLD"
    with pytest.raises(ConfigError) as raised:
        carbon_intensity("Frence")
    assert raised.value.context["near"][0] == "FRA"
    for hostile in ("", "XX", "x" * 10_000):
        with pytest.raises(ConfigError):
            carbon_intensity(hostile)


def test_tariffs_name_known_countries_and_their_source() -> None:
    assert len(ELECTRICITY) >= 12 and set(ELECTRICITY) <= set(CARBON)
    assert all(0.02 < tariff.usd_per_kwh < 0.6 and tariff.source for tariff in ELECTRICITY.values())
