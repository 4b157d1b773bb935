"""Measure what the docs show of accuracy, and write it: docs/results.md, docs/results.json and the pictures.

    make results
    python scripts/results.py --limit 500

Every number is a run of `python -m eval` in its own folder under --output_path; what is there is not run again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.accuracy.command import add_arguments, parse
from eval.accuracy.compare import Finished, differences, in_words
from eval.accuracy.results import write_json
from eval.accuracy.sweep import BUDGETS, describe, draw, grid, run_cells
from minivlm.app import cli
from minivlm.files import write_whole

POLICIES = ("full", "avl", "h2o", "fastv", "streaming", "random")
KINDS = ("short", "long")
WINDOWS = grid(["avl"], BUDGETS) + [
    cell
    for window in (4, 16)
    for cell in grid(["avl"], BUDGETS, ["--vision_score_window", str(window)], f", window {window}")
]
HALF = "--vision_adaptive_attention --vision_adaptive_attention_rate 0.5"
CORE = f"{HALF} --vision_adaptive_attention_compute_rate"
TEXT = "--text_pruning_flag --text_init_cache 4"
FILTER = "--prefill_filter_flag --prefill_filter_layer 3"
PARTS = [
    {"name": name, "line": name, "flags": flags.split()}
    for name, flags in (
        ("vision 0.5, no core", HALF),
        ("core 0.6 every 3 steps", f"{CORE} 0.6 --vision_adaptive_attention_update_interval 3"),
        ("core 0.7 every 3 steps", f"{CORE} 0.7 --vision_adaptive_attention_update_interval 3"),
        ("core 0.9 every 3 steps", f"{CORE} 0.9 --vision_adaptive_attention_update_interval 3"),
        ("core 0.7 every 8 steps", f"{CORE} 0.7 --vision_adaptive_attention_update_interval 8"),
        ("text 0.5", TEXT),
        ("text 0.5, last row only", f"{TEXT} --text_use_h2o false --compare_text_direct_pruning"),
        ("text 0.5, history", f"{TEXT} --text_use_h2o false"),
        ("filter 0.5 after layer 3", FILTER),
        ("vision, core, text and filter", f"{CORE} 0.7 --vision_adaptive_attention_update_interval 3 {TEXT} {FILTER}"),
    )
]
BENCHMARK = (
    "`python scripts/benchmark.py --shape llava-v1.6-vicuna-7b --random_weights --vision_tokens 2880 --policy full avl`"
)


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(__doc__)
    add_arguments(parser)
    parser.flag("docs", type=Path, default=Path("docs"), metavar="DIR", help="what is written (docs)")
    parser.set_defaults(limit=200, batch_size=8)
    args = parse(arguments, parser)
    asked = {"policies": grid(POLICIES, BUDGETS), "windows": WINDOWS, "parts": PARTS}
    done = iter(run_cells([cell for cells in asked.values() for cell in cells], args))
    sections = {name: [next(done) for _ in cells] for name, cells in asked.items()}
    args.docs.mkdir(parents=True, exist_ok=True)
    pictures = {name: draw(sections[name], args.docs / f"{name}.png") for name in ("policies", "windows")}
    write_json(args.docs / "results.json", sections)
    text = page(sections, pictures, args.output_path)
    write_whole(args.docs / "results.md", lambda scratch: scratch.write_text(text, encoding="utf-8"))
    print(args.docs / "results.md")


def page(sections: dict[str, list[dict]], pictures: dict[str, bool], output: Path) -> str:
    """The page of the docs, whole."""
    full = sections["policies"][0]
    task = next(iter(full["cost"]))
    runs = {cell["name"]: Finished.read(output / cell["folder"]) for cell in sections["policies"] if "folder" in cell}

    def picture(name: str) -> str:
        return f"\n![{name}: accuracy against KV bytes]({name}.png)\n" if pictures[name] else ""

    def difference(first: str, metric: str = "anls") -> str:
        found = differences(runs[first], runs["avl 50%"], task, metric) if {first, "avl 50%"} <= set(runs) else []
        return in_words(found) if found else "one of the two could not be run"

    def versus(*others: str) -> str:
        return " ".join(f"ANLS, `avl` minus `{name}` at half: {difference(f'{name} 50%')}." for name in others)

    claims = [
        (
            "Near-lossless at half the KV cache",
            "`python -m eval --policy avl --kv_budget 0.5`",
            f"Against `full`: exact match {difference('full', 'exact_match')}; ANLS {difference('full')}.",
        ),
        (
            "Ahead of FastV and H2O at the same half",
            "`python -m eval sweep --policies avl fastv h2o --budgets 0.5`",
            versus("fastv", "h2o"),
        ),
        (
            "(beyond the paper) ahead of eviction at random",
            "`python -m eval sweep --policies avl random --budgets 0.5`",
            versus("random"),
        ),
        (
            "So on DocVQA, TextVQA and OCRBench with LLaVA-1.5 and 1.6",
            "`python -m eval --model llava-hf/llava-v1.6-vicuna-7b-hf --tasks "
            "docvqa_val,textvqa_val,ocrbench --policy avl --kv_budget 0.5`",
            "Not measured here: needs the 7B checkpoint, the data and a GPU.",
        ),
        ("So on VQAv2, Nocaps and Flickr30k", "none", "These tasks are not supported."),
        ("KV cache of LLaVA-1.6-7B 1179 MB → 531 MB (45 %)", BENCHMARK, "See the benchmark page."),
        ("Decoder 1.8 times faster at half the cache, latency 50.5 %", BENCHMARK, "See the benchmark page."),
    ]
    rows = "\n".join(f"| {claim} | {command} | {value} |" for claim, command, value in claims)
    versions = ", ".join(f"{name} {version}" for name, version in full["versions"].items())
    return f"""# Accuracy against KV bytes, measured

Written by `make results`; do not edit. Model `{full["settings"]["model"]}`, task `{task}` ({full["data"][task]}), {full["results"][task]["n"]}
questions, batch size {full["settings"]["batch_size"]}, {full["settings"]["device"]}, dtype {full["settings"]["dtype"]}; {versions}. Every figure has
its standard error, so two rows must differ by well over both to mean something; paired differences are in the last table. The
bundled model is tiny and its pages are drawn: this shows how the parts behave, and proves nothing about large models. Times are
those of this one run, eager and on whatever else the machine was doing; [performance.md](performance.md) is about time.

## Policies at equal bytes

Each policy may hold a share of the prompt's KV bytes (`--kv_budget`). "failed" counts questions for which a budget was too small,
since system and text tokens stay; such rows are over fewer questions and not in the picture.
{picture("policies")}
{describe(sections["policies"], KINDS)}
## Score windows

`avl` scores vision by the last prompt row, as the paper does, or by the mean of the last few (`--vision_score_window`).
{picture("windows")}
{describe(sections["windows"], KINDS)}
## The parts of A-VL

Each alone, vision at rate 0.5 and its core at several compute rates and intervals, text with 4 initial entries.

{describe(sections["parts"], KINDS)}
## The paper's claims

| claim | command | here |
| --- | --- | --- |
{rows}
"""


if __name__ == "__main__":
    cli.run(main)
