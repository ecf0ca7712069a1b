"""What `make gpu` found as one self-contained HTML page, in the dress of the report's, and the file it is made from.

    python -m lamina.bench.reporting.gpu FOLDER --targets benchmarks/targets.toml

reads what the parts of a run left in FOLDER/parts (results of `lamina bench --device cuda --json`, the parts' outcomes
in parts.json, the tuning sweep's tuning.json) and writes FOLDER/results.json and FOLDER/index.html.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

from lamina.bench import machine, results, targets, text
from lamina.bench.reporting import page
from lamina.bench.results import LAMINA, Results

KINDS = {"met": "win", "missed": "loss", "not judged": "open"}


def render(found: Results) -> str:
    """The page. Raises ImportError in one sentence without matplotlib or jinja2."""
    return page.template("gpu.html.j2")(view=View(found))


class View:
    """What the template reads."""

    def __init__(self, found: Results) -> None:
        self.results = found
        self.gpu = found.machine.gpu

    @property
    def headline(self) -> str:
        """What happened, in one sentence with the real numbers."""
        where = f"on one {self.gpu.name}" if self.gpu else "on this machine"
        if not self.results.measurements:
            return f"Nothing was measured {where}."
        right = sum(item.gate.ok for item in self.results.measurements)
        sentence = f"{right} of {len(self.results.measurements)} workloads give right answers {where}"
        return f"{sentence}; of the promises {self.verdict_counts}." if self.verdict_counts else f"{sentence}."

    @property
    def parts(self) -> list[dict]:
        """What the run consisted of: name, outcome, seconds, budget, note."""
        kinds = {"done": "win", "left out": "open"}
        return [{**part, "kind": kinds.get(part["outcome"], "loss")} for part in self.results.extra.get("parts", [])]

    @property
    def trouble(self) -> list[dict]:
        return [part for part in self.parts if part["outcome"] != "done"]

    @property
    def wrong(self) -> dict[str, list[str]]:
        """Why answers were wrong, and of which workloads."""
        reasons: dict[str, list[str]] = {}
        for item in self.results.measurements:
            if not item.gate.ok:
                reasons.setdefault(item.gate.message, []).append(item.workload)
        return reasons

    @property
    def verdicts(self) -> list[dict]:
        rows = []
        for values in self.results.extra.get("targets", []):
            verdict = targets.Verdict(**values)
            rows.append(
                {
                    "verdict": verdict,
                    "bound": text.bound(verdict),
                    "kind": KINDS[verdict.status],
                    "value": text.metric(verdict, verdict.value),
                    "reach": text.reach(verdict) if verdict.total > 1 else "",
                    "where": (verdict.workload or "").partition("/")[2],
                }
            )
        return rows

    @property
    def verdict_counts(self) -> str:
        """How many promises are kept. Example: "9 met, 2 missed, 1 not judged"."""
        found = Counter(values["status"] for values in self.results.extra.get("targets", []))
        return ", ".join(f"{found[status]} {status}" for status in KINDS if found[status])

    @property
    def ops(self) -> list[dict]:
        """One table an op, one row a workload, one column a contender."""
        tables = []
        for op in dict.fromkeys(item.op for item in self.results.measurements):
            items = [item for item in self.results.measurements if item.op == op]
            names = dict.fromkeys(name for item in items for name in (*item.times, *item.failures))
            contenders = [name for name in names if name != LAMINA]
            failures = {f"{name} has no time: {why}": None for item in items for name, why in item.failures.items()}
            rows = [
                {
                    "item": item,
                    "peak": item.peak_fraction(self.results.machine),
                    "reads": item.bandwidth_fraction(self.results.machine) if item.gate.ok else None,
                    "cells": [
                        (
                            item.times[name].q50 if name in item.times else None,
                            item.speedup(name),
                            item.failures.get(name),
                        )
                        for name in contenders
                    ],
                }
                for item in items
            ]
            tables.append({"op": op, "contenders": contenders, "rows": rows, "failures": list(failures)})
        return tables

    @property
    def tuning(self) -> list[Mapping[str, Any]]:
        return self.results.extra.get("tuning", [])

    @property
    def machine_lines(self) -> list[tuple[str, str]]:
        return text.machine_lines(self.results.machine)


def gather(folder: Path, promised: Sequence[targets.Target]) -> Results:
    """One file out of what the parts of a run left behind; parts that left nothing are no trouble here."""
    found = [results.load(path) for path in sorted((folder / "parts").glob("bench-*.json"))]
    # Of a workload that was measured twice, the measurement with more contenders.
    best: dict[str, results.Measurement] = {}
    for item in (item for each in found for item in each.measurements):
        if item.workload not in best or len(item.times) > len(best[item.workload].times):
            best[item.workload] = item
    measurements = list(best.values())
    if found:
        here = reduce(machine.combine, (each.machine for each in found))
    else:
        here = machine.describe_without_probes()
    extra = {
        "parts": _json(folder / "parts" / "parts.json"),
        "tuning": _json(folder / "tuning.json"),
        "targets": [asdict(v) for v in targets.judge(promised, measurements, here)] if found else [],
    }
    return results.collect(here, measurements, **extra)


def _json(path: Path) -> list:
    return json.loads(path.read_text("utf-8")) if path.is_file() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """1 if an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--targets", type=Path)
    given = parser.parse_args(arguments)
    promised = targets.parse(given.targets) if given.targets else []
    found = gather(given.folder, [target for target in promised if target.device == "cuda"])
    found.save(given.folder / "results.json")
    (given.folder / "index.html").write_text(render(found), "utf-8")
    for row in View(found).verdicts:
        verdict = row["verdict"]
        print(f"{verdict.status:10} {verdict.target}: {row['value']} (promised {row['bound']}) {verdict.reason}")
    print(View(found).headline)
    return 1 if View(found).wrong else 0


if __name__ == "__main__":
    sys.exit(main())
