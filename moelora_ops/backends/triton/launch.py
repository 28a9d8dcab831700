"""Between tensors and kernels: rows and strides, the architecture, launch options."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .tiles import Arch, cdiv


class Rows(NamedTuple):
    """A tensor [..., columns] as a matrix with contiguous rows.

    Attributes:
        data: the tensor.
        count, columns: its shape as a matrix.
        stride: elements from a row to the next.
    """

    data: Tensor
    count: int
    columns: int
    stride: int

    @property
    def wide(self) -> bool:
        """Whether 8 divides what the kernels add to its address."""
        return self.columns % 8 == 0 and self.stride % 8 == 0

    def segment(self, splits: int) -> "Rows":
        """The first of `splits` equal segments of the columns."""
        return self._replace(columns=self.columns // splits)


def rows_of(t: Tensor, name: str) -> Rows:
    """`t` as rows.

    Raises:
        RuntimeError: it is neither contiguous nor a matrix with contiguous rows.
    """
    columns = t.shape[-1]
    count = t.numel() // columns if columns else t.shape[:-1].numel()
    if t.is_contiguous():
        return Rows(t, count, columns, columns)
    if t.dim() != 2 or (columns > 1 and t.stride(1) != 1):
        raise RuntimeError(f"{name}: wanted a contiguous tensor or a matrix with contiguous rows")
    return Rows(t, count, columns, t.stride(0))


def check_dtype(x: Tensor) -> None:
    """That the kernels compute in x's dtype.

    Raises:
        RuntimeError: they do not.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(f"x: the triton kernels do not compute in {x.dtype}")


def rows_like(t: Tensor, x: Tensor, shape: tuple[int, ...], name: str) -> Rows:
    """`t` as rows, of this shape and in x's dtype.

    Raises:
        RuntimeError: it is not so; the message names `t`.
    """
    if t.dtype != x.dtype:
        raise RuntimeError(f"{name}: wanted {x.dtype} like x, got {t.dtype}")
    if t.shape != shape:
        raise RuntimeError(f"{name}: wanted shape {list(shape)}, got {list(t.shape)}")
    return rows_of(t, name)


def check_like(t: Tensor, x: Tensor, shape: tuple[int, ...], name: str) -> None:
    """That `t` is contiguous, of this shape and in x's dtype.

    Raises:
        RuntimeError: it is not so; the message names `t`.
    """
    rows_like(t, x, shape, name)
    if not t.is_contiguous():
        raise RuntimeError(f"{name}: wanted a contiguous tensor")


def check_wide(t: Tensor, shape: tuple[int, ...], name: str) -> None:
    """That `t` is contiguous, of this shape and float32.

    Raises:
        RuntimeError: it is not so; the message names `t`.
    """
    if t.dtype != torch.float32 or t.shape != shape or not t.is_contiguous():
        raise RuntimeError(
            f"{name}: wanted a contiguous float32 tensor {list(shape)}, got {list(t.shape)} in"
            f" {t.dtype}"
        )


def experts(x: Tensor, lora_down: Tensor, lora_up: Tensor, name: str = "x") -> Rows:
    """x ``[..., K]`` as rows, if lora_down ``[E, r, K]`` and lora_up ``[E, r, N]`` are its experts.

    Raises:
        RuntimeError: they are not; the message names what does not fit.
    """
    check_dtype(x)
    rows = rows_of(x, name)
    if lora_down.dim() != 3 or lora_up.dim() != 3:
        raise RuntimeError("lora_down, lora_up: wanted 3 dimensions")
    E, r, K = lora_down.shape
    if rows.columns != K:
        raise RuntimeError(f"{name}: wanted last dimension {K}, got {rows.columns}")
    check_like(lora_down, x, (E, r, K), "lora_down")
    check_like(lora_up, x, (E, r, lora_up.shape[2]), "lora_up")
    return rows


def gradient(t: Tensor | None, like: Tensor) -> Tensor:
    """`t` in the shape of the parameter `like`; without elements if it is None, not wanted."""
    return like.new_empty((0,)) if t is None else t.view(like.shape)


def pitch(columns: int) -> int:
    """Elements from a row to the next in a workspace: whole 16-byte loads."""
    return 8 * cdiv(columns, 8)


def workspace(like: Tensor, tokens: int, columns: int) -> Rows:
    """Uninitialised rows in the dtype and on the device of `like`."""
    stride = pitch(columns)
    return Rows(like.new_empty((tokens, stride)), tokens, columns, stride)


def in_workspace(t: Tensor, like: Tensor) -> Rows:
    """`t` [..., columns], contiguous, as the products take it: a copy in the dtype of `like`."""
    columns = t.shape[-1]
    rows = workspace(like, t.shape[:-1].numel(), columns)
    rows.data[:, :columns].copy_(t.view(rows.count, columns))
    return rows


