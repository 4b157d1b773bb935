"""Measure what docs/results.md shows, and write it with its data and pictures.

    make results
    python scripts/results.py --limit 500

Every number comes from a run of `python -m eval` in its own folder under --output_path. Finished
runs are not repeated.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.accuracy.command import parse_run
from eval.accuracy.compare import FinishedRun, describe_differences, paired_differences
from eval.accuracy.run_folder import expect_folder, make_folders
from eval.accuracy.run_results import RunResults
from eval.accuracy.sweep import (
    BUDGETS,
    Cell,
    CellResult,
    describe_cells,
    draw_scores,
    grid,
    run_cells,
)
from eval.json_files import write_json
from minivlm.app.cli import Parser
from minivlm.files import exists, expect_writable, write_whole

POLICIES = ("full", "avl", "h2o", "fastv", "streaming", "random")
QUESTION_TYPES = ("short", "long")

_VISION = "--vision_adaptive_attention --vision_adaptive_attention_rate 0.5"
_CORE = f"{_VISION} --vision_adaptive_attention_compute_rate"
_EVERY = "--vision_adaptive_attention_update_interval"
_TEXT = "--text_pruning_flag --text_init_cache 4"
_FILTER = "--prefill_filter_flag --prefill_filter_layer 3"
PARTS = {
    "vision 0.5, no core": _VISION,
    "core 0.6 every 3 steps": f"{_CORE} 0.6 {_EVERY} 3",
    "core 0.7 every 3 steps": f"{_CORE} 0.7 {_EVERY} 3",
    "core 0.9 every 3 steps": f"{_CORE} 0.9 {_EVERY} 3",
    "core 0.7 every 8 steps": f"{_CORE} 0.7 {_EVERY} 8",
    "text 0.5": _TEXT,
    "text 0.5, last row only": f"{_TEXT} --text_use_h2o false --compare_text_direct_pruning",
    "text 0.5, history": f"{_TEXT} --text_use_h2o false",
    "filter 0.5 after layer 3": _FILTER,
    "vision, core, text and filter": f"{_CORE} 0.7 {_EVERY} 3 {_TEXT} {_FILTER}",
}
_BENCHMARK = (
    "python scripts/benchmark.py --shape llava-v1.6-vicuna-7b --random_weights --vision_tokens 2880 --policy full avl"
)
_PAGE = """\
# Accuracy against KV bytes, measured

{what_ran}

Every figure has its standard error: two lines of a table must differ by well over both errors to
mean something. The last table has paired differences. The bundled model is tiny and its pages are
drawn, so this page shows how the parts behave and proves nothing about large models. Times are
those of this one run, eager, on a machine that may have been busy with other work;
[performance.md](performance.md) is about time.

## Policies at equal bytes

Each policy may hold a share of the prompt's KV bytes (`--kv_budget`). "failed" counts the questions
for which a budget was too small, since system and text tokens stay. Such lines are over fewer
questions and are not in the picture.
{policies}
## Score windows

`avl` scores image entries by the attention of the prompt's last token, as the paper does, or by the
mean over its last few tokens (`--vision_score_window`).
{windows}
## The parts of A-VL

Each part alone: vision at rate 0.5, its core at several compute rates and intervals, and text with
4 initial entries.
{parts}
## The paper's claims

