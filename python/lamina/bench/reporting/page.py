"""results.json as one self-contained HTML page: no scripts, no network, light and dark, phone and desktop."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from lamina.bench import text
from lamina.bench.reporting import plots
from lamina.bench.results import LAMINA, Measurement, Results
from lamina.bench.targets import Verdict

SHOWN_LOSSES = 12


def render(results: Results) -> str:
    """The page. Raises ImportError in one sentence without matplotlib or jinja2."""
    try:
        import jinja2
        import markupsafe
        import matplotlib  # noqa: F401  the plots need it; asked for here so that the sentence below covers it
    except ImportError as error:
        raise ImportError(f"the report page needs {error.name}: pip install lamina[report]") from error
    folder = resources.files("lamina.bench.reporting")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "duration": text.duration,
        "percent": text.percent,
        "rate": text.rate,
        "size": text.size,
        "times": text.times,
        "traffic": text.traffic,
    }
    environment.globals["same"] = text.SAME
    template = environment.from_string((folder / "page.html.j2").read_text("utf-8"))
    view = View(results)
    return template.render(
        view=view,
        css=markupsafe.Markup((folder / "page.css").read_text("utf-8")),
        quality_plot=markupsafe.Markup(plots.quality_against_speed(view.kept)),
        roofline_plot=markupsafe.Markup(plots.roofline(results.machine, view.threads, view.op_measurements)),
    )


def headline(results: Results) -> str:
    """What happened, in one sentence with the real numbers."""
    view = View(results)
    fast = [(model["title"], model["speedup"]) for model in view.models if model["kind"] == "win"]
    slow = [(model["title"], model["speedup"]) for model in view.models if model["kind"] == "loss"]
    wrong = [model["title"] for model in view.models if model["speedup"] is None]
    where = f"on {text.thread_label(view.threads)} of this CPU"
    if fast:
        best, *rest = [f"{title} {{}}{ratio:.1f}x" for title, ratio in sorted(fast, key=lambda pair: -pair[1])]
        speeds = _join([best.format("runs "), *(other.format("") for other in rest)])
        sentence = f"{speeds} as fast as in eager PyTorch {where}"
    else:
        sentence = f"No model became faster than in eager PyTorch {where}"
    if slow:
        sentence += "; " + _join([f"{title} became slower ({ratio:.2f}x)" for title, ratio in slow])
    if wrong:
        sentence += f"; {_join(wrong)} gave wrong answers"
    return sentence + "."


class View:
    """What the template reads: the results turned round, so that the template itself decides nothing."""

    def __init__(self, results: Results):
        self.results = results
        self.machine = results.machine
        # Where most times on all threads were taken while a core was missing, one thread makes the headlines.
        busy = [not item.scales for item in results.measurements if item.threads == self.machine.threads]
        self.threads = 1 if sum(busy) > len(busy) / 2 else self.machine.threads
        self.counts = sorted({item.threads for item in results.measurements} | {1, self.machine.threads})
        self._by_key = {item.key: item for item in results.measurements}
        models = [self._model(section) for section in results.extra.get("models", [])]
        self.models = sorted(models, key=lambda model: -(model["speedup"] or 0.0))
        self.op_measurements = [item for item in results.measurements if item.op != "model"]

    @property
    def headline(self) -> str:
        return headline(self.results)

    @property
    def lead(self) -> str:
        """What became of the answers, and what was left alone."""
        sentences = []
        classifiers = [model for model in self.models if model["quality"]["metric"] == "accuracy"]
        if classifiers:
            change, worst = min(
                (model["quality"]["after"] - model["quality"]["before"], model["title"]) for model in classifiers
            )
            sentences.append(
                f"No classifier lost accuracy on {classifiers[0]['quality']['note'].partition(';')[0]}."
                if change >= 0
                else f"The largest loss of accuracy is {-100 * change:.2f} points ({worst})."
            )
        for model in self.models:
            if model["ranking"]:
                ranking = model["ranking"]
                same, asked = ranking["same_best"], len(ranking["queries"])
                sentences.append(
                    f"{model['title']} finds the same best {ranking['best']} of {len(ranking['sentences'])} sentences "
                    f"for {'each' if same == asked else same} of {asked} questions."
                )
        unmoved = [model["title"] for model in self.models if model["kind"] == "even"]
        if unmoved:
            sentences.append(f"{_join(unmoved)} {'run' if len(unmoved) > 1 else 'runs'} as before: see why below.")
        unsteady = [model["title"] for model in self.models if model["kind"] == "open" and model["speedup"]]
        if unsteady:
            sentences.append(f"The machine was too busy to tell for {_join(unsteady)}.")
        return " ".join(sentences)

    @property
    def kept(self) -> list[plots.Kept]:
        """The arrows of the quality plot."""
        return [
            plots.Kept(
                model["title"],
                model["speedup"],
                model["quality"]["before"],
                model["quality"]["after"],
                model["torch_int8_speedup"],
                model["quality"]["torch_int8"],
            )
            for model in self.models
            if model["speedup"] is not None
        ]

    @property
    def bars(self) -> list[dict]:
        """Speed-up bars: one group a model and batch size, one bar a thread count."""
        rows = []
        for model in self.models:
            for workload, label in model["batches"]:
                bars = []
                for count in self.counts:
                    item = self._find(workload, count)
                    if item is not None:
                        bars.append(self._bar(item, count))
                rows.append({"title": model["title"], "label": label, "bars": bars})
        return rows

    @property
    def scale(self) -> float:
        """The speed-up that the longest bar stands for."""
        ratios = [bar["ratio"] for row in self.bars for bar in row["bars"] if bar["ratio"]]
        return max([1.5, *ratios]) * 1.02

    @property
    def verdicts(self) -> list[dict]:
        """The targets, in the words of the page."""
        rows = []
        for values in self.results.extra.get("targets", []):
            verdict = Verdict(**values)
            rows.append(
                {
                    "verdict": verdict,
                    "kind": {"met": "win", "missed": "loss", "not judged": "open"}[verdict.status],
                    "threads": text.thread_label(verdict.threads),
                    "value": text.metric(verdict, verdict.value),
                    "bound": text.bound(verdict),
                    "reach": text.reach(verdict),
                }
            )
        return rows

    @property
    def losses(self) -> list[dict]:
        """Every contender that beat lamina by more than the noise, the worst first."""
        rows = []
        for item in self._trusted:
            for name in item.rivals:
                ratio = item.speedup(name)
                if ratio < 1 - max(text.SAME, item.noise(name)):
                    rows.append({"item": item, "contender": name, "ratio": ratio})
        return sorted(rows, key=lambda row: row["ratio"])

    @property
    def shown_losses(self) -> list[dict]:
        return self.losses[:SHOWN_LOSSES]

    @property
    def loss_counts(self) -> list[dict]:
        """For each contender: in how many measurements it beat lamina, of how many."""
        met = Counter(name for item in self._trusted for name in item.rivals)
        lost = Counter(row["contender"] for row in self.losses)
        return [{"contender": name, "lost": lost[name], "total": total} for name, total in met.items()]

    @property
    def wrong(self) -> list[tuple[str, list[str]]]:
        """Why answers were wrong, and of which workloads; those have no times."""
        reasons: dict[str, list[str]] = {}
        for item in self.results.measurements:
            known = reasons.setdefault(item.gate.message, []) if not item.gate.ok else [item.workload]
            if item.workload not in known:
                known.append(item.workload)
        return list(reasons.items())

    @property
    def ops(self) -> list[dict]:
        """The single ops: one table each, a row for every workload and thread count."""
        tables = []
        for op in dict.fromkeys(item.op for item in self.op_measurements):
            items = [item for item in self.op_measurements if item.op == op]
            contenders = list(dict.fromkeys(name for item in items for name in item.times if name != LAMINA))
            ratios = {
                name: [item.speedup(name) for item in items if item.threads == self.threads and name in item.times]
                for name in contenders
            }
            tables.append(
                {
                    "op": op,
                    "rows": [self._op_row(item, contenders) for item in items],
                    "contenders": contenders,
                    "medians": {name: statistics.median(values) for name, values in ratios.items() if values},
                }
            )
        return tables

    @property
    def machine_lines(self) -> list[tuple[str, str]]:
        return text.machine_lines(self.machine)

    @property
    def _trusted(self) -> list[Measurement]:
        # Where threads wait for a core, what is timed on several of them is the scheduler.
        return [item for item in self.results.measurements if item.scales]

    @property
    def busy(self) -> list[Measurement]:
        """Measurements during which something else had one of the cores."""
        return [item for item in self.results.measurements if not item.scales]

    def _find(self, workload: str, threads: int) -> Measurement | None:
        return self._by_key.get((workload, threads, "warm"))

    def _model(self, section: Mapping[str, Any]) -> dict:
        main = self._find(section["main"], self.threads)
        eager = main.times.get("eager") if main else None
        replaced = [decision for decision in section["decisions"] if decision["now"]]
        kept = [decision for decision in section["decisions"] if not decision["now"]]
        batches = [
            (workload, _batch_label(workload, section["unit"])) for workload in (section["main"], *section["others"])
        ]
        return {
            **section,
            "batches": batches,
            "batch": batches[0][1],
            "eager": eager.q50 if eager else None,
            "lamina": main.candidate.q50 if main and main.candidate else None,
            "speedup": main.speedup("eager") if main else None,
            "kind": _kind(main) if main else "open",
            "speedups": [
                (text.thread_label(count), item.speedup("eager"))
                for count in self.counts
                if (item := self._find(section["main"], count)) is not None
            ],
            "torch_int8_speedup": eager.q50 / main.times["quantize_dynamic"].q50
            if eager and "quantize_dynamic" in main.times
            else None,
            "peak": main.peak_fraction(self.machine) if main else None,
            "precision": main.precision if main else "",
            "rate": main.rate() if main else None,
            "gate": main.gate if main else None,
            "replaced": replaced,
            "kept": kept,
            "reasons": Counter(decision["reason"] for decision in kept).most_common(),
            "smaller": 1 - section["bytes_after"] / section["bytes_before"] if section["bytes_before"] else 0.0,
            "questions": self._questions(section["ranking"]),
        }

    def _questions(self, ranking: Mapping[str, Any] | None) -> list[dict]:
        if not ranking:
            return []
        questions = []
        for asked in ranking["queries"]:
            places = {sentence: place for place, sentence in enumerate(asked["order_before"], start=1)}
            matches = [
                {
                    "place": place,
                    "sentence": ranking["sentences"][sentence],
                    "score": asked["scores_after"][sentence],
                    "score_before": asked["scores_before"][sentence],
                    "place_before": places[sentence],
                }
                for place, sentence in enumerate(asked["order_after"][: ranking["best"]], start=1)
            ]
            questions.append(
                {
                    "query": asked["query"],
                    "matches": matches,
                    "same_best": set(asked["order_before"][: ranking["best"]])
                    == set(asked["order_after"][: ranking["best"]]),
                }
            )
        return questions

    def _bar(self, item: Measurement, count: int) -> dict:
        ratio = item.speedup("eager")
        eager = item.times.get("eager")
        return {
            "threads": text.thread_label(count),
            "ratio": ratio,
            "kind": _kind(item),
            "noise": item.noise("eager") if ratio else None,
            "eager": eager.q50 if eager else None,
            "lamina": item.candidate.q50 if item.candidate else None,
            "gate": item.gate,
        }

    def _op_row(self, item: Measurement, contenders: Sequence[str]) -> dict:
        return {
            "item": item,
            "name": item.workload.partition("/")[2],
            "peak": item.peak_fraction(self.machine),
            "ratios": [(name, item.speedup(name)) for name in contenders],
        }


def _kind(item: Measurement) -> str:
    """How a measurement stands against eager: win, loss, even (nobody can tell apart), or open (nobody can say)."""
    ratio = item.speedup("eager")
    if ratio is None or item.doubt("eager"):
        return "open"
    return "even" if abs(ratio - 1) <= max(text.SAME, item.noise("eager")) else "win" if ratio > 1 else "loss"


def _batch_label(workload: str, unit: str) -> str:
    count = int(workload.rpartition("/b")[2])
    return f"{count} {unit}" + ("" if count == 1 else "s")


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
