"""The `lamina` command: info, train, compress, run, bench, report, compare.

A user's mistake ends in one sentence on stderr and exit code 2; a traceback means a bug in lamina.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    help="Compiled kernels that make PyTorch models faster on CPUs, and reports that show it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
USER_ERROR = 2
INTERRUPTED = 130


def _user_errors(command: Callable) -> Callable:
    """Turn what a user can get wrong into one sentence on stderr and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        import lamina

        try:
            return command(*args, **kwargs)
        except (ValueError, ImportError, OSError, lamina.FormatError) as error:
            message = " ".join(str(error).split()) or type(error).__name__
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"lamina: {message}", markup=False)
            raise typer.Exit(USER_ERROR) from None

    return wrapped


def _console() -> Console:
    console = Console()
    # A pipe or a log file has no width of its own; tables wrapped at 80 columns would be hard to read there.
    return console if console.is_terminal else Console(width=max(console.width, 160))


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@app.command()
@_user_errors
def info(
    peaks: Annotated[bool, typer.Option("--peaks", help="Also measure the machine's peaks (3 seconds).")] = False,
) -> None:
    """Show what lamina sees: instruction sets, threads, backends, build."""
    import lamina

    console = _console()
    table = Table("what", "value", show_header=False, box=None, pad_edge=False)
    for name, value in lamina.info().items():
        table.add_row(name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    console.print(table, markup=False)
    if peaks:
        from lamina.bench import machine, text

        with _progress(console) as progress:
            measured = machine.describe(_reporter(progress, "machine"))
        table = Table("what", "value", show_header=False, box=None, pad_edge=False)
        for row in text.machine_lines(measured):
            table.add_row(*row)
        console.print(table)


@app.command()
@_user_errors
def train(
    name: Annotated[str, typer.Argument(help="Model to train; an unknown one lists those with a recipe.")],
    out: Annotated[Path, typer.Option(help="Folder for NAME.safetensors.")] = Path("checkpoints"),
    epochs: Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
) -> None:
    """Train a small reference model on 5,000 MNIST digits and save it."""
    import lamina
    import lamina.train

    result = lamina.train.train(name, seed=seed, epochs=epochs)
    lamina.train.print_result(result)
    path = out / f"{name}.safetensors"
    out.mkdir(parents=True, exist_ok=True)
    lamina.save(result.model, path, result.metadata())
    _console().print(f"saved {path}", highlight=False)


@app.command()
@_user_errors
def compress(
    name: Annotated[str, typer.Argument(help="Model to compress; an unknown one lists those with a recipe.")],
    sparsity: Annotated[float, typer.Option(help="Share of the weights that become zero.")] = 0.9,
    pattern: Annotated[
        str,
        typer.Option(
            help="unstructured, 2:4, or blocks of outputs x inputs: 2x1, 4x1, 1x4, 2x4, 4x4, 16x16, 32x32, 64x64."
        ),
    ] = "4x4",
    int8: Annotated[bool, typer.Option("--int8", help="Quantize weights and activations too.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for all that is written; one run each.")] = Path("compressed"),
    checkpoint: Annotated[
        Path | None, typer.Option(help="NAME.safetensors of `lamina train` [default: train in OUT].")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Of tuning, instead of the recipe's.", min=2)] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
) -> None:
    """Prune, fine-tune, quantize and measure a reference model. Interrupted, the same command goes on."""
    from lamina import compress

    try:
        compress.run(
            name,
            out,
            sparsity=sparsity,
            pattern=pattern,
            int8=int8,
            checkpoint=checkpoint,
            epochs=epochs,
            seed=seed,
            console=_console(),
        )
    except KeyboardInterrupt:
        Console(stderr=True).print("lamina: stopped; the same command goes on from here", highlight=False)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
@_user_errors
def run(
    plan: Annotated[Path, typer.Argument(help="What Plan.save wrote.")],
    input: Annotated[
        list[str], typer.Option(help="FILE.npy, or NAME=FILE.npy; once for each input, in order or by name.")
    ],
    out: Annotated[Path | None, typer.Option(help="FILE.npz for the outputs.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also show what each step takes.")] = False,
) -> None:
    """Run a saved plan on arrays."""
    import lamina
    from lamina.plan import arrays

    loaded = lamina.load_plan(plan)
    given = arrays.read(input, loaded.inputs)
    outputs = arrays.named(loaded(**given))
    console = _console()
    table = Table("output", "dtype", "shape", "first values")
    for name, array in outputs.items():
        first = ", ".join(f"{value:.6g}" for value in array.ravel()[:6])
        table.add_row(name, str(array.dtype), str(list(array.shape)), first)
    console.print(table, markup=False)
    if out is not None:
        arrays.write(out, outputs)
        console.print(f"saved {out}", highlight=False)
    if profile:
        console.print(str(loaded.profile(**given)), markup=False, highlight=False)


@app.command()
@_user_errors
def bench(
    pattern: Annotated[
        str | None, typer.Option("--filter", help="Part of a workload id, or a glob such as 'attention/*causal*'.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the workloads of a GPU.")] = "cpu",
    threads: Annotated[str, typer.Option(help="Thread counts, e.g. '1,2'; 'all' is what torch uses.")] = "1,all",
    isa: Annotated[str | None, typer.Option(help="Force lamina's kernels to one ISA, e.g. avx2.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results here, for `lamina compare`.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer workloads and less time for each.")] = False,
    cold: Annotated[bool, typer.Option("--cold", help="Also time every workload with flushed caches.")] = False,
    targets: Annotated[
        Path | None, typer.Option(help="Judge the run by a targets file; without --filter run what it names.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when a target is missed.")] = False,
    seconds: Annotated[
        float | None, typer.Option(help="Begin no workload after so long; those left out are named.")
    ] = None,
    peers: Annotated[bool, typer.Option("--peers", help="Also run torch.compile, ONNX Runtime, OpenVINO, ...")] = False,
    list_only: Annotated[bool, typer.Option("--list", help="Show the workloads and stop.")] = False,
) -> None:
    """Time workloads against eager PyTorch, each answer checked before its time is taken."""
    import contextlib
    import time

    import lamina
    from lamina.bench import machine, results, runner, text, workloads
    from lamina.bench import targets as promises
    from lamina.bench.break_even import break_evens
    from lamina.bench.peers import PEERS

    if strict and targets is None:
        raise ValueError("--strict judges targets: name the file with --targets")
    if device not in promises.DEVICES:
        raise ValueError(f"--device is {device!r}, but must be {' or '.join(promises.DEVICES)}")
    if device == "cuda" and not (list_only or torch_sees_a_gpu()):
        raise ValueError("--device cuda needs a GPU, and torch sees none here")
    console = _console()
    wanted = [target for target in promises.parse(targets) if target.device == device] if targets else []
    chosen = workloads.select(pattern, tags=("quick",) if quick else (), device=device)
    if wanted and pattern is None:
        named = promises.needed(wanted)
        chosen = [workload for workload in chosen if named(workload.id, workload.dims)]
    # What nobody asked to run is not reported as "not judged".
    wanted = [target for target in wanted if any(target.selects(w.id, w.dims) for w in chosen)]
    if list_only:
        for workload in chosen:
            console.print(workload.id, highlight=False, soft_wrap=True)
        return
    counts = [1] if device == "cuda" else _thread_counts(threads)
    end = None if seconds is None else time.perf_counter() + seconds

    def describe(progress: Progress) -> machine.Machine:
        return machine.describe_gpu() if device == "cuda" else machine.describe(_reporter(progress, "machine"))

    with contextlib.ExitStack() as stack:
        if isa:
            stack.enter_context(lamina.force_isa(isa))
        with _progress(console) as progress:
            here = describe(progress)
        measurements = []

        def keep(found: Sequence[results.Measurement]) -> None:
            if json:  # whatever stops this run, what was measured is there
                results.collect(here, [*measurements, *found]).save(json)

        for op in dict.fromkeys(workload.op for workload in chosen):
            with _progress(console) as progress:
                found, skipped = runner.run_all(
                    [workload for workload in chosen if workload.op == op],
                    counts,
                    peers=list(PEERS.values()) if peers else (),
                    budget=0.2 if quick else 0.4,
                    cold_cache_bytes=machine.cache_bytes(here) if cold else None,
                    progress=_reporter(progress, op),
                    end=end,
                    slow=not quick,
                    keep=keep,
                )
                # Peaks again, since a core may have been busy the first time: what counts is the highest ever seen.
                here = machine.combine(here, describe(progress))
            _print_op(console, op, found, skipped, here, cold)
            measurements += found
    for name, value in text.machine_lines(here):
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)
    if even := break_evens(measurements):
        console.print(text.break_even_table(even))
    verdicts = [verdict for verdict in promises.judge(wanted, measurements, here) if verdict.threads in counts]
    if verdicts:
        console.print(text.target_table(verdicts))
    if json:
        results.collect(here, measurements, targets=verdicts).save(json)
        console.print(f"wrote {json}", highlight=False)
    if strict and any(verdict.status == "missed" for verdict in verdicts):
        raise typer.Exit(1)


def torch_sees_a_gpu() -> bool:
    """Whether there is one that torch was built for."""
    import torch

    return torch.cuda.is_available()


def _print_op(console: Console, op: str, measurements, skipped, here, cold: bool) -> None:
    from lamina.bench import text

    for cache in ("warm", "cold") if cold else ("warm",):
        rows = [item for item in measurements if item.cache == cache]
        if rows:
            console.print(text.bench_table(rows, here, f"{op}, {cache} caches"))
    failures = {(name, why): item.workload for item in measurements for name, why in item.failures.items()}
    for (name, why), workload in failures.items():
        console.print(f"{name} has no time at {workload}: {why}", style="yellow", markup=False, highlight=False)
    for workload, why in skipped.items():
        console.print(f"skipped {workload}: {why}", style="yellow", markup=False, highlight=False)


@app.command()
@_user_errors
def report(
    out: Annotated[Path, typer.Option(help="Folder for index.html and results.json; nothing else is written.")] = Path(
        "report"
    ),
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder of the trained models [default: OUT/checkpoints].")
    ] = None,
    targets: Annotated[
        Path | None, typer.Option(help="Targets file [default: benchmarks/targets.toml where there is one].")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less time for each measurement.")] = False,
) -> None:
    """Train or load real models, accelerate them, measure, and write one page about it."""
    from lamina.bench.reporting import job

    job.run(out, checkpoints=checkpoints, targets_file=targets, quick=quick, console=_console())


@app.command()
@_user_errors
def compare(
    old: Annotated[Path, typer.Argument(help="results.json of the earlier run.")],
    new: Annotated[Path, typer.Argument(help="results.json of the later run.")],
    fail_below: Annotated[
        float | None, typer.Option(help="Exit with 1 when a workload fell below this ratio and out of the noise.")
    ] = None,
) -> None:
    """Show what became faster or slower between two result files."""
    from lamina.bench import results, text
    from lamina.bench.compare import compare as compare_results

    console = _console()
    before, after = results.load(old), results.load(new)
    changes = compare_results(before, after)
    console.print(text.compare_table(changes))
    if before.machine.cpu != after.machine.cpu:
        console.print(
            f"not the same machine: {before.machine.cpu} before, {after.machine.cpu} now", style="yellow", markup=False
        )
    if fail_below is not None and any(change.fails(fail_below) for change in changes):
        raise typer.Exit(1)


def _thread_counts(text: str) -> list[int]:
    from lamina.bench.machine import thread_counts

    most = thread_counts()[-1]
    counts = set()
    for word in text.split(","):
        if word.strip() == "all":
            counts.add(most)
        elif word.strip().isdigit() and int(word) > 0:
            counts.add(int(word))
        else:
            raise ValueError(f"--threads takes counts and 'all', separated by commas, not {text!r}")
    return sorted(counts)


def _reporter(progress: Progress, title: str) -> Callable[[str, int, int], None]:
    """A callback (description, done, total) that draws one line of a progress display."""
    task = progress.add_task(title, total=None)
    return lambda description, done, total: progress.update(
        task, description=f"{title}: {description}", completed=done, total=total
    )


if __name__ == "__main__":
    app()
