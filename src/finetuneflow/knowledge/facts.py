"""Facts that the other modules of this room compute with, each with its source: cards, rents, processors, electricity.

The cards themselves are in `gpus.py`. Prices and the carbon of electricity change; the date stands beside each.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from finetuneflow.errors import ConfigError
from finetuneflow.knowledge.gpus import ALIASES, CARDS, Card
from finetuneflow.knowledge.values import Device, Machine

GIB = 2**30
MOST_GPUS = 100_000


# --- cards ------------------------------------------------------------------------------------------

GPUS: dict[str, Card] = {card.name: card for card in CARDS}

# What names of drivers and shops hold beside the model.
_NOISE = set(
    [
        "nvidia",
        "geforce",
        "amd",
        "ati",
        "radeon",
        "instinct",
        "apple",
        "tesla",
        "graphics",
        "gpu",
        "gpus",
        "card",
        "generation",
        "edition",
        "workstation",
        "tm",
    ]
)
# Form factors. A card of which only one form is in the table answers to the others too.
_FORMS = {"sxm", "pcie", "hbm2", "hbm2e", "hbm3", "hbm3e", "hgx", "dgx"}


def gpu(name: str) -> Device:
    """The card of that name: "RTX 4090", "4090", "NVIDIA A100-SXM4-80GB", "Tesla T4", "h100 pcie".

    A short name that fits several means the one that needs the fewest words added, then the first of the table: "A100" is
    the 80 GB SXM module, "H100" the SXM module, "RTX 6000" the Ada card, "V100" the one with 16 GB.
    Raises `ConfigError` (CONFIG_INVALID_VALUE) with near names for a card that is not in the table.
    """
    return device_of(find_card(name))


def find_card(name: str) -> Card:
    """The table's row for a name; see `gpu`."""
    words = _words(name) if isinstance(name, str) and len(name) <= 100 else frozenset()
    best: tuple[int, int] | None = None
    found = None
    for card, card_words in _vocabulary():
        memory = {word for word in card_words if _MEMORY.fullmatch(word)}
        if words - card_words - _FORMS or not any(re.search(r"\d|titan|spark", word) for word in (words & card_words) - memory):
            continue
        rank = (len(words - card_words), len(card_words - words - memory))
        if best is None or rank < best:
            best, found = rank, card
    if found is None:
        raise _unknown(name)
    return found


def device_of(card: Card) -> Device:
    rent = RENTS.get(card.name)
    return Device(
        name=card.name,
        kind=card.kind,
        memory_bytes=round(card.memory_gib * GIB),
        bandwidth=card.bandwidth_gbs * 1e9,
        flops_bf16=card.half_tflops * 1e12,
        flops_fp32=card.fp32_tflops * 1e12,
        power_watts=card.watts,
        price_per_hour=rent.typical if rent else None,
        bf16=card.bf16,
    )


_MEMORY = re.compile(r"\d+gb")


@cache
def _vocabulary() -> tuple[tuple[Card, frozenset[str]], ...]:
    """Each card with the words of each of its names; its memory is a word nobody has to say."""
    names = [(card.name, card) for card in CARDS] + [(alias, GPUS[name]) for alias, name in ALIASES.items()]
    return tuple((card, _words(name) | {f"{card.nominal_gb}gb"}) for name, card in names)


def _words(name: str) -> frozenset[str]:
    """ "NVIDIA A100-SXM4-80GB" -> {a100, sxm, 80gb}; "rtx4090" -> {rtx, 4090}."""
    text = re.sub(r"\((?:r|tm|c)\)", " ", name.lower()).replace("max-q", "maxq")
    text = re.sub(r"(\d+)\s*gi?b\b", r" \1gb ", text)
    text = re.sub(r"\b(rtx|gtx|rx)(?=[a-z]?\d)", r"\1 ", text)
    text = re.sub(r"\b(\d{4})(ti|super|xtx|xt)\b", r"\1 \2", text)
    text = re.sub(r"\bsxm\d\b", "sxm", text)
    return frozenset(re.findall(r"[a-z0-9]+", text)) - _NOISE


