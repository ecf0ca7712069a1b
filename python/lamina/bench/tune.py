"""Times tile sizes on this GPU that the tables of `lamina.kernels.tuning` did not choose.

    python -m lamina.bench.tune FOLDER --seconds 90

writes FOLDER/tuning.json (of every sweep the tile that the table names, the fastest, and their times),
FOLDER/tuning.md (all tiles that were timed) and FOLDER/tuned.json (the fastest ones of attention, for
LAMINA_GPU_TUNING). The tables stay as they are: whoever reads the files puts winners into them.

Compiling is what takes the time, so that processes compile candidates ahead, into Triton's cache; what is not compiled
when half of the time is over is left out, and said to be.
"""

import argparse
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lamina.bench import gpu, text
from lamina.stopwatch import in_turns

# Of so many candidates at most, the table's own among them: others are drawn.
MOST = 48
_ROUNDS = 5
_SAMPLE_CALLS = 10


@dataclass(frozen=True)
class Sweep:
    """A kernel at one shape: the tiles to try, the table's choice first, and what runs it with one of them.

    keep: notes a tile for the file that LAMINA_GPU_TUNING takes, where the kernel's tiles have a place in it.
    """

    name: str
    tiles: Sequence[Any]
    run: Callable[[Any], tuple[torch.Tensor, ...]]
    keep: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a sweep; `left_out` of its tiles were not compiled in time, failed or gave other results."""

    name: str
    chosen: str
    chosen_seconds: float
    best: str
    best_seconds: float
    tried: int
    left_out: int

    @property
    def gain(self) -> float:
        return self.chosen_seconds / self.best_seconds


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    if dtype is torch.int8:
        return torch.randint(-127, 128, shape, device=gpu.DEVICE, dtype=dtype)
    return torch.randn(shape, device=gpu.DEVICE, dtype=dtype)


def _chip() -> tuple[int, int]:
    """Capability (90) and multiprocessors of the GPU."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor, torch.cuda.get_device_properties(0).multi_processor_count


def _int8_linear(m: int, k: int, n: int) -> Sweep:
    from lamina.kernels import int8_linear
    from lamina.kernels.tuning.int8_linear import int8_linear_candidates

    chip, multiprocessors = _chip()
    codes, weight = _random(m, k, dtype=torch.int8), _random(n, k, dtype=torch.int8)
    x_scale, w_scale = torch.rand(m, device=gpu.DEVICE), torch.rand(n, device=gpu.DEVICE)
    out = torch.empty(m, n, device=gpu.DEVICE, dtype=torch.bfloat16)
    operands = codes, x_scale, weight, w_scale, None, "none", None, None, out
    return Sweep(
        f"int8_linear {m}x{k}x{n}",
        int8_linear_candidates(m, n, k, chip, multiprocessors),
        lambda tile: (int8_linear.int8_linear(*operands, tile=tile), (out,))[1],
    )


def _weight_only(m: int, k: int, n: int) -> Sweep:
    from lamina.kernels import weight_only_linear
    from lamina.kernels.tuning.weight_only_linear import weight_only_candidates

    chip, multiprocessors = _chip()
    x, weight, scale = _random(m, k), _random(n, k, dtype=torch.int8), torch.rand(n, device=gpu.DEVICE)
    out = torch.empty(m, n, device=gpu.DEVICE, dtype=torch.bfloat16)
    operands = x, weight, scale, None, 0, "none", out
    return Sweep(
        f"weight_only_linear {m}x{k}x{n}",
        weight_only_candidates(m, n, k, 0, 2, chip, multiprocessors),
        lambda tile: (weight_only_linear.weight_only_linear(*operands, tile=tile), (out,))[1],
    )


