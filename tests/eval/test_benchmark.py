"""The benchmark: its arithmetic, its fairness to peers, and that nothing compiles while it times.

No times are tested.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny
from eval.figures import row_of_panels, save_figure
from eval.speed import benchmark, contenders, machine, timing
from eval.speed.benchmark_flags import parse_candidate
from eval.speed.shapes import SHAPES, make_model, random_model, synthetic_prompts
from minivlm.cache import accounting
from minivlm.cache.cores import choose_cores
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies import preset
from minivlm.errors import UserError
from minivlm.generation.generate import Generation
from minivlm.generation.sampling import Sampling
from minivlm.generation.steps import decode_step, forward_step
from minivlm.model.config import VLMConfig
from minivlm.model.llava import Llava
from paths import ROOT

NO_CORE = "no core: avl --vision_adaptive_attention_update_interval -1"


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Path:
    """A folder with a config.json and no weights."""
    folder = tmp_path_factory.mktemp("shape")
    tiny.dump(folder / "config.json", tiny.make_config("next-vicuna"))
    return folder


@pytest.fixture(scope="module")
def model(shape) -> Llava:
    return make_model(str(shape), "cpu", "auto", 0, random_weights=True)


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    plain = machine.bandwidth
    monkeypatch.setattr(benchmark, "bandwidth", lambda device: plain(device, 1 << 16, 2))


def measure(shape: Path, *flags: str) -> dict:
    out = shape / "out.json"
    benchmark.run_benchmark(
        ["--shape", str(shape), "--random_weights", "--new_tokens", "2", "--repeats", "2", "--json", str(out), *flags]
    )
    return json.loads(out.read_text())


def test_what_is_written(shape, model, capsys):
    result = measure(
        shape,
        "--vision_tokens",
        "0",
        "60",
        "--text_tokens",
        "20",
        "--batch",
        "2",
        "--policy",
        "full",
        "avl",
        NO_CORE,
        "--no_compile",
    )
    assert result["versions"]["torch"] == torch.__version__ and result["machine"]["device"]
    assert result["command"].startswith("python scripts/benchmark.py --shape") and f"'{NO_CORE}'" in result["command"]
    assert result["bandwidth"]["copy"] > 0 and result["bandwidth"]["read"] > 0
    assert [(case["batch"], case["vision_tokens"]) for case in result["cases"]] == [(2, 0), (2, 60)]
    full, avl, no_core = result["cases"][1]["rows"]
    assert [row["name"] for row in (full, avl, no_core)] == ["full", "avl", "no core"]
    assert not any(row["compiled"] for row in (full, avl, no_core))
    assert full["speedup"] == full["bytes_allow"] == full["prefill_speedup"] == 1
    assert set(full["decode_ms"]) == set(no_core["decode_ms"]) == {"full"}
    # Whole periods: of three steps one is a refresh, however many were asked for.
    assert {kind: times["n"] for kind, times in avl["decode_ms"].items()} == {"core": 4, "refresh": 2}
    for row in (full, avl, no_core):
        assert all(d["q1"] <= d["median"] <= d["q3"] for d in row["decode_ms"].values())
        assert row["speedup"] == pytest.approx(full["step_ms"] / row["step_ms"])
        assert row["tokens_per_s"] == pytest.approx(2000 / row["step_ms"])
        assert row["share_of_limit"] == pytest.approx(row["bytes_per_s"] / result["bandwidth"]["copy"])
    assert avl["core_replaced"] is not None and 0 <= avl["core_replaced"] < 1
    # 2 sequences, 2 layers, keys and values of 2 heads of 16 in float32; the prompt has 80 tokens,
    # avl keeps 30 of 60.
    entry = 2 * 2 * 16 * 4
    assert full["live_bytes"] == full["full_bytes"] == avl["full_bytes"] == 2 * 2 * 80 * entry
    assert avl["live_bytes"] == no_core["live_bytes"] == 2 * 2 * 50 * entry
    steps = 1 + 3 + 2 * (1 + 2)  # the warm-up's and the turns'
    mean = 80 + (steps + 1) / 2
    assert full["step_bytes"] == {"full": round(result["decoder_bytes"] + 2 * 2 * mean * entry)}
    assert avl["step_bytes"]["core"] == pytest.approx(
        avl["step_bytes"]["refresh"], rel=0.01
    )  # on a CPU, which passes over all
    assert avl["bytes_allow"] == pytest.approx(full["limit_ms"] / avl["limit_ms"])
    assert avl["bytes_allow"] == pytest.approx(no_core["bytes_allow"], rel=0.02) and no_core["bytes_allow"] > 1
    assert "| no core |" in capsys.readouterr().out


def test_bytes_of_a_step_are_those_the_cache_counts(model):
    """`entries_read`, step by step, against the cache's own account of the whole answer."""
    settings = preset("avl", text=True, text_init_cache=4, filter=True, filter_layer=1, filter_rate=0.3)
    contender = contenders.PolicyContender("avl", model, settings, compiled=False)
    contender.prefill(synthetic_prompts(model, 2, 40, 16, 0), 9)
    for _ in range(8):
        contender.step()
    cache = contender.cache
    attended = accounting.entries_attended(cache)
    cache.gather = True
    core_alone = sum(accounting.entries_read(cache, step) for step in range(cache.steps))
    assert core_alone == pytest.approx(sum(attended.values()) * cache.steps * 2 * len(cache.layers))
    cache.gather = False  # then a core step passes over the secondary entries, too
    everything = sum(accounting.entries_read(cache, step) for step in range(cache.steps))
    secondary = sum(counts.vision - counts.core for layer in cache.layers for counts in layer.counts)
    assert everything == core_alone + secondary * cache.step_kinds.count("core") > core_alone