def _unknown(name: object) -> ConfigError:
    text = str(name)[:60]
    names = {known.lower(): known for known in (*GPUS, *ALIASES)}
    asked = " ".join(word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in _NOISE)
    near = [names[match] for match in difflib.get_close_matches(asked, names, n=4, cutoff=0.5)]
    why = ""
    if re.search(r"\b(intel|arc|xe|gaudi|tpu|max 1\d{3})\b", text.lower()):
        why = " Only CUDA, ROCm and Apple devices are listed; the engine drives no other."
    return ConfigError(
        "CONFIG_INVALID_VALUE",
        f"{text!r} is not in the table of GPUs.{why}",
        remedy=f"Near names: {', '.join(near)}." if near else "Write it like RTX 4090, A100 80GB or MI300X.",
        context={"near": near},
    )


def machine_named(gpu_name: str, count: int = 1, host_memory_bytes: int | None = None) -> Machine:
    """A machine nobody has looked at: `count` cards of one kind.

    Main memory is assumed to be twice the cards' together, 32 GiB at least (rented machines have one to three times), eight
    cores per card; Apple's memory is one for both. Raises `ConfigError` (CONFIG_INVALID_VALUE) for a card or number there is not.
    """
    device = gpu(gpu_name)
    most = 1 if device.kind == "mps" else MOST_GPUS
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= most:
        raise ConfigError(
            "CONFIG_INVALID_VALUE", f"{count!r:.40} is no number of GPUs.", remedy=f"Give a number from 1 to {most:,}."
        )
    if host_memory_bytes is not None and host_memory_bytes <= 0:
        raise ConfigError("CONFIG_INVALID_VALUE", "A machine has some main memory.", remedy="Leave it out to have it assumed.")
    assumed = device.memory_bytes if device.kind == "mps" else max(2 * count * device.memory_bytes, 32 * GIB)
    return Machine(
        devices=(device,) * count,
        host_memory_bytes=host_memory_bytes or assumed,
        cores=8.0 * count,
        bitsandbytes=device.kind in ("cuda", "rocm"),
        observed=False,
    )


# --- rents ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rent:
    """US dollars per card and hour: the lowest and highest seen, and what is reckoned with. `source` is a key of RENT_SOURCES."""

    low: float
    typical: float
    high: float
    source: str


