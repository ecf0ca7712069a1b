"""Finds the block shapes of attention that are fastest on the GPU that is here, and writes them into a file.

python -m lamina.kernels.attention_sweep tuned.json --head-sizes 64 128 --minutes 5
LAMINA_GPU_TUNING=tuned.json python train.py
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lamina.kernels.attention import attention
from lamina.kernels.attention_backward import attention_backward
from lamina.kernels.attention_scores import block_of, capability
from lamina.kernels.tuning import attention as tuning
from lamina.kernels.tuning.attention import AttentionShape, Tiles
from torch import Tensor


def sweep(
    path: str | Path,
    head_sizes: tuple[int, ...] = (64, 128),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,),
    *,
    length: int = 8192,
    batch_heads: int = 16,
    is_causal: bool = True,
    masked: bool = False,
    minutes: float = 5.0,
    report: Callable[[str], None] = print,
) -> dict[AttentionShape, Tiles]:
    """Times the candidates of every kernel at [1, batch_heads, length, D], writes the fastest into `path`, gives them.

    A candidate counts only if its result is the table's to the accuracy of the dtype. When the minutes are over, what
    has not been timed keeps the table's choice. Takes a second or two for each candidate, most of it compilation.
    """
    end = time.monotonic() + 60 * minutes
    found = {}
    for dtype in dtypes:
        for size in head_sizes:
            run = _Run(size, dtype, length, batch_heads, is_causal, masked)
            for kernel in tuning.ATTENTION_KERNELS[: 4 if masked else 3]:
                shape = AttentionShape(kernel, block_of(size), dtype.itemsize, masked, capability(run.q))
                found[shape] = _fastest(shape, run, end, report)
                tuning.choose(shape, found[shape])
    tuning.save(path)
    return found


class _Run:
    """One call each of the forward and the backward pass."""

    def __init__(self, size: int, dtype: torch.dtype, length: int, heads: int, is_causal: bool, masked: bool) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def random() -> Tensor:
            return torch.randn(1, heads, length, size, generator=generator, device="cuda").to(dtype)

        self.q, self.k, self.v, self.grad = random(), random(), random(), random()
        self.mask = None
        if masked:
            self.mask = torch.randn(1, heads, length, length, generator=generator, device="cuda").to(dtype)
        self.out, self.lse = torch.empty_like(self.q), self.q.new_empty(1, heads, length, dtype=torch.float32)
        self.gradients = tuple(torch.empty_like(t) for t in (self.q, self.k, self.v))
        self.options = {"is_causal": is_causal, "scale": size**-0.5}
        self.forward()

    def forward(self) -> tuple[Tensor, ...]:
        attention(self.q, self.k, self.v, self.mask, self.out, self.lse, **self.options)
        return (self.out,)

    def backward(self) -> tuple[Tensor, ...]:
        tensors = self.grad, self.q, self.k, self.v, self.out, self.lse, None, self.mask
        rest = attention_backward(*tensors, *self.gradients, **self.options, mask_gradient=self.mask is not None)
        return *self.gradients, *(t for t in rest if t is not None)


def _fastest(shape: AttentionShape, run: _Run, end: float, report: Callable[[str], None]) -> Tiles:
    call = run.forward if shape.kernel == "forward" else run.backward
    before = tuning.attention_tiles(shape)
    best, expected, shortest = before, None, float("inf")
    for tiles in tuning.candidates(shape):
        if time.monotonic() > end and expected is not None:
            break
        tuning.choose(shape, tiles)
        try:
            got = [t.float() for t in call()]
            taken = _milliseconds(call)
        except Exception as error:  # more shared memory or registers than there are, or more than the compiler can
            report(f"{shape.kernel} {shape.columns} {tiles}: {type(error).__name__}")
            continue
        if expected is None:
            expected = got
        # Both have roundings to the dtype; what is wrong is off by far more.
        limit = 2.0**-6 if shape.element_size == 2 else 2.0**-12
        if any((a - b).abs().max() > limit * b.abs().max() for a, b in zip(got, expected, strict=True)):
            report(f"{shape.kernel} {shape.columns} {tiles}: another result, not taken")
            continue
        report(f"{shape.kernel} {shape.columns} {tiles}: {taken:.3f} ms")
        if taken < shortest:
            best, shortest = tiles, taken
    tuning.choose(shape, best)
    return best


def _milliseconds(call: Callable[[], object], repeats: int = 10) -> float:
    """The median; every call has an event before and after it on the device."""
    call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return sorted(before.elapsed_time(after) for before, after in events)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the file to write")
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--masked", action="store_true", help="tune calls with a mask that is added")
    given = parser.parse_args()
    sweep(given.path, tuple(given.head_sizes), length=given.length, minutes=given.minutes, masked=given.masked)


if __name__ == "__main__":
    main()