@pytest.mark.parametrize("module", ["eval.speed.step_bytes", "eval.speed.gpu.limits"])
def test_the_tables_of_arithmetic_in_the_docs(module):
    """They are what their commands print."""
    done = subprocess.run([sys.executable, "-m", module], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) > 5
    assert done.stdout in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_decoder_bytes(model):
    """All but the tower, the projector and the embeddings, of which a step reads a row."""
    left_out = ("vision_tower", "multi_modal_projector", "image_newline", "language_model.embed_tokens")
    assert contenders.decoder_bytes(model) == sum(
        p.nbytes for name, p in model.named_parameters() if not name.startswith(left_out)
    )


def test_nothing_compiles_after_the_warm_up(shape, monkeypatch):
    def traced(function):
        return torch.compile(function, fullgraph=True, dynamic=False, backend="eager")

    step = functools.partial(decode_step, forward=traced(forward_step), choose=traced(choose_cores))
    monkeypatch.setattr(contenders, "compiled_decode_step", lambda device: step)
    monkeypatch.setattr(benchmark, "compiled_blocks", lambda model: model)
    flags = ("--vision_tokens", "60", "--text_tokens", "20", "--policy", "full", "avl")
    torch._dynamo.reset()
    rows = measure(shape, *flags)["cases"][0]["rows"]
    for row in rows:
        assert row["compiled"] and len(row["after_warm_up"]) == 4 and not any(row["after_warm_up"].values())
    torch._dynamo.reset()
    monkeypatch.setattr(timing, "WARM_UP", 0)  # then the first refresh is timed: it compiles a step and a choice
    assert measure(shape, *flags)["cases"][0]["rows"][1]["after_warm_up"]["graphs"] == 2
    torch._dynamo.reset()


