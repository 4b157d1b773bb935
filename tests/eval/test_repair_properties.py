"""A run's rows after any damage: what is left counts, what is lost is asked again, and the next start is quiet."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from eval.accuracy.outcomes import Cost, Outcome
from eval.accuracy.run_folder import RunFolder
from eval.accuracy.run_settings import RunSettings, TaskSettings

CODE, SAMPLES = "0" * 12, 6
TASK = TaskSettings(prompt="", max_new_tokens=1, split="validation", data="")
SETTINGS = RunSettings("m", "w", "cpu", "float32", {"docvqa_val": TASK}, {}, 1, 0, False)
COST = Cost(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
GARBAGE = (b"", b"{}", b"null", b"[" * 10_000, b"\xff\xfe", b"\0" * 9, b'{"task":', b'{"task":"docvqa_val","index":1}')


def outcome(index: int, prediction: str = "a\u00e9\u2028\U0001f600") -> Outcome:
    return Outcome(
        task="docvqa_val",
        id=index,
        index=index,
        types=[],
        code=CODE,
        prediction=prediction,
        finish="stop",
        scores={"anls": 1.0},
        cost=COST,
    )


def opened(path: Path, notes: list[str]) -> tuple[RunFolder, dict[tuple[str, int], Outcome]]:
    folder = RunFolder(path, "label", SETTINGS, CODE, notes.append)
    return folder, folder.open(lambda outcome: "")


def torn(data: bytes, draw) -> bytes:
    return data[: draw(st.integers(0, len(data)))]


def inserted(data: bytes, draw) -> bytes:
    lines = data.splitlines(keepends=True)
    lines.insert(draw(st.integers(0, len(lines))), draw(st.sampled_from(GARBAGE)) + b"\n")
    return b"".join(lines)


def repeated(data: bytes, draw) -> bytes:
    lines = data.splitlines(keepends=True)
    return data + draw(st.sampled_from(lines)) if lines else data


def dropped(data: bytes, draw) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join(lines[:-1] if draw(st.booleans()) else lines[1:])


def broken(data: bytes, draw) -> bytes:
    """A byte that no text has, somewhere."""
    place = draw(st.integers(0, len(data)))
    return data[:place] + b"\xff" + data[place + 1 :]


@given(data=st.data(), damage=st.lists(st.sampled_from([torn, inserted, repeated, dropped, broken]), max_size=4))
def test_damage_costs_no_more_than_what_it_hits(data, damage):
    with tempfile.TemporaryDirectory() as root:
        notes: list[str] = []
        run, _ = opened(Path(root), notes)
        run.append([outcome(index) for index in range(SAMPLES)])
        content = run.samples.read_bytes()
        written = set(content.splitlines(keepends=True))
        for harm in damage:
            content = harm(content, data.draw)
        run.samples.write_bytes(content)

        # Every line that is as it was counts, and nothing else does.
        run, outcomes = opened(Path(root), notes)
        whole = [line for line in content.splitlines(keepends=True) if line in written]
        assert len(outcomes) == len(set(whole))
        assert all(left == outcome(index) for (_, index), left in outcomes.items())
        complete = content[: content.rfind(b"\n") + 1].count(b"\n")
        assert bool(notes) == (complete > len(outcomes))

        # The rest is asked again; then the folder is as good as new.
        run.append([outcome(index) for index in range(SAMPLES) if ("docvqa_val", index) not in outcomes])
        del notes[:]
        run, outcomes = opened(Path(root), notes)
        assert outcomes == {("docvqa_val", index): outcome(index) for index in range(SAMPLES)} and not notes
        if len(whole) < SAMPLES:  # something was missing, so that the file was put in order
            assert sorted(run.samples.read_bytes().splitlines(keepends=True)) == sorted(written)
