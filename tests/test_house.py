"""The repository's own rules: which way its files depend on each other, and that scripts only parse and call."""

from __future__ import annotations

import pytest

import import_rules
from import_rules import Source
from paths import ROOT

RULES = (
    import_rules.unknown_layers,
    import_rules.wrong_directions,
    import_rules.policies_known_to_the_cache,
    import_rules.import_cycles,
    import_rules.relative_imports,
    import_rules.transformers_imports,
    import_rules.tricks,
    import_rules.long_scripts,
)
TEST_RULES = (import_rules.tests_imported_by_tests, import_rules.relative_imports, import_rules.tricks)

# A made-up repository that keeps every rule ...
CLEAN = {
    "minivlm/__init__.py": "from minivlm.generation import generate\n",
    "minivlm/errors.py": "",
    "minivlm/cache/__init__.py": "from minivlm.cache.policies import REGISTRY\n",
    "minivlm/cache/policy.py": "import sys\nimport minivlm.errors\n",
    "minivlm/cache/policies/__init__.py": "from minivlm.cache.policies import avl\nREGISTRY = avl\n",
    "minivlm/cache/policies/avl.py": "from minivlm.cache.policy import Policy\n",
    "minivlm/inputs/template_sandbox.py": "import sys\nsys.path += sys.argv[1:]\n",
    "minivlm/generation/generate.py": "from minivlm.cache import policy\n",
    "weights/__init__.py": "import minivlm\n",
    "eval/speed/peer_transformers.py": "from transformers import AutoModel\n",
    "scripts/generate.py": "import trace\nfrom training import loop\nfrom weights import load\n",
    "scripts/training/loop.py": "import minivlm.cache.policy as policy\n",
    "scripts/trace.py": "import generate\n",
}
# ... and the changes that break one, with what is said of them.
BROKEN = [
    ({"minivlm/other/x.py": ""}, "unknown_layers", "minivlm.other.x is in no layer"),
    (
        {"minivlm/errors.py": "def late():\n    from minivlm.cache import policy\n"},
        "wrong_directions",
        "minivlm/errors.py:2: minivlm.errors may not import minivlm.cache.policy",
    ),
    ({"minivlm/errors.py": "import minivlm\n"}, "wrong_directions", "minivlm.errors may not import minivlm"),
    ({"minivlm/errors.py": "from weights import load\n"}, "wrong_directions", "may not import weights"),
    ({"weights/__init__.py": "import eval.speed.peer\n"}, "wrong_directions", "weights may not import eval.speed.peer"),
    ({"eval/x.py": "from training.loop import go\n"}, "wrong_directions", "eval may not import scripts.training.loop"),
    (
        {"minivlm/cache/storage.py": "from minivlm.cache.policies.avl import AVL\n"},
        "policies_known_to_the_cache",
        "minivlm/cache/storage.py:1: only the policies' own folder may import minivlm.cache.policies.avl",
    ),
    (
        {"minivlm/cache/storage.py": "from minivlm.cache import policies\n"},
        "policies_known_to_the_cache",
        "import minivlm.cache.policies",
    ),
    (
        {"minivlm/cache/policy.py": "def late():\n    from minivlm.cache.policies import avl\n"},
        "import_cycles",
        "minivlm.cache.policies.avl <- minivlm.cache.policy",
    ),
    ({"minivlm/cache/policies/avl.py": "from minivlm.cache import x\n"}, "import_cycles", "minivlm.cache <- "),
    (
        {"minivlm/cache/policies/avl.py": "from ..policy import Policy\n"},
        "relative_imports",
        "minivlm/cache/policies/avl.py:1: relative import of minivlm.cache.policy",
    ),
    ({"minivlm/cache/__init__.py": "from . import policy\n"}, "relative_imports", "import of minivlm.cache.policy"),
    (
        {"weights/find.py": "def late():\n    import transformers.models.clip\n"},
        "transformers_imports",
        "weights/find.py:2: transformers.models.clip may be imported only in eval.speed.peer_transformers",
    ),
    (
        {"weights/find.py": "import importlib\nimportlib.import_module('transformers')\n"},
        "transformers_imports",
        "weights/find.py:2: transformers may be",
    ),
    ({"weights/find.py": "from typing import TYPE_CHECKING as HIDE\n"}, "tricks", "weights/find.py:1: TYPE_CHECKING"),
    ({"weights/find.py": "import typing\nif typing.TYPE_CHECKING:\n    pass\n"}, "tricks", "find.py:2: TYPE_CHECKING"),
    ({"scripts/trace.py": "import sys\nsys.path.insert(0, '.')\n"}, "tricks", "scripts/trace.py:2: sys.path"),
    ({"scripts/trace.py": "from sys import path\n"}, "tricks", "scripts/trace.py:1: sys.path"),
    ({"scripts/trace.py": "\n" * 36}, "long_scripts", "scripts/trace.py has 36 lines (at most 35)"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code(rule):
    broken = rule(Source(ROOT))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("rule", TEST_RULES, ids=lambda rule: rule.__name__)
def test_the_tests(rule):
    broken = rule(Source(ROOT, ("tests",)))
    assert not broken, "\n".join(broken)


def written(root, files) -> Source:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Source(root)


def test_the_real_files_are_read():
    source = Source(ROOT)
    assert {"minivlm", "minivlm.model.llava", "weights", "eval.__main__", "scripts.generate"} <= source.modules.keys()
    assert len(source.imports) > 300


def test_a_repository_that_keeps_the_rules(tmp_path):
    source = written(tmp_path, CLEAN)
    assert [line for rule in RULES for line in rule(source)] == []


@pytest.mark.parametrize("changes, rule, said", BROKEN)
def test_a_repository_that_breaks_one(tmp_path, changes, rule, said):
    (line,) = getattr(import_rules, rule)(written(tmp_path, CLEAN | changes))
    assert said in line


def test_a_test_that_imports_another(tmp_path):
    written(tmp_path, {"tests/a/test_one.py": "", "tests/b/test_two.py": "def late():\n    from test_one import x\n"})
    (line,) = import_rules.tests_imported_by_tests(Source(tmp_path, ("tests",)))
    assert line == "tests/b/test_two.py:2: test_one is a test, not a helper"
