"""results.json as one self-contained HTML page: no scripts, no network, light and dark, phone and desktop."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from lamina.bench import text
from lamina.bench.break_even import BreakEven, break_evens
from lamina.bench.reporting import plots, timeline
from lamina.bench.results import LAMINA, Measurement, Results
from lamina.bench.targets import Verdict

SHOWN_LOSSES = 12
# A plan's layers called one by one, among its times.
SWAPPED = f"{LAMINA} swapped"
# Plans that are drawn without being asked for.
DRAWN = (("lenet", 1), ("vit_mnist", 64), ("bert_base", 1))
# An op timed at fewer row counts than this is read better in its plain table.
MIN_GRID_COLUMNS = 3


def render(results: Results) -> str:
    """The page. Raises ImportError in one sentence without matplotlib or jinja2."""
    page = template("page.html.j2")
    view = View(results)
    return page(
        view=view,
        quality_plot=plots.quality_against_speed(view.kept),
        roofline_plot=plots.roofline(results.machine, view.threads, view.op_measurements),
    )


def template(name: str) -> Callable[..., str]:
    """Fills in a template of this folder, with the page's style sheet and the words for numbers of `lamina.bench.text`.

    What is handed over as `<something>_plot` is SVG, and so is what `timeline` gives; all other text is escaped. Raises
    ImportError in one sentence without matplotlib or jinja2.
    """
    require()
    import jinja2
    import markupsafe

    folder = resources.files("lamina.bench.reporting")
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
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
    environment.globals["timeline"] = lambda steps: markupsafe.Markup(timeline.draw(steps))
    css = markupsafe.Markup((folder / "page.css").read_text("utf-8"))

    def fill(**values: Any) -> str:
        pictures = {key: markupsafe.Markup(value) for key, value in values.items() if key.endswith("_plot")}
        return environment.get_template(name).render(css=css, **{**values, **pictures})

    return fill


def require() -> None:
    """Raises ImportError in one sentence without what pages are made with."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the report page needs {error.name}: pip install lamina[report]") from error


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
        self.op_measurements = [item for item in results.measurements if item.op not in ("model", "plan")]

    @property
    def plans(self) -> list[dict]:
        """The plans of whole models: how much of each is lamina's, how fast it is, what it looks like."""
        return [self._plan(section) for section in self.results.extra.get("plans", [])]

    @property
    def break_evens(self) -> list[BreakEven]:
        return break_evens(self.op_measurements)

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
    def floors(self) -> dict:
        """Every model, batch and thread count against all contenders and against its floor."""
        rows = []
        for model in self.models:
            for workload, label in model["batches"]:
                for count in self.counts:
                    item = self._find(workload, count)
                    if item is not None and item.candidate is not None:
                        rows.append(self._floor_row(model["title"], label, item))
        # Other calls of lamina's own first, beside it.
        contenders = list(dict.fromkeys(name for row in rows for name in row["item"].times if name != LAMINA))
        contenders.sort(key=lambda name: not name.startswith(LAMINA))
        failures = {
            f"{name}: {why}": None for row in rows for name, why in row["item"].failures.items()
        }  # in order, each once
        for row in rows:
            row["cells"] = [(row["item"].times.get(name), row["item"].speedup(name)) for name in contenders]
        return {"rows": rows, "contenders": contenders, "failures": list(failures)}

    @property
    def scale(self) -> float:
        """The speed-up that the longest bar stands for."""
        ratios = [bar["ratio"] for row in self.bars for bar in row["bars"] if bar["ratio"]]
        return max([1.5, *ratios]) * 1.02

    @property
    def verdicts(self) -> list[dict]:
        """The targets, one row each with a cell for every thread count."""
        rows: dict[str, dict] = {}
        for values in self.results.extra.get("targets", []):
            verdict = Verdict(**values)
            row = rows.setdefault(
                verdict.target,
                {"target": verdict.target, "bound": text.bound(verdict), "why": verdict.why, "cells": []},
            )
            row["cells"].append(
                {
                    "threads": text.thread_label(verdict.threads),
                    "verdict": verdict,
                    "kind": {"met": "win", "missed": "loss", "not judged": "open"}[verdict.status],
                    "value": text.metric(verdict, verdict.value),
                    "reach": text.reach(verdict) if verdict.total > 1 else "",
                    "where": (verdict.workload or "").partition("/")[2],
                }
            )
        return list(rows.values())

    @property
    def verdict_counts(self) -> str:
        """How many promises are kept. Example: "13 met, 5 missed, 4 not judged"."""
        found = Counter(values["status"] for values in self.results.extra.get("targets", []))
        return ", ".join(f"{found[status]} {status}" for status in ("met", "missed", "not judged") if found[status])

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
        """The single ops: for each a grid of row counts where it has them, and all measurements by model."""
        tables = []
        for op in dict.fromkeys(item.op for item in self.op_measurements):
            items = [item for item in self.op_measurements if item.op == op]
            contenders = list(dict.fromkeys(name for item in items for name in item.times if name != LAMINA))
            ratios = {
                name: [item.speedup(name) for item in items if item.threads == self.threads and name in item.times]
                for name in contenders
                if not name.startswith(LAMINA)
            }
            models = dict.fromkeys(item.workload.split("/")[1] for item in items)
            tables.append(
                {
                    "op": op,
                    "count": len({item.workload for item in items}),
                    "medians": {name: statistics.median(values) for name, values in ratios.items() if values},
                    "contenders": contenders,
                    "groups": [self._op_group(model, items, contenders) for model in models],
                    "grid": self._grid(items),
                }
            )
        return tables

    def _op_group(self, model: str, items: Sequence[Measurement], contenders: Sequence[str]) -> dict:
        """One model's measurements of one op: a row each workload, with cells for every thread count."""
        rows: dict[str, dict] = {}
        for item in items:
            if item.workload.split("/")[1] == model:
                row = rows.setdefault(item.workload, {"name": item.shape, "cells": []})
                row["cells"].append(self._op_cell(item, contenders))
        return {"model": model, "rows": list(rows.values())}

    def _op_cell(self, item: Measurement, contenders: Sequence[str]) -> dict:
        level = item.level(self.machine)
        return {
            "item": item,
            "peak": item.peak_fraction(self.machine),
            "reads": item.bandwidth_fraction(self.machine),
            "level": level,
            "ratios": [(name, item.speedup(name)) for name in contenders],
        }

    def _grid(self, items: Sequence[Measurement]) -> dict | None:
        """Layers against row counts M, for ops that have them: speed-up over the strongest rival, and share of peak."""
        chosen = [
            item for item in items if "M" in item.dims and item.threads == self.threads and item.candidate is not None
        ]
        rivals = Counter(name for item in chosen for name in item.rivals)
        # The strongest of those that nearly every workload was timed against.
        common = [name for name, count in rivals.items() if count > 0.8 * len(chosen)]
        if not common:
            return None
        rival = min(common, key=lambda name: statistics.median(i.speedup(name) for i in chosen if name in i.times))
        layers: dict[str, dict[int, dict]] = {}
        models: dict[str, dict[str, None]] = {}
        for item in chosen:
            if rival in item.times:
                layer = item.shape.partition("x")[2]
                models.setdefault(layer, {})[item.workload.split("/")[1]] = None
                layers.setdefault(layer, {})[item.dims["M"]] = {
                    "ratio": item.speedup(rival),
                    "share": self._share(item),
                    "sure": not item.doubt(rival),
                }
        full = {layer: cells for layer, cells in layers.items() if len(cells) > 1}
        columns = sorted({column for cells in full.values() for column in cells})
        if len(columns) < MIN_GRID_COLUMNS:
            return None
        rows = [
            {"layer": layer, "models": _join(list(models[layer])), "cells": [cells.get(column) for column in columns]}
            for layer, cells in full.items()
        ]
        return {"rival": rival, "columns": columns, "rows": rows}

    def _share(self, item: Measurement) -> str:
        """How near a measurement comes to what bounds it: compute or reading, whichever it comes nearer to."""
        peak, reads = item.peak_fraction(self.machine) or 0.0, item.bandwidth_fraction(self.machine) or 0.0
        return (
            f"{text.percent(peak)} of peak" if peak >= reads else f"{text.percent(reads)} of {item.level(self.machine)}"
        )

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
            "forms": [],  # results of earlier runs have none
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

    def _plan(self, section: Mapping[str, Any]) -> dict:
        item = self._find(section["workload"], self.threads)
        steps = section["steps"]
        return {
            **section,
            "label": _counted(section["batch"], section["unit"]),
            "item": item,
            "rivals": [
                (name, item.times[name].q50, item.speedup(name))
                for name in (item.times if item else ())
                if name not in (LAMINA, SWAPPED, "eager")
            ],
            "swapped": (item.times[SWAPPED].q50, item.speedup(SWAPPED)) if item and SWAPPED in item.times else None,
            "eager": (item.times["eager"].q50, item.speedup("eager")) if item and "eager" in item.times else None,
            "in_steps": sum(step["seconds"] for step in steps),
            "open": (section["name"], section["batch"]) in DRAWN,
            "kinds": timeline.shares(steps),
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

    def _floor_row(self, title: str, label: str, item: Measurement) -> dict:
        peak = self.machine.peak(item.precision, item.threads)
        return {
            "title": title,
            "label": label,
            "item": item,
            "threads": text.thread_label(item.threads),
            "floor": item.flops / peak if peak else None,
            "fraction": item.peak_fraction(self.machine),
        }


def _kind(item: Measurement) -> str:
    """How a measurement stands against eager: win, loss, even (nobody can tell apart), or open (nobody can say)."""
    ratio = item.speedup("eager")
    if ratio is None or item.doubt("eager"):
        return "open"
    return "even" if abs(ratio - 1) <= max(text.SAME, item.noise("eager")) else "win" if ratio > 1 else "loss"


def _batch_label(workload: str, unit: str) -> str:
    return _counted(int(workload.rpartition("/b")[2]), unit)


def _counted(count: int, unit: str) -> str:
    noun, *rest = unit.split(" ", 1)
    return " ".join([str(count), noun if count == 1 else f"{noun}s", *rest])


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