def _sparse(m: int, k: int, n: int, block: int) -> Sweep:
    import lamina
    from lamina.kernels import sparse_linear
    from lamina.kernels.tuning.sparse_linear import sparse_tile, sparse_tile_candidates

    chip, _ = _chip()
    weight = _random(n, k)
    weight.view(n // block, block, -1, block).mul_(torch.rand(n // block, 1, k // block, 1, device=gpu.DEVICE) < 0.1)
    packed = lamina.ops.pack_sparse_weight(weight, f"{block}x{block}")
    x, out = _random(m, k), torch.empty(m, n, device=gpu.DEVICE, dtype=torch.bfloat16)
    tiles = [sparse_tile(block, m, 2, chip), *sparse_tile_candidates(block, m, 2, chip)]
    operands = x, packed.data, packed.index, None, "none", out
    return Sweep(
        f"sparse_linear {m}x{k}x{n} {block}x{block}",
        tiles,
        lambda tile: (sparse_linear.sparse_linear(*operands, tile=tile), (out,))[1],
    )


def _attention(kernel: str, b: int, h: int, s: int, d: int, causal: bool) -> Sweep:
    """The forward pass, or the backward one with all of its kernels of which one is tuned."""
    import lamina
    from lamina.kernels.tuning import attention as tuning

    q, k, v = (_random(b, h, s, d) for _ in range(3))
    if kernel == "forward":

        def call() -> tuple[torch.Tensor, ...]:
            return (lamina.ops.attention(q, k, v, is_causal=causal),)
    else:
        leaves = [t.requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            output = lamina.ops.attention(*leaves, is_causal=causal)
        grad = torch.randn_like(output)

        def call() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(output, leaves, grad, retain_graph=True)

    shape = tuning.AttentionShape(kernel, d, 2, False, _chip()[0])

    def run(tile: Any) -> tuple[torch.Tensor, ...]:
        tuning.choose(shape, tile)
        try:
            return call()
        finally:
            tuning.choose(shape, None)

    name = f"attention {kernel} {b}x{h}x{s}x{d}{' causal' if causal else ''}"
    return Sweep(name, tuning.candidates(shape), run, lambda tile: tuning.choose(shape, tile))


# (function, arguments) of every sweep, in the order of their worth: made again by name in the processes that compile.
SWEEPS: Sequence[tuple[str, tuple]] = (
    ("_attention", ("forward", 1, 16, 8192, 128, True)),
    ("_int8_linear", (4096, 4096, 4096)),
    ("_attention", ("keys", 1, 16, 4096, 128, True)),
    ("_attention", ("queries", 1, 16, 4096, 128, True)),
    ("_attention", ("forward", 4, 16, 4096, 64, True)),
    ("_int8_linear", (16, 4096, 4096)),
    ("_weight_only", (1, 4096, 14336)),
    ("_weight_only", (16, 4096, 14336)),
    ("_sparse", (4096, 4096, 4096, 64)),
)


def _made(number: int) -> Sweep:
    """The sweep, with the table's choice and a fixed draw of the others."""
    name, arguments = SWEEPS[number]
    torch.manual_seed(0)
    sweep = globals()[name](*arguments)
    tiles = list(dict.fromkeys(sweep.tiles))
    others = tiles[1:]
    if len(others) >= MOST:
        others = random.Random(0).sample(others, MOST - 1)
    return replace(sweep, tiles=[tiles[0], *others])


_known: dict[int, Sweep] = {}


def _compile(number: int, place: int) -> tuple[int, int, str]:
    """Run one candidate once, in a process of its own: (sweep, candidate, "" or why not)."""
    try:
        if number not in _known:
            _known[number] = _made(number)
        _known[number].run(_known[number].tiles[place])
        torch.cuda.synchronize()
    except Exception as failure:  # shared memory that a GPU does not have, among others
        return number, place, f"{type(failure).__name__}: {failure}"
    return number, place, ""


def _compiled(sweeps: dict[int, Sweep], seconds: float, tell: Callable[[str], None]) -> dict[int, list[int]]:
    """Which candidates of each sweep run, of those that were compiled in so many seconds."""
    order = [(number, place) for place in range(MOST) for number, s in sweeps.items() if place < len(s.tiles)]
    found: dict[int, list[int]] = {number: [] for number in sweeps}
    end = time.perf_counter() + seconds
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    # Spawned, not forked: CUDA is in use here.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        waiting = [pool.submit(_compile, *pair) for pair in order]
        for done in as_completed(waiting, timeout=max(0.0, end - time.perf_counter())):
            number, place, failure = done.result()
            if not failure:
                found[number].append(place)
    except TimeoutError:
        tell("not all candidates could be compiled in time")
    finally:
        processes = list(pool._processes.values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
    return found


def _agrees(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    """Whether results are the table's but for roundings to bfloat16: what is wrong is off by far more."""
    pairs = zip(outputs, expected, strict=True)
    return all(bool((a.float() - b).abs().max() <= 2**-6 * b.abs().max()) for a, b in pairs)


def _judge(sweep: Sweep, places: Sequence[int], seconds: float) -> tuple[Outcome, dict[str, float]]:
    """Times candidates in turns."""
    timed = gpu.stopwatch()
    expected = [t.float() for t in sweep.run(sweep.tiles[0])]
    others = (place for place in sorted(places) if place)
    places = [0, *(place for place in others if _agrees(sweep.run(sweep.tiles[place]), expected))]
    candidates = {str(place): lambda place=place: sweep.run(sweep.tiles[place]) for place in places}
    times = in_turns(candidates, seconds, _ROUNDS, lambda call, calls: timed(call, _SAMPLE_CALLS))
    best = {name: min(samples) for name, samples in times.items()}
    winner = min(best, key=best.__getitem__)
    shown = {str(sweep.tiles[int(name)]): value for name, value in sorted(best.items(), key=lambda pair: pair[1])}
    outcome = Outcome(
        name=sweep.name,
        chosen=str(sweep.tiles[0]),
        chosen_seconds=best["0"],
        best=str(sweep.tiles[int(winner)]),
        best_seconds=best[winner],
        tried=len(places),
        left_out=len(sweep.tiles) - len(places),
    )
    return outcome, shown


def sweep_all(
    folder: Path, seconds: float, compiled: Callable = _compiled, tell: Callable[[str], None] = print
) -> list[Outcome]:
    """Make every sweep that there are kernels for, in so many seconds, and write the two files after each of them."""
    end = time.perf_counter() + seconds
    sweeps: dict[int, Sweep] = {}
    for number, (name, arguments) in enumerate(SWEEPS):
        try:
            sweeps[number] = _made(number)
        except (ImportError, AttributeError, ValueError, RuntimeError) as failure:
            tell(f"left out {name}{arguments}: {type(failure).__name__}: {failure}")
    ready = compiled(sweeps, seconds / 2, tell)
    outcomes: list[Outcome] = []
    kept: list[Callable[[], None]] = []
    page = ["# Tile sizes", ""]
    for left, (number, sweep) in zip(range(len(sweeps), 0, -1), sweeps.items(), strict=True):
        remaining = end - time.perf_counter()
        if remaining < 0:
            tell(f"left out {sweep.name}: no time is left")
            continue
        with torch.no_grad():
            outcome, shown = _judge(sweep, ready[number], remaining / left / 2)
        outcomes.append(outcome)
        if sweep.keep is not None:
            winner = next(tile for tile in sweep.tiles if str(tile) == outcome.best)
            kept.append(lambda keep=sweep.keep, tile=winner: keep(tile))
        tell(f"{outcome.name}: {outcome.gain:.2f}x by {outcome.best}")
        page += [f"## {sweep.name}", "", f"{outcome.tried} tried, {outcome.left_out} left out", ""]
        page += ["| tile | time |", "|---|---|", *(f"| `{t}` | {text.duration(s)} |" for t, s in shown.items()), ""]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tuning.md").write_text("\n".join(page) + "\n", "utf-8")
        rows = [{**asdict(each), "gain": each.gain} for each in outcomes]
        (folder / "tuning.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    if kept:
        for keep in kept:
            keep()
        from lamina.kernels.tuning import attention as tuning

        tuning.save(folder / "tuned.json")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=90.0)
    given = parser.parse_args()
    sweep_all(given.folder, given.seconds, tell=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