RENT_SOURCES = {
    "market": "list prices of RunPod's pods, community to on-demand, March 2026 (collected by deploybase.ai and usagepricing.com)",
    "survey": "price surveys of some 20 to 60 providers, May 2026 (mercatus-ai.com, aimultiple.com): cheapest to large clouds",
    "serverless": "RunPod's serverless price list, active to flex workers, 2026 (docs.runpod.io/serverless/pricing)",
    "2025": "on-demand list prices of 2025 (AWS, Google, Lambda, RunPod), not looked up again since",
}
RENTS: dict[str, Rent] = {
    "RTX 3090": Rent(0.22, 0.30, 0.46, "market"),
    "RTX 4090": Rent(0.34, 0.45, 0.69, "market"),
    "RTX 5090": Rent(0.69, 0.90, 1.22, "market"),
    "L4": Rent(0.44, 0.60, 0.78, "market"),
    "L40": Rent(0.69, 0.95, 1.22, "market"),
    "L40S": Rent(0.79, 1.00, 1.40, "market"),
    "RTX PRO 6000 Blackwell": Rent(0.89, 1.20, 1.57, "market"),
    "RTX PRO 6000 Blackwell Server": Rent(0.89, 1.20, 1.57, "market"),
    "A100 PCIe 80GB": Rent(0.80, 1.30, 2.10, "survey"),
    "A100 SXM 80GB": Rent(0.80, 1.50, 3.00, "survey"),
    "H100 PCIe": Rent(1.80, 2.40, 3.51, "market"),
    "H100 SXM": Rent(1.99, 2.95, 5.00, "survey"),
    "H200 SXM": Rent(2.50, 3.80, 7.00, "survey"),
    "B200": Rent(4.99, 6.00, 11.95, "market"),
    "RTX A4000": Rent(0.40, 0.40, 0.58, "serverless"),
    "RTX A4500": Rent(0.40, 0.40, 0.58, "serverless"),
    "RTX 4000 Ada": Rent(0.40, 0.40, 0.58, "serverless"),
    "RTX A5000": Rent(0.47, 0.47, 0.68, "serverless"),
    "RTX A6000": Rent(0.86, 0.86, 1.22, "serverless"),
    "A40": Rent(0.86, 0.86, 1.22, "serverless"),
    "RTX 6000 Ada": Rent(1.33, 1.33, 1.91, "serverless"),
    "T4": Rent(0.35, 0.53, 0.53, "2025"),
    "A10G": Rent(1.01, 1.01, 1.01, "2025"),
    "A10": Rent(0.75, 0.75, 0.75, "2025"),
    "V100 16GB": Rent(0.55, 0.55, 3.06, "2025"),
    "P100": Rent(1.46, 1.46, 1.46, "2025"),
    "A100 SXM 40GB": Rent(1.29, 1.29, 4.10, "2025"),
    "A100 PCIe 40GB": Rent(1.29, 1.29, 1.29, "2025"),
    "GH200 96GB": Rent(1.49, 1.49, 1.99, "2025"),
    "MI300X": Rent(1.99, 2.49, 2.49, "2025"),
}


# --- processors -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CoreRates:
    """What one core does in PyTorch's matrix products of a model's size: FLOP/s with fp32 and with bf16 (None: slower than fp32)."""

    fp32: float
    bf16: float | None


# Peak is lanes x 2 (multiply and add) x units x clock under load: AVX2 2 x 8 lanes at 3 GHz = 96 GFLOP/s, AVX-512 2 x 16 at
# 2.8 GHz = 179, AVX-512 BF16 twice that, AMX 2,048 per cycle at 2.5 GHz = 5,100, NEON 4 x 4 lanes at 3 GHz = 96 (Intel and Arm
# optimisation manuals). Products of 512 to 2,048 reach 60 to 100 % of it, of AMX a quarter: measured on one core of a
# Sapphire-Rapids-class Xeon with PyTorch 2.13: 180 GFLOP/s in fp32, 1,200 in bf16.
CORE_RATES: tuple[tuple[str, CoreRates], ...] = (
    ("AMX BF16", CoreRates(170e9, 1_150e9)),
    ("AVX-512 BF16", CoreRates(130e9, 230e9)),
    ("AVX-512", CoreRates(110e9, None)),
    ("AVX2", CoreRates(65e9, None)),
    ("Arm BF16", CoreRates(60e9, 150e9)),
    ("SVE", CoreRates(60e9, None)),
    ("NEON", CoreRates(50e9, None)),
)
OLD_CORE = CoreRates(15e9, None)  # SSE alone
# Main memory, bytes per second: one core draws 10 to 15 GB/s; two channels of DDR4-3200 or DDR5-5600 have 51 to 90 GB/s (laptops,
# desktops), a server socket 200 to 460 (eight of DDR4-3200, twelve of DDR5-4800): JEDEC rates x 8 bytes per channel.
CORE_BANDWIDTH = 12e9
MOST_BANDWIDTH = 300e9
DESKTOP_BANDWIDTH, DESKTOP_CORES = 70e9, 16
# Watts per core under load: servers are sold at 4 to 6 (EPYC 9654: 360 W for 96 cores; Xeon 8480: 350 W for 56).
CORE_WATTS = 5.0


