"""Results on disk: one JSON file a GPU, written again after every case.

    runs      {id: {date, commit, command, versions, ceilings}}
    cases     {case id: {run, case, workload, systems: {name: timing ...}, absent: {name: reason}}}
    host      {part: {run, ...}}, from `python -m perf host`

A case's latest measurement replaces its earlier one, with all its systems, so that what is
compared was measured together. Runs of which nothing is left are dropped.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def default_path(gpu: str) -> Path:
    """perf/results/<gpu>.json, the GPU's name in lower case with dashes."""
    return RESULTS / f"{gpu.lower().replace(' ', '-')}.json"


class ResultFile:
    """The file's contents, and a run that is being added to them."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.contents = load(path) if path.exists() else {"runs": {}, "cases": {}}
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.run = date
        self.contents["runs"][date] = {"date": date, **about}

    def add_case(self, case_id: str, record: dict[str, Any]) -> None:
        self.contents["cases"][case_id] = {"run": self.run, **record}
        self.save()

    def add_host(self, part: str, figures: dict[str, Any]) -> None:
        self.contents.setdefault("host", {})[part] = {"run": self.run, **figures}
        self.save()

    def save(self) -> None:
        """Replaces the file in one step, so that a run that is cut off leaves a whole one."""
        records = [*self.contents["cases"].values(), *self.contents.get("host", {}).values()]
        used = {record["run"] for record in records}
        runs = self.contents["runs"]
        self.contents["runs"] = {name: run for name, run in runs.items() if name in used}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.contents, indent=1) + "\n")
        os.replace(fresh, self.path)


def load(path: Path) -> dict[str, Any]:
    """A results file. Raises ValueError where it is none."""
    contents = json.loads(path.read_text())
    if not isinstance(contents, dict) or not {"runs", "cases"} <= set(contents):
        raise ValueError(f"{path} must hold results, with 'runs' and 'cases'")
    return contents