| claim | command | measured here |
| --- | --- | --- |
{claims}
"""


def write_results(arguments: Sequence[str]) -> None:
    """Run what the page shows and write the page, its data and its pictures."""
    parser = Parser(__doc__)
    parser.flag("docs", type=Path, default=Path("docs"), metavar="DIR", help="folder to write to (docs)")
    args = parse_run(parser, arguments, limit=200, batch_size=8)
    expect_folder(args.docs)  # a mistake is better said before hours of work
    for file in filter(exists, (args.docs / "results.json", args.docs / "results.md")):
        expect_writable(file)
    planned = planned_sections()
    done = iter(run_cells([cell for cells in planned.values() for cell in cells], args))
    sections = {name: [next(done) for _ in cells] for name, cells in planned.items()}
    make_folders(args.docs)
    drawn = {name for name in ("policies", "windows") if draw_scores(sections[name], args.docs / f"{name}.png")}
    write_json(
        args.docs / "results.json",
        {name: [cell.to_dict() for cell in cells] for name, cells in sections.items()},
    )
    at_half = {
        cell.cell.name: FinishedRun.read(args.output_path / cell.folder)
        for cell in sections["policies"]
        if cell.results is not None
    }
    text = results_page(sections, drawn, at_half)
    write_whole(args.docs / "results.md", lambda scratch: scratch.write_text(text, encoding="utf-8"))
    print(args.docs / "results.md")


def planned_sections() -> dict[str, list[Cell]]:
    """The cells of each section of the page."""
    windows = grid(["avl"], BUDGETS)
    for window in (4, 16):
        windows += grid(["avl"], BUDGETS, ["--vision_score_window", str(window)], f", window {window}")
    parts = [Cell(name, name, flags.split()) for name, flags in PARTS.items()]
    return {"policies": grid(POLICIES, BUDGETS), "windows": windows, "parts": parts}


def results_page(
    sections: Mapping[str, Sequence[CellResult]],
    drawn: set[str],
    policy_runs: Mapping[str, FinishedRun],
) -> str:
    """The text of docs/results.md.

    `policy_runs` are the finished runs of the first section, by name.
    """
    full = sections["policies"][0].results
    assert full is not None, "the full cache meets every budget"
    task = next(iter(full.cost))
    texts = {}
    for name, cells in sections.items():
        picture = f"\n![{name}: accuracy against KV bytes]({name}.png)\n" if name in drawn else ""
        texts[name] = f"{picture}\n{describe_cells(cells, QUESTION_TYPES)}"
    claims = "\n".join(_claims(task, policy_runs))
    return _PAGE.format(what_ran=_what_ran(full, task), claims=claims, **texts)


def _what_ran(results: RunResults, task: str) -> str:
    """The first paragraph of the page."""
    settings = results.settings
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    text = (
        f"This page is written by `make results`; do not edit it. Model `{settings.model}`, "
        f"task `{task}` ({results.data[task]}), {results.results[task]['n']} questions, "
        f"batch size {settings.batch_size}, {settings.device}, dtype {settings.dtype}; {versions}."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def _claims(task: str, policy_runs: Mapping[str, FinishedRun]) -> list[str]:
    """The lines of the table of claims."""

    def difference(first: str, metric: str = "anls") -> str:
        """`avl` at half the bytes minus another run."""
        if not {first, "avl 50%"} <= policy_runs.keys():
            return "one of the two could not be run"
        return describe_differences(paired_differences(policy_runs[first], policy_runs["avl 50%"], task, metric))

    def at_half(*others: str) -> str:
        return " ".join(f"ANLS, `avl` minus `{name}` at half: {difference(f'{name} 50%')}." for name in others)

    on_large_models = (
        "python -m eval --model llava-hf/llava-v1.6-vicuna-7b-hf --tasks docvqa_val,textvqa_val,ocrbench "
        "--policy avl --kv_budget 0.5"
    )
    claims = [
        (
            "Near-lossless at half the KV cache",
            "`python -m eval --policy avl --kv_budget 0.5`",
            f"Against `full`: exact match {difference('full', 'exact_match')}; ANLS {difference('full')}.",
        ),
        (
            "Ahead of FastV and H2O at the same half",
            "`python -m eval sweep --policies avl fastv h2o --budgets 0.5`",
            at_half("fastv", "h2o"),
        ),
        (
            "(beyond the paper) ahead of random eviction",
            "`python -m eval sweep --policies avl random --budgets 0.5`",
            at_half("random"),
        ),
        (
            "The same on DocVQA, TextVQA and OCRBench with LLaVA-1.5 and 1.6",
            f"`{on_large_models}`",
            "Not measured here: this needs the 7B checkpoint, the data and a GPU.",
        ),
        ("The same on VQAv2, Nocaps and Flickr30k", "none", "These tasks are not supported."),
        (
            "KV cache of LLaVA-1.6-7B 1179 MB → 531 MB (45 %)",
            f"`{_BENCHMARK}`",
            "See the benchmark page.",
        ),
        (
            "Decoder 1.8 times faster at half the cache, latency 50.5 %",
            f"`{_BENCHMARK}`",
            "See the benchmark page.",
        ),
    ]
    return [f"| {claim} | {command} | {value} |" for claim, command, value in claims]
