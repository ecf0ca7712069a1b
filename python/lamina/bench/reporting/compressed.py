"""compress.json as one self-contained HTML page, in the dress of the report's."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lamina.bench import text
from lamina.bench.reporting import page, plots
from lamina.bench.timing import Timing, speedup


def render(state: Mapping[str, Any]) -> str:
    """The page of a finished compression. Raises ImportError in one sentence without matplotlib or jinja2."""
    fill = page.template("compressed.html.j2")
    stages = state["stages"]
    scan, tune = stages["scan"], stages["tune"]
    return fill(
        view=View(state),
        sensitivity_plot=plots.sensitivity(scan["layers"], scan["baseline"]),
        tuning_plot=plots.tuning(tune["history"], tune["pruning_epochs"], tune["best_epoch"], scan["baseline"]),
    )


def headline(state: Mapping[str, Any]) -> str:
    """What came of it, in one sentence with the real numbers."""
    return View(state).headline


class View:
    """What the template reads."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.request, self.created = state["request"], state["created"]
        self.train, self.scan, self.tune, self.convert = (
            state["stages"][name] for name in ("train", "scan", "tune", "convert")
        )
        self.machine = self.convert["machine"]
        self.threads = max(row["threads"] for row in self.convert["times"])

    @property
    def headline(self) -> str:
        batch = self.convert["times"][0]["batch"]
        ratio = next(bar["ratio"] for row in self.bars for bar in row["bars"] if row["batch"] == batch and bar["last"])
        before, after = self.convert["memory"]
        accuracy = [text.percent(stage["metrics"]["accuracy"], 2) for stage in (self.train, self.convert)]
        return (
            f"{self.request['name']} with {text.percent(self.tune['sparsity'])} of its weights zero"
            f"{' and int8' if self.request['int8'] else ''}: accuracy {' → '.join(accuracy)}, "
            f"{text.times(ratio)} as fast as eager PyTorch, {text.size(before)} → {text.size(after)} in memory."
        )

    @property
    def lead(self) -> str:
        lost = 100 * (self.train["metrics"]["accuracy"] - self.convert["metrics"]["accuracy"])
        change = f"{lost:.2f} points of accuracy lost" if lost > 0 else "No accuracy lost"
        return (
            f"{change} on samples that nothing was trained or chosen by. Pruned at once, without training, the model "
            f"would have {text.percent(self.tune['at_once']['accuracy'], 1)}."
        )

    @property
    def compiled(self) -> bool:
        """Whether what was timed ran as one graph."""
        return "compiled" in self.convert["form"]

    @property
    def versions(self) -> list[dict[str, Any]]:
        """The model before, between and after: metrics, and sizes where it has a file of its own to be compared."""
        files, memory = self.convert["files"], self.convert["memory"]
        tuned = f"{text.percent(self.tune['sparsity'], 1)} zeros in {self.request['pattern']} blocks, float32"
        if self.request["pattern"] in ("unstructured", "2:4"):
            tuned = f"{text.percent(self.tune['sparsity'], 1)} zeros, {self.request['pattern']}, float32"
        return [
            {
                "title": "dense",
                "what": "float32, as trained",
                "metrics": self.train["metrics"],
                "file": files[0],
                "memory": memory[0],
            },
            {"title": "pruned", "what": tuned, "metrics": self.tune["metrics"], "file": None, "memory": None},
            {
                "title": "compressed",
                "what": f"{len(self.replaced)} layers replaced{', compiled' if self.compiled else ''}",
                "metrics": self.convert["metrics"],
                "file": files[1],
                "memory": memory[1],
            },
        ]

    @property
    def bars(self) -> list[dict[str, Any]]:
        """Speed-up bars: a group for each batch size, a bar for each thread count."""
        groups: dict[int, list[dict[str, Any]]] = {}
        for row in self.convert["times"]:
            eager, fast = Timing(**row["eager"]), Timing(**row["lamina"])
            ratio = speedup(eager, fast)
            kind = "even" if abs(ratio - 1) <= text.SAME else "win" if ratio > 1 else "loss"
            groups.setdefault(row["batch"], []).append(
                {
                    "threads": row["threads"],
                    "last": row["threads"] == self.threads,
                    "ratio": ratio,
                    "kind": kind,
                    "eager": eager.q50,
                    "lamina": fast.q50,
                }
            )
        return [{"batch": batch, "bars": bars} for batch, bars in groups.items()]

    @property
    def counts(self) -> list[int]:
        return sorted({row["threads"] for row in self.convert["times"]})

    @property
    def scale(self) -> float:
        """The speed-up that the longest bar stands for."""
        return max(1.5, *(bar["ratio"] for row in self.bars for bar in row["bars"])) * 1.02

    @property
    def replaced(self) -> list[Mapping[str, Any]]:
        return [decision for decision in self.convert["decisions"] if decision["now"]]

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """Why layers were left alone, and how many."""
        return Counter(
            decision["reason"] for decision in self.convert["decisions"] if not decision["now"]
        ).most_common()

    @property
    def scanned(self) -> list[float]:
        return [share for share, _ in self.scan["layers"][0]["scores"]] if self.scan["layers"] else []
