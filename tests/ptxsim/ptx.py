"""From PTX text to a list of instructions: scopes, labels, registers and source lines resolved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


class Fault(Exception):
    """A defect of the simulated kernel: what happened, and where once the machine knows."""


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int
    size: int


@dataclass
class Instruction:
    """opcode with its modifiers, operands as written (names of inner scopes made unique)."""

    opcode: str
    operands: list[str]
    guard: str | None  # predicate register, None: always
    negated: bool
    line: int  # of the PTX, from 1
    source: str  # the Python line, "file.py:12", or ""
    text: str
    target: int = -1  # of a branch: index of an instruction

    def where(self) -> str:
        return f"PTX line {self.line}{' (' + self.source + ')' if self.source else ''}: {self.text}"


@dataclass
class Program:
    parameters: list[Parameter]
    threads: int
    cluster: int | None  # CTAs, where the PTX says so
    instructions: list[Instruction]
    registers: dict[str, int]  # name -> number
    kinds: list[np.dtype]  # by number
    labels: set[int] = field(default_factory=set)  # instructions that some branch goes to

    @property
    def parameter_bytes(self) -> int:
        last = self.parameters[-1]
        return last.offset + last.size


_KINDS = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "f32": np.uint32}
_KINDS |= {"b64": np.uint64, "f64": np.uint64}
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr(?:\s+\.\w+(?:\s+\d+)?)*\s+)?([A-Za-z_$][\w$]*)(\[\d+\])?"
)
_BRACE, _BLANK = re.compile(r"[{}]"), re.compile(r"\s*")
_NAME = re.compile(r"%?[A-Za-z_$][\w$.]*(?:<\d+>)?")
_LABEL = re.compile(r"([A-Za-z_$][\w$]*)\s*:(?!:)")
_SIZES = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "s32": 4, "b8": 1}


def parse(text: str) -> Program:
    """Raises ValueError, with the line, for PTX that this parser does not know."""
    text = re.sub(r"//[^\n]*", "", text)
    start = text.index(".entry")
    opening = text.index("{", start)
    head = text[start:opening]
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    threads = re.search(r"\.reqntid\s+(\d+)", head)
    if threads is None:
        raise ValueError("an entry without .reqntid")
    cluster = re.search(r"\.reqnctapercluster\s+(\d+)", head)
    body = _Body(text, opening + 1, _closing(text, opening), files)
    for line, statement, source in body.statements():
        body.instruction(line, statement, source)
    body.resolve()
    return Program(
        _parameters(head),
        int(threads[1]),
        int(cluster[1]) if cluster else None,
        body.instructions,
        body.registers,
        body.kinds,
        body.targets,
    )


def _closing(text: str, opening: int) -> int:
    """Where the brace that opens at `opening` closes."""
    depth = 1
    for brace in _BRACE.finditer(text, opening + 1):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return brace.start()
    raise ValueError("a brace that nothing closes")


def _parameters(head: str) -> list[Parameter]:
    found: list[Parameter] = []
    offset = 0
    for align, kind, name, count in _PARAMETER.findall(head):
        size = _SIZES[kind] * (int(count[1:-1]) if count else 1)
        step = max(int(align or 0), _SIZES[kind])
        offset = -(-offset // step) * step
        found.append(Parameter(name, offset, size))
        offset += size
    return found


class _Body:
    """Walks a kernel's statements; `{ }` around statements open a scope of names."""

    def __init__(self, text: str, start: int, end: int, files: dict[str, str]):
        self.text, self.at, self.end = text, start, end
        self.files = {number: name.rsplit("/", 1)[-1] for number, name in files.items()}
        self.scopes: list[dict[str, str]] = [{}]
        self.scope_count = 0
        self.instructions: list[Instruction] = []
        self.registers: dict[str, int] = {}
        self.kinds: list[np.dtype] = []
        self.labels: dict[str, int] = {}
        self.targets: set[int] = set()

    def statements(self) -> Iterator[tuple[int, str, str]]:
        source, line, before = "", 1, 0
        while True:
            blank = _BLANK.match(self.text, self.at)
            assert blank is not None
            self.at = blank.end()
            if self.at >= self.end:
                return
            line, before = line + self.text.count("\n", before, self.at), self.at
            label = _LABEL.match(self.text, self.at)
            if self.text[self.at] == "{":
                self._open()
            elif self.text[self.at] == "}":
                self.scopes.pop()
                self.at += 1
            elif label:
                self.labels[self._resolved(label[1])] = len(self.instructions)
                self.at = label.end()
            elif self.text.startswith(".loc", self.at):
                words = self._until("\n").split()
                if words[1] in self.files:
                    source = f"{self.files[words[1]]}:{words[2]}"
            else:
                statement = self._until(";").strip()
                if statement.startswith(".reg"):
                    self._declare(statement)
                elif not statement.startswith(".pragma"):
                    yield line, statement, source

    def _until(self, mark: str) -> str:
        stop = self.text.index(mark, self.at)
        taken, self.at = self.text[self.at : stop], stop + 1
        return taken

    def _open(self) -> None:
        """Names declared inside are renamed, also where they are used before their label."""
        self.at += 1
        inside = self.text[self.at : _closing(self.text, self.at - 1)]
        names = {
            name
            for line in re.findall(r"\.reg\s+\.\w+\s+([^;]*);", inside)
            for name in line.split(",")
        }
        names |= set(re.findall(r"(?:^|[;{}\n])\s*([A-Za-z_$][\w$]*)\s*:(?!:)", inside))
        self.scope_count += 1
        own = {name.strip(): f"{name.strip()}.{self.scope_count}" for name in names}
        self.scopes.append({**self.scopes[-1], **own})

    def _resolved(self, name: str) -> str:
        return self.scopes[-1].get(name, name)

    def _declare(self, statement: str) -> None:
        _, kind, names = statement.split(None, 2)
        if kind[1:] not in _KINDS:
            raise ValueError(f"registers of {kind}")
        for name in names.split(","):
            many = re.fullmatch(r"(\S+)<(\d+)>", name.strip())
            if many:
                for i in range(int(many[2])):
                    self._register(f"{many[1]}{i}", kind[1:])
            else:
                self._register(self._resolved(name.strip()), kind[1:])

    def _register(self, name: str, kind: str) -> None:
        self.registers[name] = len(self.kinds)
        self.kinds.append(np.dtype(_KINDS[kind]))

    def instruction(self, line: int, statement: str, source: str) -> None:
        text = " ".join(statement.split())
        rest, guard, negated = text, None, False
        if rest.startswith("@"):
            word, rest = rest.split(None, 1)
            guard, negated = self._resolved(word.lstrip("@!")), word.startswith("@!")
        opcode, _, operands = rest.partition(" ")
        split = [
            _NAME.sub(lambda m: self._resolved(m[0]), word) for word in split_operands(operands)
        ]
        self.instructions.append(Instruction(opcode, split, guard, negated, line, source, text))

    def resolve(self) -> None:
        for one in self.instructions:
            if one.opcode in ("bra", "bra.uni"):
                if one.operands[0] not in self.labels:
                    raise ValueError(f"line {one.line}: no label {one.operands[0]}")
                one.target = self.labels[one.operands[0]]
                self.targets.add(one.target)


def split_operands(text: str) -> list[str]:
    """At the commas outside brackets and braces."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "[{") - (c in "]}")
        if c == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    return [*parts, current.strip()] if current.strip() else parts
