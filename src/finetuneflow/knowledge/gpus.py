"""Accelerators as a table: memory, bandwidth, rates, power. `facts.gpu` looks a card up; `facts` holds what it costs to rent.

Every figure is per device that PyTorch sees (an MI250X counts as two, an A16 as four).

`memory_gib` is what the driver reports, not what the box says: cards with GDDR6 and error correction on by default give
up a sixteenth of it (T4, A2, A10, A16, A40, L4, L40), and HBM is sold in decimal gigabytes or with a stack's rest cut off.
PyTorch sees a few hundred MB less still; `memory.USABLE` leaves room for that.

`half_tflops` is the dense matrix rate with 16-bit inputs and fp32 sums, which is how PyTorch multiplies: bfloat16 where the
card has it, else float16. Data sheets often print twice that ("with sparsity"). GeForce cards run fp32 sums at half the
rate of fp16 sums; workstation and data-centre cards with the same chip do not. From that follow the rates per generation,
in multiples of the plain fp32 rate at boost clock: GeForce 4 (Turing) or 2 (Ampere to Blackwell), workstation 8 (Turing)
or 4. Where a data sheet prints the rate itself, the printed one stands here. Cards before tensor cores run 16-bit matrices at
the fp32 rate. `fp32_tflops`: plain fp32, no TF32 (PyTorch's default for matrix products).
"""

from __future__ import annotations

from dataclasses import dataclass

from finetuneflow.knowledge.values import DeviceKind

SOURCES = {
    "pascal": "NVIDIA, Tesla P100 white paper (2016) and GeForce GTX 1080 white paper (2016)",
    "volta": "NVIDIA, Tesla V100 GPU architecture white paper (2017) and V100 data sheet (2020)",
    "turing": "NVIDIA, Turing GPU architecture white paper (2018), appendix; T4 data sheet",
    "ga100": "NVIDIA, A100 data sheet (2021, 2022), A30 data sheet (2022)",
    "ga102": "NVIDIA, Ampere GA102 GPU architecture white paper v2.1 (2021)",
    "ampere-pro": "NVIDIA, data sheets of RTX A2000 to A6000, A2, A10, A16, A40 (2021, 2022); AWS for the A10G",
    "ada": "NVIDIA, Ada GPU architecture white paper v2.1 (2023)",
    "ada-pro": "NVIDIA, data sheets of RTX 2000 to 6000 Ada, L4, L40, L40S (2023)",
    "laptop": "NVIDIA, GeForce laptop specifications; TechPowerUp's clocks. Makers set power and clock: 20 % either way",
    "blackwell": "NVIDIA, RTX Blackwell GPU architecture white paper v1.1 (2025)",
    "blackwell-pro": "NVIDIA, data sheets of RTX PRO Blackwell (2025); DGX Spark page (2025), bf16 as an eighth of its sparse fp4",
    "hopper": "NVIDIA, H100 data sheet (2023, 2024), H200 data sheet (2024), GH200 data sheet (2024)",
    "b200": "NVIDIA, HGX B200 and B300 specifications (2025), a share of eight; GB200 NVL72 specifications, a share of 72",
    "cdna": "AMD, data sheets of Instinct MI100, MI210, MI250, MI250X (per die), MI300X, MI325X, MI350X, MI355X",
    "rdna": "AMD, product pages of Radeon RX 7900, RX 9070, PRO W7800, W7900, AI PRO R9700 (WMMA, fp16 = bf16)",
    "apple": "Apple, technical specifications (memory, bandwidth), support article 102027 (power of the whole machine); "
    "rate: GPU cores x 128 lanes x 2 x clock, 16 bits run no faster",
}


@dataclass(frozen=True, slots=True)
class Card:
    """One row. `nominal_gb`: what the box says, by which people name it. `capability`: CUDA's, or AMD's target."""

    name: str
    kind: DeviceKind
    nominal_gb: int
    memory_gib: float
    bandwidth_gbs: float
    half_tflops: float
    fp32_tflops: float
    watts: float | None
    capability: str | None
    bf16: bool
    source: str


# name, GB on the box, GiB seen, GB/s, 16-bit TFLOPS, fp32 TFLOPS, watts
Row = tuple[str, int, float, float, float, float, float]


