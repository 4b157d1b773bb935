"""The pieces of a GPU run, in the order in which they matter. Each is a command of its own.

So a piece that crashes or runs out of memory ends no other, and nothing that one holds is missing to the next. What
does not fit on a card of 80 GB beside each other, such as several contenders at batch 32, is in several pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from eval.speed.step_bytes import INTERVAL, TEXT_TOKENS, VISION_TOKENS

AVL = f"avl: avl --vision_adaptive_attention_update_interval {INTERVAL}"
NO_CORE = "no core: avl --vision_adaptive_attention_update_interval -1"
SHAPE, DTYPE = "llava-v1.6-vicuna-7b", "bfloat16"
_TESTS = "tests/cuda/test_on_a_gpu.py"

Program = Callable[..., tuple[str, ...]]  # the words of a benchmark with these flags


@dataclass(frozen=True)
class Piece:
    """One command of Python. `minutes` is about what it takes on an H100; nobody has measured that yet."""

    name: str  # of its files
    about: str
    minutes: float
    program: tuple[str, ...]  # the words after `python`
    writes_json: bool = True  # with --json; of another piece the last line that it prints is kept
    draws: bool = False  # with --plot
    needs_gpu: bool = False
    needs_transformers: bool = False

    def words(self, folder: Path, pictures: Path) -> list[str]:
        """The words after `python` of the command that writes its JSON into `folder`."""
        words = list(self.program)
        if self.draws:
            words += ["--plot", (pictures / f"{self.name}.png").as_posix()]
        if self.writes_json:
            words += ["--json", (folder / f"{self.name}.json").as_posix()]
        return words

    def left_out(self, rehearsal: bool) -> str | None:
        """Why it cannot run here, or None."""
        if rehearsal and self.needs_gpu:
            return "it needs a GPU"
        if self.needs_transformers and find_spec("transformers") is None:
            return "transformers is not installed"
        return None


def pieces(rehearsal: bool) -> list[Piece]:
    """All pieces; as a `rehearsal`, of a tiny model on the CPU, where only whether they run means something."""
    device = ("--device", "cpu" if rehearsal else "cuda")
    plan = _rehearsed if rehearsal else _measured
    return [
        Piece("device", "the card, its driver, its bandwidth", 0.3, ("-m", "eval.speed.gpu.device", *device)),
        Piece("tests", "the tests that need a GPU", 1.2, ("-m", "pytest", _TESTS), writes_json=False),
        *plan(lambda *flags: ("scripts/benchmark.py", *device, *flags)),
    ]


def _measured(benchmark: Program) -> list[Piece]:
    model = ("--shape", SHAPE, "--dtype", DTYPE, "--text_tokens", str(TEXT_TOKENS))
    steps = (*model, "--new_tokens", "24", "--repeats", "5")
    return _benchmarks(
        lambda *flags: benchmark(*steps, *flags),
        lambda *flags: benchmark(*model, "--new_tokens", "12", "--repeats", "2", *flags),
        (576, 1440, VISION_TOKENS),
        ("transformers", "transformers:static"),
    )


def _rehearsed(benchmark: Program) -> list[Piece]:
    model = ("--shape", "cpu-tiny", "--dtype", "float32", "--text_tokens", "12", "--no_compile")
    short = (*model, "--new_tokens", "2", "--repeats", "1")
    timed = quick = lambda *flags: benchmark(*short, *flags)
    return _benchmarks(timed, quick, (24, 48), ("transformers",))  # the other compiles for a minute


def _benchmarks(timed: Program, quick: Program, images: tuple[int, ...], peers: tuple[str, ...]) -> list[Piece]:
    """The benchmarks, `timed` ones and `quick` ones. The sweep takes all these numbers of image tokens, the others the
    largest of them; `peers` are those at batch 1."""
    image = str(max(images))
    tokens = ("--vision_tokens", image)
    return [
        Piece("batch-1", "a step at batch 1", 0.7, timed(*tokens, "--batch", "1", "--policy", "full")),
        Piece(
            "batch-1-peers",
            "the same in turns with transformers, also static and compiled",
            1.3,
            timed(*tokens, "--batch", "1", "--policy", "full", "--peers", *peers),
            needs_transformers=True,
        ),
        Piece(
            "batch-32",
            "a step at batch 32, without an image (that is, the weights) and with one",
            0.9,
            timed("--vision_tokens", "0", image, "--batch", "32", "--policy", "full"),
        ),
        Piece(
            "batch-32-avl",
            "a step of A-VL at batch 32",
            0.9,
            timed(*tokens, "--batch", "32", "--policy", AVL),
        ),
        Piece(
            "batch-32-peers",
            "transformers at batch 32",
            0.6,
            timed(*tokens, "--batch", "32", "--policy", "--peers", "transformers"),
            needs_transformers=True,
        ),
        Piece(
            "largest-batch",
            "the largest batch that fits, without and with A-VL",
            1.5,
            quick(*tokens, "--batch", "1", "--no_compile", "--policy", "full", "avl", "--largest_batch"),
            needs_gpu=True,
        ),
        Piece(
            "profile-batch-1",
            "where the time of a step and a prefill goes",
            0.5,
            quick(*tokens, "--batch", "1", "--policy", "full", "--profile"),
        ),
        Piece(
            "profile-batch-32",
            "the same of A-VL at batch 32",
            0.6,
            quick(*tokens, "--batch", "32", "--policy", AVL, "--profile"),
        ),
        Piece(
            "sweep",
            "a step against image tokens at batch 8, of A-VL with a core and without",
            2.0,
            quick("--vision_tokens", *map(str, images), "--batch", "8", "--policy", "full", AVL, NO_CORE),
            draws=True,
        ),
    ]
