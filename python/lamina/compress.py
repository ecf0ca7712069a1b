"""`lamina compress`: a trained reference model made small and fast, in one job that can be interrupted.

    train    a dense model
    scan     which of its layers bears which sparsity
    tune     pruned while it trains on, taught by the dense one
    convert  int8 and sparse layers where they win, measured and judged against the dense model

What a finished stage found is in compress.json, what a running one needs to go on in a file of its own; both appear
whole or not at all. The same command goes on where the last one stopped, to the same bits.
"""

import copy
import datetime
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import lamina
from lamina import data, models, prune, train
from lamina.accelerate import model_bytes
from lamina.bench import machine, text, timing
from lamina.bench.reporting import compressed, page
from lamina.configs import Config, FusedAttention, FusedConv, FusedRNN, Int8Dynamic, Int8RNN, Sparse, SparseInt8
from lamina.errors import FormatError
from lamina.ops.sparse_blocks import BLOCKS
from lamina.prune.patterns import check_sparsity, parse

SCHEMA, VERSION = "lamina-compress", 1
STATE, PAGE = "compress.json", "index.html"
DENSE, PRUNED, COMPRESSED = "dense.safetensors", "pruned.safetensors", "compressed.safetensors"
# The state of a training that has not finished.
UNFINISHED = ("training.safetensors", "tuning.safetensors")
SCANNED = (0.5, 0.7, 0.8, 0.9, 0.95)
BATCHES = (64, 1)
TIMING_SECONDS = 0.6
# Hinton's mixture: mostly what the dense model says, softened.
TEMPERATURE, TEACHER_SHARE = 4.0, 0.7
# The mask grows over this share of the epochs; in the others what is left learns to do without.
PRUNING_SHARE = 0.5
CHANGES_PER_EPOCH = 5
# What sparse int8 kernels know, and for other zeros which float ones see the largest blocks in them.
INT8_PATTERNS = ("1x4", "2x4", "4x4")
FLOAT_PATTERNS = {"4x1": "4x1", "4x4": "4x1", "2x1": "2x1", "2x4": "2x1", **{block: block for block in BLOCKS}}


@dataclass(frozen=True)
class Request:
    """What was asked for; a folder belongs to one. checkpoint: CRC-32 of the file the dense model came from."""

    name: str
    sparsity: float
    pattern: str
    int8: bool
    epochs: int
    seed: int
    checkpoint: int | None
    recipe: Mapping[str, Any]


def run(
    name: str,
    out: str | Path,
    *,
    sparsity: float = 0.9,
    pattern: str = "4x4",
    int8: bool = False,
    checkpoint: str | Path | None = None,
    epochs: int | None = None,
    seed: int = 0,
    recipe: train.Recipe | None = None,
    splits: data.Splits | None = None,
    compile: Literal["auto", False] = "auto",
    console: Console | None = None,
) -> Path:
    """Do the whole job, or what is left of it, and return the path of the page.

    Args:
        name: a model with a training recipe (`lamina.train.RECIPES`).
        out: folder for everything that is written: compress.json, dense.safetensors (unless a checkpoint is given),
            pruned.safetensors, compressed.safetensors, index.html.
        sparsity, pattern: of all linear, convolutional and recurrent weights together ("2:4": of every layer), by the
            gradients; see `lamina.prune.GradualPruner`.
        int8: also quantize.
        checkpoint: a file that `lamina train` wrote; the model is trained first if None.
        epochs: of fine-tuning, instead of the recipe's.
        seed: of all that is random.
        recipe: instead of `train.RECIPES[name]`.
        splits: what to use instead of `data.mnist()` or `data.dates()`.
        compile: as in `lamina.accelerate`, which chooses the layers; the file has the layers without their graph.
        console: where progress is drawn.

    Raises ValueError for an unknown model, pattern or sparsity, and if `out` holds a run of something else;
    FileNotFoundError and lamina.FormatError for a checkpoint that is none; ImportError without the packages it needs.

    >>> lamina.compress.run("lenet", "small", sparsity=0.9, pattern="4x4", int8=True)
    """
    if name not in train.RECIPES:
        raise ValueError(
            f"there is no training recipe for {name!r}; the known ones are {', '.join(sorted(train.RECIPES))}"
        )
    parsed = parse(pattern, "compress")
    if check_sparsity(sparsity, parsed, "compress") == 1.0:
        raise ValueError("compress: sparsity is 1, which leaves nothing of the model")
    recipe = recipe or train.RECIPES[name]
    epochs = recipe.epochs if epochs is None else epochs
    if epochs < 2:
        raise ValueError(
            f"compress: fine-tuning takes at least 2 epochs, one to prune and one to recover, not {epochs}"
        )
    page.require()
    digest = zlib.crc32(_bytes_of(checkpoint)) if checkpoint else None
    request = Request(name, sparsity, pattern, int8, epochs, seed, digest, asdict(recipe))
    out = Path(out)
    job = _Job(request, out, recipe, splits or train.splits_of(name), checkpoint, compile, console or Console())
    job.run()
    path = out / PAGE
    _replace(path, compressed.render(job.state))
    job.console.print(compressed.headline(job.state), highlight=False, markup=False)
    job.console.print(f"wrote {path}", highlight=False)
    return path