def cpu_device(*, name: str, cores: float, features: Iterable[str], memory_bytes: int) -> Device:
    """A processor as a device, by typical figures of its instruction set: no measurement, 50 % either way.

    `cores`: as granted, a fraction in a container. `features`: names as `hardware.CPU_FEATURES` gives them.
    """
    known = set(features)
    rates = next((rates for feature, rates in CORE_RATES if feature in known), OLD_CORE)
    cores = max(cores, 0.1)
    limit = DESKTOP_BANDWIDTH if cores <= DESKTOP_CORES else MOST_BANDWIDTH
    return Device(
        name=name,
        kind="cpu",
        memory_bytes=memory_bytes,
        bandwidth=min(cores * CORE_BANDWIDTH, limit),
        flops_bf16=rates.bf16 * cores if rates.bf16 else None,
        flops_fp32=rates.fp32 * cores,
        power_watts=CORE_WATTS * cores,
        bf16=rates.bf16 is not None,
    )


# --- electricity ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Carbon:
    """What a kilowatt-hour of a country's electricity emits over its life cycle, in grams of CO2 equivalents."""

    country: str
    name: str
    grams_per_kwh: float
    year: int


CARBON_SOURCE = "Ember and Energy Institute, processed by Our World in Data: carbon intensity of electricity generation (2024)"
WORLD = "WORLD"
# Generation within the country, life-cycle emissions; trade across borders is not in it. World: Ember, Global Electricity Review 2024.
# fmt: off
_CARBON: dict[str, tuple[str, int, int]] = {
    WORLD: ("World", 481, 2023),
    "ARE": ("United Arab Emirates", 561, 2022), "ARG": ("Argentina", 354, 2023), "AUS": ("Australia", 549, 2023),
    "AUT": ("Austria", 111, 2023), "BEL": ("Belgium", 138, 2023), "BGD": ("Bangladesh", 691, 2023),
    "BGR": ("Bulgaria", 335, 2023), "BRA": ("Brazil", 98, 2023), "CAN": ("Canada", 170, 2023),
    "CHE": ("Switzerland", 35, 2023), "CHL": ("Chile", 291, 2023), "CHN": ("China", 582, 2023),
    "CIV": ("Cote d'Ivoire", 394, 2022), "CMR": ("Cameroon", 305, 2022), "COD": ("Democratic Republic of Congo", 24, 2022),
    "COL": ("Colombia", 260, 2023), "CZE": ("Czechia", 450, 2023), "DEU": ("Germany", 381, 2023),
    "DNK": ("Denmark", 152, 2023), "DZA": ("Algeria", 635, 2022), "EGY": ("Egypt", 570, 2023),
    "ESP": ("Spain", 174, 2023), "EST": ("Estonia", 417, 2023), "FIN": ("Finland", 79, 2023),
    "FRA": ("France", 56, 2023), "GBR": ("United Kingdom", 238, 2023), "GHA": ("Ghana", 484, 2022),
    "GRC": ("Greece", 337, 2023), "HKG": ("Hong Kong", 699, 2022), "HRV": ("Croatia", 205, 2023),
    "HUN": ("Hungary", 204, 2023), "IDN": ("Indonesia", 676, 2022), "IND": ("India", 713, 2023),
    "IRL": ("Ireland", 291, 2023), "ISL": ("Iceland", 28, 2022), "ISR": ("Israel", 583, 2022),
    "ITA": ("Italy", 331, 2023), "JPN": ("Japan", 485, 2023), "KEN": ("Kenya", 70, 2023),
    "KOR": ("South Korea", 431, 2023), "LTU": ("Lithuania", 160, 2023), "LUX": ("Luxembourg", 105, 2023),
    "LVA": ("Latvia", 123, 2023), "MAR": ("Morocco", 630, 2023), "MDG": ("Madagascar", 436, 2022),
    "MEX": ("Mexico", 507, 2023), "MYS": ("Malaysia", 606, 2022), "NGA": ("Nigeria", 523, 2023),
    "NLD": ("Netherlands", 268, 2023), "NOR": ("Norway", 30, 2023), "NZL": ("New Zealand", 113, 2023),
    "PAK": ("Pakistan", 441, 2023), "PHL": ("Philippines", 611, 2023), "POL": ("Poland", 662, 2023),
    "PRT": ("Portugal", 166, 2023), "QAT": ("Qatar", 602, 2023), "ROU": ("Romania", 241, 2023),
    "RUS": ("Russia", 441, 2023), "SAU": ("Saudi Arabia", 707, 2022), "SEN": ("Senegal", 512, 2022),
    "SGP": ("Singapore", 471, 2023), "SVK": ("Slovakia", 117, 2023), "SVN": ("Slovenia", 231, 2023),
    "SWE": ("Sweden", 41, 2023), "THA": ("Thailand", 550, 2023), "TUN": ("Tunisia", 564, 2023),
    "TUR": ("Turkey", 465, 2023), "TWN": ("Taiwan", 642, 2023), "UKR": ("Ukraine", 260, 2022),
    "USA": ("United States", 369, 2023), "VNM": ("Vietnam", 475, 2023), "ZAF": ("South Africa", 708, 2023),
}
# fmt: on
CARBON: dict[str, Carbon] = {code: Carbon(code, *row) for code, row in _CARBON.items()}