def _nvidia(source: str, capability: str, *rows: Row) -> list[Card]:
    """bfloat16 came with compute capability 8.0; PyTorch emulates it below, slowly."""
    bf16 = int(capability.split(".")[0]) >= 8
    return [Card(row[0], "cuda", *row[1:], capability, bf16, source) for row in rows]


def _amd(source: str, target: str, *rows: Row) -> list[Card]:
    return [Card(row[0], "rocm", *row[1:], target, True, source) for row in rows]


def _apple(*rows: tuple[str, int, float, float, float | None]) -> list[Card]:
    """Rows of (name, GB of the largest machine sold, GB/s, TFLOPS, watts of the machine). Memory is shared with the processor."""
    return [Card(name, "mps", gb, gb, speed, rate, rate, watts, None, True, "apple") for name, gb, speed, rate, watts in rows]


# Other names of a card, of drivers above all.
ALIASES = {
    "H100 80GB HBM3": "H100 SXM",
    "H800": "H100 SXM",
    "H200": "H200 SXM",
    "GH200 480GB": "GH200 96GB",
    "B200 180GB": "B200",
    "GB200 186GB": "GB200",
    "DGX Spark": "GB10",
    "MI250X / MI250": "MI250X",
    "MI250X 128GB": "MI250X",
    "MI250 128GB": "MI250",
    "W7900": "PRO W7900",
    "W7800": "PRO W7800",
    "R9700": "AI PRO R9700",
}

