"""What cards can do, from NVIDIA's data sheets: memory, its bandwidth, and products a second without sparsity."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU. memory: as it is labelled. bandwidth: GB/s. capability: CUDA's.

    fp32 to fp16: TFLOP/s of dense matrix products that are summed in FP32; None where it has no units for them.
    """

    name: str
    memory: float
    bandwidth: float
    capability: tuple[int, int]
    fp32: float
    tf32: float | None
    bf16: float | None
    fp16: float | None
    source: str


_HOPPER = "H100/H200 Tensor Core GPU data sheets"
_AMPERE = "A100 Tensor Core GPU data sheet"
_GA102 = "NVIDIA Ampere GA102 GPU architecture whitepaper"
_ADA = "NVIDIA Ada GPU architecture whitepaper"
_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper"
_TURING = "NVIDIA Turing GPU architecture whitepaper"

CARDS = {
    "h200": Card("H200 SXM", 141, 4800, (9, 0), 67, 494.7, 989.4, 989.4, _HOPPER),
    "h100": Card("H100 SXM", 80, 3350, (9, 0), 67, 494.7, 989.4, 989.4, _HOPPER),
    "h100-pcie": Card("H100 PCIe", 80, 2000, (9, 0), 51, 378, 756, 756, _HOPPER),
    "a100": Card("A100 SXM 80 GB", 80, 2039, (8, 0), 19.5, 156, 312, 312, _AMPERE),
    "a100-40gb": Card("A100 SXM 40 GB", 40, 1555, (8, 0), 19.5, 156, 312, 312, _AMPERE),
    "l40s": Card("L40S", 48, 864, (8, 9), 91.6, 183, 362, 362, "L40S data sheet"),
    "a6000": Card("RTX A6000", 48, 768, (8, 6), 38.7, 77.4, 154.8, 154.8, _GA102),
    "a10": Card("A10", 24, 600, (8, 6), 31.2, 62.5, 125, 125, "A10 Tensor Core GPU data sheet"),
    "l4": Card("L4", 24, 300, (8, 9), 30.3, 60, 121, 121, "L4 Tensor Core GPU data sheet"),
    "5090": Card("GeForce RTX 5090", 32, 1792, (12, 0), 104.8, 104.8, 209.5, 209.5, _BLACKWELL),
    "4090": Card("GeForce RTX 4090", 24, 1008, (8, 9), 82.6, 82.6, 165.2, 165.2, _ADA),
    "4080": Card("GeForce RTX 4080", 16, 717, (8, 9), 48.7, 48.7, 97.5, 97.5, _ADA),
    "3090": Card("GeForce RTX 3090", 24, 936, (8, 6), 35.6, 35.6, 71, 71, _GA102),
    "3080": Card("GeForce RTX 3080", 10, 760, (8, 6), 29.8, 29.8, 59.5, 59.5, _GA102),
    "v100": Card("V100 SXM2 32 GB", 32, 900, (7, 0), 15.7, None, None, 125, "V100 GPU data sheet"),
    "t4": Card("T4", 16, 320, (7, 5), 8.1, None, None, 65, "T4 Tensor Core GPU data sheet"),
    "2080ti": Card("GeForce RTX 2080 Ti", 11, 616, (7, 5), 13.4, None, None, 53.8, _TURING),
}