def test_prompts_and_weights_are_random(model):
    prompts = synthetic_prompts(model, 3, 50, 24, seed=1)
    image = model.config.image_token_index
    for ids, features in zip(prompts.ids, prompts.features, strict=True):
        assert (ids == image).sum() == len(features) == 50 and len(ids) == prompts.length == 74
        assert ids[-1] != image and ids[ids != image].unique().numel() > 12
        assert features.std() > 0.9
    assert not torch.equal(prompts.ids[0], prompts.ids[1]) and not torch.equal(prompts.features[0], prompts.features[1])
    assert all(p.abs().mean() > 0.01 for p in model.parameters())
    other = random_model(model.config, torch.device("cpu"), torch.float32, seed=1)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(("name", "billions"), [
    ("llava-1.5-7b", 7.06), ("llava-1.5-13b", 13.35), ("llava-v1.6-vicuna-7b", 7.06), ("llava-v1.6-vicuna-13b", 13.35),
    ("llava-v1.6-mistral-7b", 7.57), ("llava-v1.6-34b", 34.75), ("llama3-llava-next-8b", 8.36), ("cpu-268m", 0.268),
])  # fmt: skip
def test_shapes_have_their_size(name, billions):
    """Parameters as the hub counts them, less the tower's unused last layer."""
    with torch.device("meta"):
        model = Llava(VLMConfig.from_dict(SHAPES[name]))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 100])
def test_the_largest_that_fits(limit, monkeypatch):
    asked = []

    def fits(n: int) -> bool:
        asked.append(n)
        return n <= limit

    assert timing.largest(fits) == limit
    assert len(set(asked)) == len(asked) <= 16


def test_largest_batch_is_where_memory_ends(model, monkeypatch):
    plain, policies = Generation, []

    def small(model, cache: KVCache, *rest):
        policies.append(cache.policy.name)
        if len(cache.sequences) > 5:
            raise torch.OutOfMemoryError("of the test")
        return plain(model, cache, *rest)

    monkeypatch.setattr(timing, "Generation", small)
    assert timing.batch_that_fits(model, preset("avl"), lambda batch: synthetic_prompts(model, batch, 8, 4, 0), 4) == 5
    assert set(policies) == {"avl"}


@pytest.mark.parametrize(("flags", "told"), [
    (["--shape", "llava-9b"], "--shape 'llava-9b' is neither a checkpoint folder nor one of llava-1.5-7b"),
    (["--vision_tokens", "-1"], "--vision_tokens is -1 (expected at least 0)"),
    (["--text-tokens", "0"], "--text_tokens is 0 (expected at least 1)"),
    (["--policy", "full", "fastest"], "--policy 'fastest' is unknown"),
    (["--policy", "avl", "avl"], "'avl' is there twice"),
    (["--policy", "avl", "--vision_adaptive_attention_rate", "2"], "--vision_adaptive_attention_rate is 2"),
    (["--peers", "megatron"], "peer_megatron.py"),
    (["--largest_batch"], "--largest_batch needs a GPU"),
    (["--policy", '"'], "--policy '\"': No closing quotation"),
    (["--policy", ""], "argument --policy: expected one argument"),
    (["--policy", ": "], "argument --policy: expected one argument"),
    (["--policy", "avl --kv_budget nan"], "'nan' is not a finite number"),
    (["--policy", "avl --stray"], "unrecognized arguments: --stray"),
    (["--peers", "../speed/timing"], "there is no eval/speed/peer_../speed/timing.py"),
    (["--peers", "a\0b"], "there is no eval/speed/peer_"),
    (["--shape", "~nobody-of-this-name/x"], "is neither a checkpoint folder"),
    (["--shape", "a\0b"], "is neither a checkpoint folder"),
    (["--shape", "x" * 300], "is neither a checkpoint folder"),
    (["--batch", "1", "9999999999"], "--batch is 9999999999 (expected at most 4096)"),
    (["--vision_tokens", "9" * 30], "is not an integer of at most 64 bits"),
    (["--vision_tokens", "1000000"], "exceed the model's context of"),
    (["--repeats", "1000000"], "exceed the model's context of"),
    (["--plot", "out.xyz"], "out.xyz: no format of a picture (expected a name like out.png)"),
    (["--json", "nowhere/out.json"], "there is no folder"),
    (["--what"], "unrecognized arguments: --what"),
])  # fmt: skip
def test_mistakes_are_one_line(shape, flags, told):
    with pytest.raises(UserError, match=".*") as error:
        benchmark.run_benchmark(["--shape", str(shape), "--random_weights", "--device", "cpu", *flags])
    assert told in str(error.value)


