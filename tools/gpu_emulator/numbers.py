"""Number formats that numpy lacks: bfloat16, tf32, the 8-bit floats, and pairs of 16-bit numbers in
one register.
"""

import numpy as np
import torch

_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
TF32_MASK = np.uint32(0xFFFFE000)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """uint16 to float32, exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to uint16, to nearest, ties to even.  Every NaN becomes 0x7FFF, as `cvt` has it."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def f32_to_tf32(x: np.ndarray) -> np.ndarray:
    """float32 to its bits rounded to tf32: to nearest, ties away from zero (`cvt.rna`)."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, bits + np.uint32(0x1000), bits) & TF32_MASK


def widen16(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 bits of "bf16" or "f16" to float32."""
    return bf16_to_f32(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def narrow16(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 to uint16 bits of "bf16" or "f16", to nearest even.  Every NaN becomes 0x7FFF."""
    if kind == "bf16":
        return f32_to_bf16(x)
    x = np.asarray(x, np.float32)
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def unpack16(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint32 to its low and high halves, uint16."""
    return pairs.astype(np.uint16), (pairs >> np.uint32(16)).astype(np.uint16)


def pack16(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two uint16 to a uint32."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def f8_to_f32(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint8 bits of "e4m3" or "e5m2" to float32."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(_FLOAT8[kind]).float().numpy()


def f32_to_f8(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 to uint8 bits, to nearest even, saturating at the largest finite number
    (`satfinite`).
    """
    largest = torch.finfo(_FLOAT8[kind]).max
    x = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    x = torch.where(x.isnan(), x, x.clamp(-largest, largest))
    return x.to(_FLOAT8[kind]).view(torch.uint8).numpy()