def _bytes_of(path: str | Path) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; write one with `lamina train`")
    return Path(path).read_bytes()


def _replace(path: Path, content: str) -> None:
    """Writes a text file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(content, "utf-8")
    partial.replace(path)


class _Job:
    """The stages, and what they have found so far."""

    def __init__(
        self,
        request: Request,
        out: Path,
        recipe: train.Recipe,
        splits: data.Splits,
        checkpoint: str | Path | None,
        compile: Literal["auto", False],
        console: Console,
    ) -> None:
        self.request, self.out, self.recipe, self.splits, self.console = request, out, recipe, splits, console
        self.checkpoint, self.compile = checkpoint, compile
        asked = json.loads(json.dumps(asdict(request)))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.state: dict[str, Any] = {
            "schema": SCHEMA,
            "version": VERSION,
            "created": now,
            "request": asked,
            "stages": {},
        }
        path = out / STATE
        if path.exists():
            self.state = _load(path)
            if self.state["request"] != asked:
                raise ValueError(
                    f"{out} holds another run ({_difference(self.state['request'], asked)}); use another --out"
                )
        out.mkdir(parents=True, exist_ok=True)
        self._dense: nn.Module | None = None

    def run(self) -> None:
        stages: dict[str, Callable[[Callable[[str, int, int], None]], dict[str, Any]]] = {
            "train": self.train,
            "scan": self.scan,
            "tune": self.tune,
            "convert": self.convert,
        }
        for index, (name, stage) in enumerate(stages.items(), start=1):
            title = f"[{index}/{len(stages)}] {name}"
            start = time.perf_counter()
            done = self.state["stages"].get(name)
            if done is None:
                with self._progress(title) as tell:
                    done = json.loads(json.dumps(stage(tell)))
                self.state["stages"][name] = done
                _replace(self.out / STATE, json.dumps(self.state, indent=1) + "\n")
                for unfinished in UNFINISHED:
                    (self.out / unfinished).unlink(missing_ok=True)
                took = f" ({time.perf_counter() - start:.0f} s)"
            else:
                took = " (done before)"
            self.console.print(f"{title}: {done['summary']}{took}", highlight=False, markup=False, soft_wrap=True)

    # -- stages: each returns what JSON can hold, with a "summary"

    def train(self, tell: Callable[[str, int, int], None]) -> dict[str, Any]:
        if self.checkpoint:
            _, result = train.load(self.request.name, self.checkpoint)
        else:
            done = 0

            def report(epoch: train.Epoch) -> None:
                nonlocal done
                done += 1
                tell(_epoch_line(epoch), done, self.recipe.epochs)

            result = train.train(
                self.request.name,
                seed=self.request.seed,
                recipe=self.recipe,
                splits=self.splits,
                state_file=self.out / UNFINISHED[0],
                report=report,
            )
            lamina.save(result.model, self.out / DENSE, result.metadata())
        # On these images, whatever the checkpoint was judged on.
        metrics = train.evaluate(self._dense_model(), *self.splits.test)
        return {
            "summary": f"accuracy {text.percent(metrics.accuracy, 2)} on {len(self.splits.test):,} test samples",
            "metrics": asdict(metrics),
            "epochs": len(result.history),
            "seconds": result.seconds,
        }

    def scan(self, tell: Callable[[str, int, int], None]) -> dict[str, Any]:
        pattern = self.request.pattern
        found = prune.sensitivity(
            copy.deepcopy(self._dense_model()),
            lambda model: train.evaluate(model, *self.splits.validation).accuracy,
            (0.5,) if pattern == "2:4" else SCANNED,
            pattern,
            progress=tell,
        )
        worst = min(found.layers, key=lambda layer: min(layer.scores.values()))
        share, score = min(worst.scores.items(), key=lambda item: item[1])
        return {
            "summary": f"{worst.fqn} bears least: {text.percent(score, 1)} with {text.percent(share)} of it zero",
            "baseline": found.baseline,
            "layers": [
                {"fqn": layer.fqn, "elements": layer.elements, "scores": sorted(layer.scores.items())}
                for layer in found.layers
            ],
        }

    def tune(self, tell: Callable[[str, int, int], None]) -> dict[str, Any]:
        request = self.request
        dense = self._dense_model()
        at_once = copy.deepcopy(dense)
        scope = "layer" if request.pattern == "2:4" else "lamp"
        prune.magnitude_(at_once, request.sparsity, request.pattern, scope=scope)
        before = train.evaluate(at_once, *self.splits.test)

        model = copy.deepcopy(dense)
        # All epochs are trained: the last are the ones that recover.
        recipe = replace(self.recipe, epochs=request.epochs, patience=request.epochs)
        steps = -(-len(self.splits.train) // recipe.batch_size)
        pruning_epochs = max(1, round(PRUNING_SHARE * request.epochs))
        pruner = prune.GradualPruner(
            model,
            request.sparsity,
            request.pattern,
            scope="layer" if request.pattern == "2:4" else "global",
            steps=pruning_epochs * steps - steps // 2,
            start=steps // 2,  # the gradients of half an epoch say who matters
            every=max(1, steps // CHANGES_PER_EPOCH),
            score="taylor",
        )
        task = train.task_of(self.splits)

        def loss(x: Tensor, y: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
            with torch.no_grad():
                taught = task.logits(dense, x, y)
            return prune.distillation_loss(
                logits,
                taught,
                targets,
                temperature=TEMPERATURE,
                alpha=TEACHER_SHARE,
                label_smoothing=recipe.label_smoothing,
            )

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            training = train.Run(
                model,
                recipe,
                self.splits,
                seed=request.seed,
                loss=loss,
                after_step=pruner.step,
                choose_from=pruning_epochs,
            )
            path = self.out / UNFINISHED[1]
            of = {**asdict(request), "stage": "tune"}
            for done, epoch in enumerate(train.resumable(training, path, of, also=pruner), start=1):
                tell(_epoch_line(epoch), done, recipe.epochs)
            training.finish()
        report = pruner.finish()
        metrics = train.evaluate(model, *self.splits.test)
        lamina.save(model, self.out / PRUNED, {"name": request.name, "sparsity": f"{report.sparsity:.6f}"})
        return {
            "summary": f"{text.percent(report.sparsity, 1)} zeros, accuracy {text.percent(metrics.accuracy, 2)} "
            f"({text.percent(before.accuracy, 2)} if pruned at once, without training)",
            "metrics": asdict(metrics),
            "at_once": asdict(before),
            "sparsity": report.sparsity,
            "weights": [asdict(weight) for weight in report.weights],
            "history": [asdict(epoch) for epoch in training.history],
            "pruning_epochs": pruning_epochs,
            "best_epoch": training.best_epoch,
            "seconds": training.seconds,
        }

    def convert(self, tell: Callable[[str, int, int], None]) -> dict[str, Any]:
        request = self.request
        dense, pruned = self._dense_model(), self._model(self.out / PRUNED)
        # Decided on validation samples: the test samples only judge.
        inputs = self._inputs(self.splits.validation, BATCHES[0])
        fast = lamina.accelerate(pruned, inputs, _configs(request), compile=self.compile, progress=tell)
        path = self.out / COMPRESSED
        lamina.save(fast.model, path, {"name": request.name})
        metrics = train.evaluate(fast.model, *self.splits.test)
        times = []
        counts = machine.thread_counts()
        for batch in BATCHES:
            for count in counts:
                tell(f"timing batch {batch}", len(times), len(BATCHES) * len(counts))
                inputs = self._inputs(self.splits.test, batch)
                calls = {"eager": lambda x=inputs: dense(*x), "lamina": lambda x=inputs: fast.model(*x)}
                with timing.threads(count), torch.inference_mode():
                    found = timing.measure(calls, budget=TIMING_SECONDS)
                times.append({"batch": batch, "threads": count, **{name: asdict(t) for name, t in found.items()}})
        original = self.out / DENSE if self.checkpoint is None else Path(self.checkpoint)
        files = original.stat().st_size, path.stat().st_size
        memory = model_bytes(dense), model_bytes(fast.model)
        return {
            "summary": f"{fast.report.summary().partition(';')[0]}, accuracy {text.percent(metrics.accuracy, 2)}, "
            f"{text.size(memory[0])} -> {text.size(memory[1])} in memory",
            "metrics": asdict(metrics),
            "form": fast.report.form,
            "decisions": [asdict(decision) for decision in fast.report.decisions],
            "files": files,
            "memory": memory,
            "times": times,
            "machine": {"cpu": machine.cpu_name(), "isa": lamina.info()["isa"], "torch": torch.__version__},
        }

    # -- what the stages share

    def _dense_model(self) -> nn.Module:
        if self._dense is None:
            path = Path(self.checkpoint) if self.checkpoint else self.out / DENSE
            self._dense = train.load(self.request.name, path)[0]
        return self._dense

    def _model(self, path: Path) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            model = models.create(self.request.name).eval()
        lamina.load_(model, path)
        return model

    def _inputs(self, part: data.Images | data.Pairs, batch: int) -> tuple[Tensor, ...]:
        return train.task_of(self.splits).inputs(part.x[:batch], part.y[:batch])

    @contextmanager
    def _progress(self, title: str) -> Iterator[Callable[[str, int, int], None]]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
        )
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as display:
            task = display.add_task(title, total=None)
            yield lambda what, done, total: display.update(
                task, description=f"{title}: {what}", completed=done, total=total
            )


def _configs(request: Request) -> list[Config]:
    """What accelerate may choose from for each layer."""
    sparse: Config = Sparse(FLOAT_PATTERNS.get(request.pattern, "unstructured"))
    if request.int8 and request.pattern in INT8_PATTERNS:
        sparse = SparseInt8(request.pattern)
    int8 = [Int8Dynamic(), Int8RNN()] if request.int8 else []
    return [sparse, *int8, FusedAttention(), FusedRNN(), FusedConv()]


def _epoch_line(epoch: train.Epoch) -> str:
    return f"loss {epoch.loss:.3f}, validation accuracy {text.percent(epoch.validation_accuracy, 1)}"


def _load(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} can't be read: {error}; remove it to start anew") from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise FormatError(f'{path} is not of a compression (no "schema": "{SCHEMA}" in it)')
    if state.get("version") != VERSION:
        raise FormatError(f"{path} has version {state.get('version')}, this lamina reads {VERSION}")
    return state


def _difference(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    key = next(key for key in asked if found.get(key) != asked[key])
    return f"{key} {found.get(key)}, not {asked[key]}"