class Masks(NamedTuple):
    """Dropout of a product's features.

    Attributes:
        seed: int64 of one element; None for no dropout.
        threshold: drop where 16 random bits are below.
        groups: how many groups the experts' rows are in, each with a mask of its own.
    """

    seed: Tensor | None = None
    threshold: int = 0
    groups: int = 1


NO_MASKS = Masks()


def masks(seed: Tensor | None, dropout: float, groups: int, x: Tensor) -> tuple[Masks, float]:
    """Masks of `dropout`, and what kept features are multiplied by.

    Raises:
        RuntimeError: seed is not what dropout > 0 needs.
    """
    if dropout <= 0:
        return NO_MASKS, 1.0
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise RuntimeError("seed: wanted an int64 tensor of one element on x's device")
    return Masks(seed, int(dropout * 65536 + 0.5), groups), 1 / (1 - dropout)


class RowMap(NamedTuple):
    """Which row of a table each token reads.

    Attributes:
        rows: of the table.
        index: int32 ``[T]``; None where tokens_per_row consecutive tokens read the same row.
        tokens_per_row: see there.
    """

    rows: int
    index: Tensor | None
    tokens_per_row: int

    @property
    def shared(self) -> bool:
        """Whether the rows are others than the tokens."""
        return self.index is not None or self.tokens_per_row != 1


def table(t: Tensor, index: Tensor | None, tokens: int, columns: int, name: str) -> RowMap:
    """How `tokens` read the table `t`, float32 ``[rows, columns]``.

    Values of `index` are not looked at, which would wait for the GPU; kernels read NaN for a row
    that does not exist.

    Raises:
        RuntimeError: it is no such table; without an index, the tokens do not spread evenly over
            its rows; or it is no index of them.
    """
    rows = t.shape[0]
    if t.dtype != torch.float32 or t.shape != (rows, columns) or not t.is_contiguous():
        raise RuntimeError(
            f"{name}: wanted a contiguous float32 table of {columns} columns, got"
            f" {list(t.shape)} in {t.dtype}"
        )
    if index is None:
        if tokens and (not rows or tokens % rows):
            raise RuntimeError(
                f"{name}: wanted a number of rows that divides {tokens} tokens, or a row_map,"
                f" got {rows}"
            )
        return RowMap(rows, None, tokens // rows if tokens else 0)
    if index.dtype != torch.int32 or index.numel() != tokens or not index.is_contiguous():
        raise RuntimeError(
            f"row_map: wanted a contiguous int32 for each of {tokens} tokens, got"
            f" {list(index.shape)} in {index.dtype}"
        )
    return RowMap(rows, index, 1)


class Segments(NamedTuple):
    """(token, slot) pairs, as token * k + slot, by expert, then by slot, then by token.

    Attributes:
        order: int32 ``[T * k]``, the pairs.
        starts: int32 ``[E * k + 1]``: where in `order` those of an expert's slot begin; T * k.
        num_experts, top_k: E and k.
    """

    order: Tensor
    starts: Tensor
    num_experts: int
    top_k: int

    def tiles(self, size: int, slots: int) -> int:
        """No fewer than the segments have in tiles of `size`, each that of so many slots."""
        pairs = self.order.numel() // self.top_k * slots
        return pairs // size + min(self.num_experts, pairs)


class Launch(NamedTuple):
    """A kernel launch but for the kernel.

    Attributes:
        grid: how many blocks, up to three numbers.
        arguments: positional.
        constants: compile-time constants and launch options.
    """

    grid: tuple[int, ...]
    arguments: tuple
    constants: dict

    def run(self, kernel) -> None:
        """Launch; an empty grid is none."""
        if min(self.grid):
            kernel[self.grid](*self.arguments, **self.constants)


def arch() -> Arch:
    """What the current device is."""
    driver = triton.runtime.driver.active
    return _arch(driver.get_current_target(), driver.get_current_device())


@functools.cache
def _arch(target, device) -> Arch:
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    name = f"sm_{target.arch}" if target.backend == "cuda" else target.arch
    return Arch(target.backend, name, properties["multiprocessor_count"])


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies `dtype`.

    float32 goes through six bfloat16 products on tensor cores, which errs less than a float32 FMA
    loop does, unless torch's own switch allows TF32.  AMD's matrix cores take float32 as it is.
    """
    if dtype != torch.float32 or arch().kind != "cuda":
        return "ieee"
    # The older torch.backends.cuda.matmul.allow_tf32 shows here too, and raises beside this one.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "bf16x6"


def options(warps: int, stages: int) -> dict:
    """Launch options of every kernel.

    Multiply-adds are never fused outside of tl.dot: a mix is compiled into several kernels, and a
    token gets the same bits in each of them.
    """
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