# The first of several that fit a short name is meant: "A100" is the 80 GB SXM module, "RTX 6000" the Ada card.
# fmt: off
CARDS: tuple[Card, ...] = (
    # --- data centre ---
    *_nvidia("ga100", "8.0",
        ("A100 SXM 80GB", 80, 80, 2039, 312, 19.5, 400),
        ("A100 PCIe 80GB", 80, 80, 1935, 312, 19.5, 300),
        ("A100 SXM 40GB", 40, 40, 1555, 312, 19.5, 400),
        ("A100 PCIe 40GB", 40, 40, 1555, 312, 19.5, 250),
        ("A30", 24, 24, 933, 165, 10.3, 165)),
    *_nvidia("hopper", "9.0",
        ("H100 SXM", 80, 79.6, 3350, 989.4, 66.9, 700),
        ("H100 PCIe", 80, 79.6, 2000, 756.5, 51.2, 350),
        ("H100 NVL", 94, 93.6, 3938, 835.5, 60, 400),
        ("H200 SXM", 141, 140.4, 4800, 989.4, 66.9, 700),
        ("H200 NVL", 141, 140.4, 4800, 835.5, 60, 600),
        ("H20", 96, 95.6, 4000, 148, 44, 400),
        ("GH200 96GB", 96, 95.6, 4000, 989.4, 66.9, 900)),
    *_nvidia("b200", "10.0",
        ("B200", 192, 179, 8000, 2250, 75, 1000),
        ("GB200", 192, 184, 8000, 2500, 80, 1200)),
    *_nvidia("b200", "10.3",
        ("B300", 288, 268.6, 8000, 2250, 75, 1100)),
    *_nvidia("ada-pro", "8.9",
        ("L4", 24, 22.5, 300, 121, 30.3, 72),
        ("L40", 48, 45, 864, 181, 90.5, 300),
        ("L40S", 48, 45, 864, 362, 91.6, 350)),
    *_nvidia("ampere-pro", "8.6",
        ("A40", 48, 45, 696, 149.7, 37.4, 300),
        ("A10", 24, 22.5, 600, 125, 31.2, 150),
        ("A10G", 24, 22.5, 600, 70, 35, 300),
        ("A16", 16, 15, 200, 17.9, 4.5, 62.5),
        ("A2", 16, 15, 200, 18, 4.5, 60)),
    *_nvidia("volta", "7.0",
        ("V100 16GB", 16, 16, 900, 125, 15.7, 300),
        ("V100 32GB", 32, 32, 900, 125, 15.7, 300)),
    *_nvidia("turing", "7.5",
        ("T4", 16, 15, 320, 65, 8.1, 70)),
    *_nvidia("pascal", "6.0",
        ("P100", 16, 16, 732, 10.6, 10.6, 300)),
    # --- workstation ---
    *_nvidia("ada-pro", "8.9",
        ("RTX 6000 Ada", 48, 48, 960, 364.2, 91.1, 300),
        ("RTX 5000 Ada", 32, 32, 576, 261.1, 65.3, 250),
        ("RTX 4500 Ada", 24, 24, 432, 158.5, 39.6, 210),
        ("RTX 4000 Ada", 20, 20, 360, 106.8, 26.7, 130),
        ("RTX 4000 SFF Ada", 20, 20, 280, 76.7, 19.2, 70),
        ("RTX 2000 Ada", 16, 16, 224, 48, 12, 70)),
    *_nvidia("blackwell-pro", "12.0",
        ("RTX PRO 6000 Blackwell", 96, 95.6, 1792, 503.8, 126, 600),
        ("RTX PRO 6000 Blackwell Server", 96, 95.6, 1597, 480, 120, 600),
        ("RTX PRO 6000 Blackwell Max-Q", 96, 95.6, 1792, 440, 110, 300)),
    *_nvidia("blackwell-pro", "12.1",
        ("GB10", 128, 119.7, 273, 125, 31, 140)),
    *_nvidia("ampere-pro", "8.6",
        ("RTX A6000", 48, 48, 768, 154.8, 38.7, 300),
        ("RTX A5500", 24, 24, 768, 136.4, 34.1, 230),
        ("RTX A5000", 24, 24, 768, 111.1, 27.8, 230),
        ("RTX A4500", 20, 20, 640, 94.6, 23.7, 200),
        ("RTX A4000", 16, 16, 448, 76.7, 19.2, 140),
        ("RTX A2000", 12, 12, 288, 31.9, 8.0, 70)),
    *_nvidia("turing", "7.5",
        ("Quadro RTX 8000", 48, 48, 672, 130.5, 16.3, 260),
        ("Quadro RTX 6000", 24, 24, 672, 130.5, 16.3, 260),
        ("TITAN RTX", 24, 24, 672, 130.5, 16.3, 280)),
    # --- GeForce ---
    *_nvidia("blackwell", "12.0",
        ("RTX 5090", 32, 31.8, 1792, 209.5, 104.8, 575),
        ("RTX 5080", 16, 16, 960, 112.6, 56.3, 360),
        ("RTX 5070 Ti", 16, 16, 896, 87.9, 43.9, 300),
        ("RTX 5070", 12, 12, 672, 61.7, 30.9, 250),
        ("RTX 5060 Ti 16GB", 16, 16, 448, 47.4, 23.7, 180),
        ("RTX 5060", 8, 8, 448, 38.4, 19.2, 145)),
    *_nvidia("ada", "8.9",
        ("RTX 4090", 24, 24, 1008, 165.2, 82.6, 450),
        ("RTX 4080 Super", 16, 16, 736, 104.4, 52.2, 320),
        ("RTX 4080", 16, 16, 717, 97.5, 48.7, 320),
        ("RTX 4070 Ti Super", 16, 16, 672, 88.2, 44.1, 285),
        ("RTX 4070 Ti", 12, 12, 504, 80.2, 40.1, 285),
        ("RTX 4070 Super", 12, 12, 504, 71, 35.5, 220),
        ("RTX 4070", 12, 12, 504, 58.3, 29.1, 200),
        ("RTX 4060 Ti 16GB", 16, 16, 288, 44.1, 22.1, 165),
        ("RTX 4060 Ti 8GB", 8, 8, 288, 44.1, 22.1, 160),
        ("RTX 4060", 8, 8, 272, 30.2, 15.1, 115)),
    *_nvidia("ga102", "8.6",
        ("RTX 3090", 24, 24, 936, 71, 35.6, 350),
        ("RTX 3090 Ti", 24, 24, 1008, 80, 40, 450),
        ("RTX 3080 10GB", 10, 10, 760, 59.5, 29.8, 320),
        ("RTX 3080 12GB", 12, 12, 912, 61.3, 30.6, 350),
        ("RTX 3080 Ti", 12, 12, 912, 68.2, 34.1, 350),
        ("RTX 3070 Ti", 8, 8, 608, 43.5, 21.7, 290),
        ("RTX 3070", 8, 8, 448, 40.6, 20.3, 220),
        ("RTX 3060 Ti", 8, 8, 448, 32.4, 16.2, 200),
        ("RTX 3060", 12, 12, 360, 25.5, 12.7, 170)),
    *_nvidia("turing", "7.5",
        ("RTX 2080 Ti", 11, 11, 616, 53.8, 13.4, 250),
        ("RTX 2080 Super", 8, 8, 496, 44.6, 11.2, 250),
        ("RTX 2080", 8, 8, 448, 40.3, 10.1, 215),
        ("RTX 2070 Super", 8, 8, 448, 36.2, 9.1, 215),
        ("RTX 2070", 8, 8, 448, 29.9, 7.5, 175),
        ("RTX 2060", 6, 6, 336, 25.8, 6.5, 160)),
    *_nvidia("pascal", "6.1",
        ("GTX 1080 Ti", 11, 11, 484, 11.3, 11.3, 250)),
    # --- laptops ---
    *_nvidia("laptop", "12.0",
        ("RTX 5090 Laptop", 24, 23.9, 896, 63.6, 31.8, 150)),
    *_nvidia("laptop", "8.9",
        ("RTX 4090 Laptop", 16, 16, 576, 66, 33, 150),
        ("RTX 4080 Laptop", 12, 12, 432, 49.4, 24.7, 150),
        ("RTX 4070 Laptop", 8, 8, 256, 31.2, 15.6, 115),
        ("RTX 4060 Laptop", 8, 8, 256, 23.2, 11.6, 115)),
    *_nvidia("laptop", "8.6",
        ("RTX 3080 Laptop", 16, 16, 448, 38, 19, 150),
        ("RTX 3070 Laptop", 8, 8, 448, 31.9, 16, 125),
        ("RTX 3060 Laptop", 6, 6, 336, 21.9, 10.9, 115)),
    # --- AMD ---
    *_amd("cdna", "gfx942",
        ("MI300X", 192, 192, 5300, 1307.4, 163.4, 750),
        ("MI325X", 256, 256, 6000, 1307.4, 163.4, 1000)),
    *_amd("cdna", "gfx950",
        ("MI350X", 288, 288, 8000, 2300, 144.2, 1000),
        ("MI355X", 288, 288, 8000, 2500, 157.3, 1400)),
    *_amd("cdna", "gfx90a",
        ("MI250X", 64, 64, 1638, 191.5, 23.9, 280),
        ("MI250", 64, 64, 1638, 181, 22.6, 280),
        ("MI210", 64, 64, 1638, 181, 22.6, 300)),
    *_amd("cdna", "gfx908",
        ("MI100", 32, 32, 1229, 92.3, 23.1, 300)),
    *_amd("rdna", "gfx1100",
        ("RX 7900 XTX", 24, 24, 960, 122.8, 61.4, 355),
        ("RX 7900 XT", 20, 20, 800, 103, 51.5, 315),
        ("PRO W7900", 48, 48, 864, 122.6, 61.3, 295),
        ("PRO W7800", 32, 32, 576, 90.5, 45.2, 260)),
    *_amd("rdna", "gfx1201",
        ("RX 9070 XT", 16, 16, 640, 194.6, 48.7, 304),
        ("AI PRO R9700", 32, 32, 640, 191, 47.8, 300)),
    # --- Apple ---
    *_apple(
        ("M1", 16, 68, 2.6, 39),
        ("M1 Max", 64, 400, 10.4, 115),
        ("M1 Ultra", 128, 800, 20.8, 215),
        ("M2 Max", 96, 400, 13.6, 145),
        ("M2 Ultra", 192, 800, 27.2, 295),
        ("M3 Max", 128, 400, 14.2, None),
        ("M3 Ultra", 512, 819, 28.4, 270),
        ("M4", 32, 120, 4.6, 65),
        ("M4 Pro", 64, 273, 9.2, 140),
        ("M4 Max", 128, 546, 18.4, 145)),
)
# fmt: on