def test_a_folder_without_weights_needs_the_flag(shape):
    with pytest.raises(UserError, match="safetensors"):
        make_model(str(shape), "cpu", "auto", 0, random_weights=False)


def test_flags_outside_hold_for_all_policies_and_inside_for_one():
    inner = parse_candidate("mine: avl --vision_adaptive_attention_rate 0.75", ["--text_pruning_flag"], 3, True)
    assert inner.label == "mine" and inner.settings == preset("avl", vision_rate=0.75, text=True, seed=3)
    assert inner.compiled and not parse_candidate("full --no_compile", [], 0, True).compiled
    assert parse_candidate("full", ["--text_pruning_flag"], 0, True).settings.text


def test_the_picture(shape):
    pytest.importorskip("matplotlib")
    for name, flags in (
        ("tokens", ["--vision_tokens", "0", "40"]),
        ("batch", ["--vision_tokens", "40", "--batch", "1", "2"]),
    ):
        picture = shape / f"{name}.png"
        measure(shape, "--text_tokens", "12", "--no_compile", "--policy", "full", "avl", "--plot", str(picture), *flags)
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    "name, start", [("x.png", b"\x89PNG"), ("x", b"\x89PNG"), ("x.PDF", b"%PDF"), ("x.svg", b"<?xml")]
)
def test_the_name_of_a_figure_decides_its_format(tmp_path, name, start):
    pytest.importorskip("matplotlib")
    figure, _ = row_of_panels(1)
    save_figure(figure, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start) and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="no format of a picture"):
        save_figure(figure, tmp_path / "x.xyz")


def test_profiles_name_what_took_the_time(shape, capsys):
    tables = measure(
        shape, "--vision_tokens", "40", "--text_tokens", "12", "--no_compile", "--policy", "avl", "--profile"
    )["cases"][0]["profile"]["avl"]
    assert set(tables) == {"prefill", "core step", "refresh step"}
    assert "scaled_dot_product" in tables["prefill"] and "aten::mm" in tables["core step"]
    assert "avl, refresh step" in capsys.readouterr().out


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_transformers_is_timed_on_the_same_model(shape, tmp_path, kv_heads):
    """Its tokens are ours, from the same weights without a copy, over several turns."""
    pytest.importorskip("transformers")
    tiny.dump(tmp_path / "config.json", tiny.make_config("next-vicuna", kv_heads=kv_heads))
    model = make_model(str(tmp_path), "cpu", "auto", 0, random_weights=True)
    peer = benchmark.find_peer("transformers")("transformers", model)
    assert peer.model.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    peer.prefill(synthetic_prompts(model, 2, 30, 10, 0), 12)
    for steps in (4, 5):
        assert [kind for kind, _ in peer.decode(steps)] == ["full"] * steps
    ids = peer._ids
    cache = KVCache(model.config.text, preset("full").build(2), (0, 1))
    ours = Generation(model, cache, list(ids[:, :40]), [], Sampling(max_new_tokens=ids.shape[1] - 40, ignore_eos=True))
    for _ in ours:
        pass
    assert ids[:, 40:].tolist() == ours.tokens
    facts = peer.facts()
    decoded = 2 * 2 * cache.steps * accounting.entry_bytes(cache)  # sequences, layers
    assert facts["full_bytes"] == accounting.full_bytes(cache) - decoded


@pytest.mark.slow
def test_transformers_with_a_static_cache(shape):
    pytest.importorskip("transformers")
    result = measure(
        shape, "--vision_tokens", "40", "--text_tokens", "12", "--no_compile", "--peers", "transformers:static"
    )
    assert [row["name"] for row in result["cases"][0]["rows"]] == ["full", "transformers:static"]


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "eval.speed.peer_transformers", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert benchmark.find_peer("transformers") is None
    assert "peer transformers is left out: " in capsys.readouterr().err


def test_an_unknown_variant_of_a_peer_is_refused():
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="transformers has no variant 'dynamic' .expected one of '', 'static'"):
        benchmark.find_peer("transformers:dynamic")
