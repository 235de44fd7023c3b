"""The pages that people read: their Python runs, their links lead somewhere, commands exist.

A page's Python snippets run one after another, in one namespace, on the CPU: "cuda" is read as
"cpu". What a page does not make itself, `prepared` does. A snippet that needs a GPU is marked in
its info string: ```python no-run.
"""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import cutlass_moe as cm
from emitters.spec import epilogue, gemm

ROOT = Path(__file__).parents[1]
FOLDERS = ("cutlass_moe", "emitters", "tests", "perf")
READMES = [ROOT / "README.md", *(p for f in FOLDERS for p in sorted((ROOT / f).rglob("README.md")))]
OTHERS = (ROOT / "CHANGELOG.md", ROOT / ".github" / "CONTRIBUTING.md", ROOT / "perf/EXPERIMENTS.md")
PAGES = READMES + [page for page in OTHERS if page.exists()]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
NEEDS_DSL = re.compile(r"^\s*(import|from) cutlass[.\s]", re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


class Block(NamedTuple):
    """A fenced part of a page. line: its first one's number."""

    info: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(found[1].strip(), found[2], text.count("\n", 0, found.start(2)) + 1)
        for found in FENCE.finditer(text)
    ]


def prepared() -> dict[str, Any]:
    """What snippets speak of: 16 tokens of 64 values, 8 experts of 32, two for each token."""
    torch.manual_seed(0)
    tokens, experts, hidden_size, inter, top_k = 16, 8, 64, 32, 2
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    hidden = torch.randn(tokens, hidden_size, dtype=bf16)
    w13 = torch.randn(experts, 2 * inter, hidden_size, dtype=bf16) / 8
    logits = torch.randn(tokens, experts, dtype=bf16)
    topk_weights, topk_ids = cm.topk_router(logits, k=top_k)
    masked, most = torch.randn(experts, 4, hidden_size, dtype=bf16), 4
    xs, xs_scale = cm.quantize_per_token(masked.flatten(0, 1), fp8)
    return {
        "hidden": hidden,
        "w": w13,
        "w13": w13,
        "w2": torch.randn(experts, hidden_size, inter, dtype=bf16) / 8,
        "router": torch.nn.Linear(hidden_size, experts, dtype=bf16).requires_grad_(False),
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
        "w13_blocks": torch.zeros((experts, 2 * inter, hidden_size // 32, 16), dtype=torch.uint8),
        "w13_scales": torch.full((experts, 2 * inter, hidden_size // 32), 120, dtype=torch.uint8),
        # of other libraries' functions
        "a": hidden,
        "b": w13.transpose(1, 2).contiguous(),
        "batch_sizes": torch.tensor([2] * experts),
        "d": torch.empty(tokens, 2 * inter, dtype=bf16),
        "m_indices": torch.arange(tokens, dtype=torch.int32) // 2,
        "xs": xs.view(experts, most, hidden_size),
        "xs_scale": xs_scale.view(experts, most),
        "ds": torch.empty(experts, most, 2 * inter, dtype=bf16),
        "masked_m": torch.tensor([0, 1, 2, 3, 4, 3, 2, 1], dtype=torch.int32),
        "expected_m": 2,
    }


def is_python(block: Block) -> bool:
    return block.info.split()[:1] == ["python"]


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(map(is_python, blocks(page)))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_snippets_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = dict(epilogue.NODES)  # a snippet may add to them
    for module in (epilogue, gemm):
        monkeypatch.setattr(module, "NODES", nodes)
    names = {"__name__": "snippets", **prepared()}
    skipped = ""
    for block in filter(is_python, blocks(page)):
        if "no-run" in block.info:
            continue
        if NEEDS_DSL.search(block.text):
            skipped = without_dsl(monkeypatch)
            if skipped:
                continue
        source = "\n" * (block.line - 1) + block.text.replace('"cuda"', '"cpu"')
        code = compile(source, str(page), "exec", dont_inherit=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the slow path
            exec(code, names)
    if skipped:
        pytest.skip(skipped)


def without_dsl(monkeypatch: pytest.MonkeyPatch) -> str:
    """Why snippets that import the DSL can't run; else empty, and nodes that they add are removed
    later."""
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")  # read when cutlass is imported
    try:
        from emitters.device.epilogue import nodes
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cutlass":
            raise
        return "all but the snippets that need nvidia-cutlass-dsl"
    monkeypatch.setattr(nodes, "NODES", dict(nodes.NODES))
    return ""


def test_few_snippets_are_not_run() -> None:
    marked = [b for page in PAGES for b in blocks(page) if is_python(b) and "no-run" in b.info]
    assert len(marked) <= 2


# Links


def slug(heading: str) -> str:
    """Of a heading's anchor, as GitHub makes it."""
    words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def without_code(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    return {slug(h) for h in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)}


@each_page
def test_links_lead_to_files(page: Path) -> None:
    text = without_code(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):  # another site's
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        inside = file.is_relative_to(ROOT) and file.exists()
        if not inside or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


# Commands


def command_lines(page: Path) -> Iterator[str]:
    """Of code blocks that are no Python, and of code within lines."""
    for block in blocks(page):
        if not is_python(block):
            yield from block.text.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


@each_page
def test_commands_exist(page: Path) -> None:
    click = pytest.importorskip("click", reason="needs click")
    pytest.importorskip("rich", reason="needs rich")
    from cutlass_moe.cli.main import main

    for line in command_lines(page):
        one = line.replace("\\|", " ")  # in tables
        for call in re.findall(r"(?:^|[\s/])cutlass-moe ([a-z][^#&|;]*)", one):
            name, *arguments = shlex.split(re.sub(r"[][]", " ", call))
            command = main.commands.get(name)
            assert isinstance(command, click.Command), f"{name}, in: {line}"
            known = {option for param in command.params for option in param.opts} | {"--help"}
            options = {a.partition("=")[0] for a in arguments if a.startswith("--")}
            assert options <= known, f"{options - known}, in: {line}"
