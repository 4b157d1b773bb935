"""The README and the other documents are true: commands and Python run; flags, policies and links exist."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import runpy
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from cli_helpers import call, script
from eval.accuracy.tasks import GROUPS, TASKS
from eval.demo.pages import draw_page
from minivlm.cache.policies import PRESETS
from paths import ROOT
from weights import DEMO

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def commands() -> list[str]:
    """The lines of shell blocks that run this repository's Python and need nothing but the bundled checkpoint."""
    lines = [
        line
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith(("python scripts/", "python -m eval"))
    ]
    return [line for line in lines if not needs_the_hub(shlex.split(line))]


def needs_the_hub(words: list[str]) -> bool:
    model = words[words.index("--model") + 1] if "--model" in words else None
    return model is not None and HUB_ID.fullmatch(model) is not None and not (ROOT / model).exists()


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """The current directory: a stand-in for the repository's root, which keeps what commands write out of it."""
    for name in ("scripts", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_line(line: str, monkeypatch, stdin: str = "") -> tuple[str, str]:
    """Run a `python …` line in this process as the interpreter would, and return its stdout and stderr.

    The command has to succeed.
    """
    words = shlex.split(line)[1:]
    module = words[0] == "-m"
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", words[module:])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if module:
                # Another test may have imported it; runpy warns if it is there before it runs.
                monkeypatch.delitem(sys.modules, f"{words[1]}.__main__", raising=False)
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{line}: status {end.code}: {err.getvalue()}"
    return out.getvalue(), err.getvalue()


def truth(image: str, question: str) -> str:
    """The right answer to a question about an example page, which is drawn again to read the field's value."""
    path = DEMO / "pages" / Path(image).name
    with Image.open(path) as picture:
        size = picture.size[::-1]
    page = draw_page(random.Random(f"examples 0 {path.stem.removeprefix('page_')}"), "heldout", size)
    (value,) = [field.value for field in page.fields if f"the {field.name.lower()}?" in question.lower()]
    return value


def test_the_readme_opens_with_what_a_newcomer_needs():
    assert README.startswith("# minivlm\n")
    assert blocks("sh")[0].split("\n")[:2] == ["make demo", "make test"]
    assert len(commands()) >= 6 and len(blocks("python")) == 2


@pytest.mark.parametrize("line", commands())
def test_commands(line, clone, monkeypatch):
    out, err = run_line(
        line,
        monkeypatch,
        stdin="What is the tax?\nWhat is the account?\n" if "--chat" in line else "",
    )
    words = shlex.split(line)
    given = {flag: value for flag, value in pairwise(words) if flag.startswith("--")}
    assert "error" not in err
    for flag in given.keys() & {"--overlay", "--out"}:
        assert (clone / given[flag]).stat().st_size > 1000
    if "--out" not in given:
        assert out.strip()
    if "generate.py" in line and "--prompt" in given and "--policy" not in given:
        assert out.strip() == truth(given["--image"], given["--prompt"])


def test_python(clone, capsys):
    names: dict = {}
    exec(compile(blocks("python")[0], "README.md", "exec"), names)
    assert names["answer"].text == truth("page_0.png", "What is the due date?")
    assert len(capsys.readouterr().out) > 100
    assert len([line for line in blocks("python")[0].splitlines() if line and not line.startswith("import")]) == 5
    exec(compile(blocks("python")[1], "README.md", "exec"), names)
    assert [answer.finish for answer in names["answers"]] == ["stop", "stop"]
    assert len(names["conversation"].messages) == 3


def test_make_demo(clone):
    """The command of `make demo` runs as a process, without the set-up before it."""
    recipe = re.search(r"^demo:.*\n\t(.+)$", MAKEFILE, re.M)[1]
    assert recipe.startswith("$(BIN)/python scripts/generate.py ")
    words = shlex.split(recipe)[1:]
    image, question = (words[words.index(flag) + 1] for flag in ("--image", "--prompt"))
    done = subprocess.run([sys.executable, *words], cwd=clone, capture_output=True, text=True, timeout=300)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert done.stdout.strip() == truth(image, question)


def test_make_calls_what_there_is():
    for path in re.findall(r"python (scripts/\S+\.py)", README + MAKEFILE):
        assert (ROOT / path).is_file(), path


def test_make_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split()
    assert re.findall(r"^([a-z-]+):.*  ## \S", MAKEFILE, re.M) == phony


def test_continuous_integration_runs_the_test_command():
    assert blocks("sh")[0].split("\n")[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^make ([a-z-]+)$", text, re.M):
        assert re.search(rf"^{target}:", MAKEFILE, re.M), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links(document):
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", document.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        assert (document.parent / target).exists(), f"{document.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (document.parent / target).read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags(document):
    known = {"--nproc_per_node", "--index"}  # of torchrun and pip
    known |= set(re.findall(r"--[a-z0-9_]+", call(script("generate").main, "--help").out))
    for folder in ("minivlm", "eval", "scripts"):
        for source in (ROOT / folder).rglob("*.py"):
            defined = re.findall(r'(?:flag|switch|spellings)\(\s*"([a-z0-9_]+)"', source.read_text(encoding="utf-8"))
            known |= {f"--{flag}" for flag in defined}
    fuzzer = (ROOT / "tests" / "fuzz" / "fuzzer" / "__main__.py").read_text(encoding="utf-8")
    known |= set(re.findall(r'"(--[a-z]+)"', fuzzer))
    named = re.findall(r"--[a-z][a-z0-9_]*[a-z0-9](?![\w*])", document.read_text(encoding="utf-8"))  # not `--text_*`
    assert set(named) <= known


def test_policies():
    table = README[README.index("## KV policies") : README.index("## Measuring")]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == list(PRESETS)


def test_what_the_bundled_checkpoint_holds():
    """It is small enough for the repository and for the package, has the usual layout, and a model card."""
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 15e6
    assert json.loads((DEMO / "config.json").read_text())["model_type"] == "llava_next"
    with safe_open(DEMO / "model.safetensors", "pt") as tensors:
        assert len(list(tensors.keys())) > 100
    assert (DEMO / "README.md").read_text(encoding="utf-8").strip()
    listed = json.loads((DEMO / "pages" / "questions.json").read_text(encoding="utf-8"))
    assert sorted(page["image"] for page in listed) == sorted(path.name for path in (DEMO / "pages").glob("*.png"))


def test_the_tasks_named_exist():
    assert set(re.findall(r"--tasks (\w+)", README)) <= {*TASKS, *GROUPS}
