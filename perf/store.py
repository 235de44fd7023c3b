"""Results on disk: one JSON file a GPU, written again after every case, a case on a line.

    gpu       its name
    runs      {id: {date, commit, command, versions, ceilings}}
    cases     {case id: {run, case, load, systems: {name: timing ...}, absent: {name: reason}}}
    broken    {case id: {system: reason}}: what ended a process, and is not run again
    host      {part: {run, ...}}, from `python -m perf host`

A case's latest measurement replaces its earlier one, with all its systems: what is compared was
measured together, in one process. Runs of which nothing is left are dropped.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perf.cases import Case

RESULTS = Path(__file__).with_name("results")
PARTS = ("runs", "cases", "broken", "host")


def path_of(gpu: str) -> Path:
    """perf/results/<gpu>.json, the GPU's name in lower case with dashes."""
    return RESULTS / f"{gpu.lower().replace(' ', '-')}.json"


class ResultFile:
    """The file's contents, and a run that is being added to them."""

    def __init__(self, path: Path, gpu: str, about: dict[str, Any]) -> None:
        self.path = path
        self.contents = load(path) if path.exists() else empty(gpu)
        if self.contents["gpu"] != gpu:
            raise ValueError(f"{path} must hold results of {gpu}, got {self.contents['gpu']}")
        self.run = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        self.commit = about["commit"]
        self.contents["runs"][self.run] = {"date": self.run, **about}

    def left(self, cases: Iterable[Case]) -> list[Case]:
        """Those that have not been measured at this run's commit; first those never measured."""
        runs, done = self.contents["runs"], self.contents["cases"]
        commits = {case_id: runs[record["run"]]["commit"] for case_id, record in done.items()}
        found = [case for case in cases if commits.get(case.id) != self.commit]
        return sorted(found, key=lambda case: case.id in done)

    def add_case(self, case_id: str, record: dict[str, Any]) -> None:
        self.contents["cases"][case_id] = {**record, "run": self.run}
        self.save()

    def add_broken(self, case_id: str, system: str, reason: str) -> None:
        self.contents["broken"].setdefault(case_id, {})[system] = reason
        self.save()

    def add_host(self, part: str, figures: dict[str, Any]) -> None:
        self.contents["host"][part] = {"run": self.run, **figures}
        self.save()

    def save(self) -> None:
        write(self.path, self.contents)


def empty(gpu: str) -> dict[str, Any]:
    return {"gpu": gpu, **{part: {} for part in PARTS}}


def load(path: Path) -> dict[str, Any]:
    """A results file. Raises ValueError where it is none."""
    contents = json.loads(path.read_text())
    if not isinstance(contents, dict) or not {"gpu", *PARTS} <= set(contents):
        raise ValueError(f"{path} must hold results, with 'gpu', {', '.join(map(repr, PARTS))}")
    return contents


def merge(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Both files' runs; of a case in both, the record of the later run."""
    if one["gpu"] != other["gpu"]:
        raise ValueError(f"results to merge must be of one GPU, got {one['gpu']}, {other['gpu']}")
    merged = {"gpu": one["gpu"], "runs": {**one["runs"], **other["runs"]}}
    merged["broken"] = {**one["broken"], **other["broken"]}
    for part in ("cases", "host"):
        merged[part] = dict(one[part])
        for name, record in other[part].items():
            if name not in merged[part] or merged[part][name]["run"] <= record["run"]:
                merged[part][name] = record
    return merged


def write(path: Path, contents: dict[str, Any]) -> None:
    """Replaces the file in one step, so that a run that is cut off leaves a whole one."""
    records = [*contents["cases"].values(), *contents["host"].values()]
    used = {record["run"] for record in records}
    runs = {name: run for name, run in sorted(contents["runs"].items()) if name in used}
    parts = [f'"gpu": {json.dumps(contents["gpu"])}']
    for part in PARTS:
        entries = runs if part == "runs" else contents[part]
        lines = (f" {json.dumps(name)}: {json.dumps(entries[name])}" for name in entries)
        parts.append(f'"{part}": {{\n' + ",\n".join(lines) + "\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    os.replace(fresh, path)