def carbon_intensity(country: str | None) -> Carbon:
    """By ISO 3166 code of three letters, or English name; None: the world's average.

    Raises `ConfigError` (CONFIG_INVALID_VALUE) with near names for a country that is not in the table.
    """
    if country is None:
        return CARBON[WORLD]
    text = str(country).strip()
    found = CARBON.get(text.upper()) or next((c for c in CARBON.values() if c.name.lower() == text.lower()), None)
    if found is not None:
        return found
    names = {key.lower(): c.country for c in CARBON.values() for key in (c.country, c.name)}
    near = list(dict.fromkeys(names[key] for key in difflib.get_close_matches(text.lower()[:60], names, n=4, cutoff=0.5)))
    raise ConfigError(
        "CONFIG_INVALID_VALUE",
        f"{text[:60]!r} is not in the table of {len(CARBON) - 1} countries.",
        remedy=(f"Near: {', '.join(near)}. " if near else "")
        + "Write its ISO code of three letters, such as FRA or USA, or leave it out for the world's average.",
        context={"near": near},
    )


@dataclass(frozen=True, slots=True)
class Tariff:
    """US dollars per kWh for households, taxes included. Firms pay about two thirds of it in the EU (0.19 against 0.29 euro)."""

    usd_per_kwh: float
    source: str


_EUROSTAT = "Eurostat, nrg_pc_204, first half of 2025, at 1.09 USD per euro"
ELECTRICITY: dict[str, Tariff] = {
    WORLD: Tariff(0.165, "globalpetrolprices.com, world average for households, second quarter of 2025"),
    "DEU": Tariff(0.418, _EUROSTAT),
    "BEL": Tariff(0.389, _EUROSTAT),
    "DNK": Tariff(0.380, _EUROSTAT),
    "HUN": Tariff(0.113, _EUROSTAT),
    "BGR": Tariff(0.142, _EUROSTAT),
    "IRL": Tariff(0.45, "Statista, household prices, March 2025"),
    "ITA": Tariff(0.43, "Statista, household prices, March 2025"),
    "FRA": Tariff(0.220, "regulated tariff of EDF, 0.2016 euro from February 2025, at 1.09 USD per euro"),
    "GBR": Tariff(0.349, "Ofgem price cap, 27.03 pence, April to June 2025, at 1.29 USD per pound"),
    "USA": Tariff(0.165, "EIA, average residential price of 2024"),
    "JPN": Tariff(0.21, "reference price of the Home Appliances Fair Trade Council, 31 yen since 2022, at 148 yen per USD"),
}

# Power of the building over power of the machines. Average of the surveyed data centres, almost unchanged since 2018 (Uptime
# Institute, Global Data Center Survey 2025); large clouds state 1.1 to 1.2. A machine at home has no such overhead.
PUE_DATA_CENTRE = 1.54
PUE_OWN = 1.0
