"""Checkpoints on disk: what loads, what is refused and in which words, and how much memory it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import weights.build
import weights.read
from minivlm import Sampling, UserError
from minivlm.model.config import VLMConfig
from minivlm.model.llava import Llava
from paths import ROOT
from weights import find_checkpoint, load, load_model
from weights.layout import by_canonical_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def single(tmp_path) -> Path:
    return tiny.write(tmp_path / "single")


@pytest.fixture
def sharded(tmp_path) -> Path:
    return tiny.write(tmp_path / "sharded", shards=3)


def refused(call, *said: str) -> None:
    """`call` raises a UserError of one line that says all of `said`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def canonical_tensors(model: Llava) -> dict[str, torch.Tensor]:
    return by_canonical_name(model.state_dict(), model.config.text)


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    tiny.dump(path, content)


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_header(path: Path, change) -> None:
    """Rewrite the header text of a safetensors file, its length with it; the data stays."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = change(raw[8:end].decode()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


# What loads


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("layout, shards, generation", [("a", 1, "old"), ("b", 3, "old"), ("c", 2, "new")])
def test_every_parameter_arrives(tmp_path, family, layout, shards, generation):
    folder = tiny.write(tmp_path / "model", family, layout=layout, shards=shards, generation=generation, seed=3)
    model = load_model(folder, device="cpu")
    written = tiny.make_tensors(tiny.make_config(family), seed=3)
    for name, tensor in canonical_tensors(model).items():
        assert torch.equal(tensor, written[name]), name
    assert all(not p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_checkpoint_s_tensors_are_the_model_s_memory(tmp_path, kv_heads):
    """Each once, one after the other, and nothing besides: so loading and sharing them takes no second copy."""
    model = load_model(tiny.write(tmp_path / "model", kv_heads=kv_heads), device="cpu")
    tensors = canonical_tensors(model)
    layer = "language_model.layers.1"
    attention, mlp = model.language_model.layers[1].self_attn, model.language_model.layers[1].mlp
    for parameter, parts in (
        (attention.qkv_proj.weight, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        (mlp.gate_up_proj.weight, ["mlp.gate_proj", "mlp.up_proj"]),
    ):
        address = parameter.data_ptr()
        for part in parts:
            assert tensors[f"{layer}.{part}.weight"].data_ptr() == address
            address += tensors[f"{layer}.{part}.weight"].nbytes
        assert address == parameter.data_ptr() + parameter.nbytes
    assert sum(tensor.nbytes for tensor in tensors.values()) == sum(p.nbytes for p in model.parameters())


def test_both_config_generations_say_the_same():
    for family in tiny.FAMILIES:
        old, new = (VLMConfig.from_dict(tiny.make_config(family, generation=g)) for g in ("old", "new"))
        assert old == new


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_dtypes_convert_as_torch_does(tmp_path, monkeypatch, stored, wanted):
    monkeypatch.setattr(weights.read, "_STAGE", 1000)  # so that most tensors take several reads
    folder = tiny.write(tmp_path / "model", dtype=stored)
    model = load_model(folder, device="cpu", dtype=wanted)
    written = tiny.make_tensors(tiny.make_config("next-vicuna"))
    for name, tensor in canonical_tensors(model).items():
        assert torch.equal(tensor, written[name].to(stored).to(getattr(torch, wanted))), name


def test_auto_is_float32_on_the_cpu(tmp_path):
    model = load_model(tiny.write(tmp_path / "model", dtype=torch.bfloat16), device="cpu")
    assert model.lm_head.weight.dtype == torch.float32


def test_generation_config_adds_end_tokens(single):
    tiny.dump(single / "generation_config.json", {"eos_token_id": [7, 9]})
    assert set(load_model(single, device="cpu").config.eos_token_ids) >= {7, 9}
    (single / "generation_config.json").unlink()
    assert load_model(single, device="cpu").config.eos_token_ids == (2,)


def test_symbolic_links_as_in_the_hub_cache(sharded, tmp_path):
    """A hub snapshot is a folder of links to ../../blobs; only names inside an index must stay inside."""
    snapshot = tmp_path / "hub" / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "hub" / "blobs"
    shutil.move(sharded, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    load_model(snapshot, device="cpu")


def test_tower_layers_that_nobody_reads_may_be_absent(single):
    def drop(tensors):
        for name in [n for n in tensors if ".encoder.layers.2." in n or "post_layernorm" in n]:
            del tensors[name]

    edit_tensors(single / SINGLE, drop)
    load_model(single, device="cpu")


def test_without_a_tokenizer_there_is_no_processor(tmp_path):
    bare = load(tiny.write(tmp_path / "bare", tokenizer=False), device="cpu")
    refused(lambda: bare.ask("What is this?"), "no tokenizer.json")
    whole = load(tiny.write(tmp_path / "whole"), device="cpu")
    assert len(whole.ask("What is this?", sampling=Sampling(max_new_tokens=2)).token_ids) == 2


def test_a_folder_wins_over_the_hub(tmp_path, monkeypatch):
    tiny.write(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("owner/name") == Path("owner/name")


# What is refused


def test_no_config(single):
    (single / "config.json").unlink()
    refused(lambda: load_model(single), "no config.json")


@pytest.mark.parametrize(
    "text, said",
    [("{", "not readable JSON"), ("[]", "expected object"), ('{"a":' * 100_000, "not readable JSON")],
)
def test_damaged_json(single, text, said):
    (single / "config.json").write_text(text)
    refused(lambda: load_model(single), "config.json", said)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c.pop("text_config"), "text_config is missing"),
        (lambda c: c.update(model_type="qwen2_vl"), "'qwen2_vl' is not supported"),
        (lambda c: c["text_config"].update(model_type="gemma"), "'gemma' is not supported"),
        (lambda c: c.update(image_token_index=10**6), "image_token_index 1000000"),
    ],
)
def test_config_that_is_not_supported(single, change, said):
    edit_json(single / "config.json", change)
    refused(lambda: load_model(single), "config.json", said)


def test_no_weights(single):
    (single / SINGLE).unlink()
    refused(lambda: load_model(single), "no model.safetensors")
    (single / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(lambda: load_model(single), "no model.safetensors", "pickle checkpoints")


def test_missing_shard(sharded):
    (sharded / SHARD).unlink()
    refused(lambda: load_model(sharded), SHARD, "missing")


@pytest.mark.parametrize(
    "file", ["../{}", "/etc/{}", "sub/{}", "..\\{}", "..", "", "{}\n", "*.safetensors", "model.bin"]
)
def test_index_that_points_outside(sharded, file):
    shutil.copy(sharded / SHARD, sharded.parent / SHARD)
    edit_json(sharded / INDEX, lambda c: c["weight_map"].update({"image_newline": file.format(SHARD)}))
    refused(lambda: load_model(sharded), INDEX, "image_newline", "inside the folder")


@pytest.mark.parametrize(
    "weight_map, said",
    [
        (..., "weight_map is missing"),
        ({}, "weight_map is empty"),
        ([], "weight_map: expected object, got array"),
        ({"image_newline": None}, "weight_map[...]: expected str, got null"),
        ({"image_newline": [SHARD]}, "weight_map[...]: expected str, got array"),
    ],
)
def test_index_without_a_map(sharded, weight_map, said):
    tiny.dump(sharded / INDEX, {} if weight_map is ... else {"weight_map": weight_map})
    refused(lambda: load_model(sharded), INDEX, said)


def test_index_names_a_tensor_that_is_not_there(sharded):
    edit_json(sharded / INDEX, lambda c: c["weight_map"].update({"ghost.weight": SHARD}))
    refused(lambda: load_model(sharded), SHARD, "ghost.weight")


def test_tensor_in_two_shards(sharded):
    lost = load_file(sharded / "model-00001-of-00003.safetensors")
    name = next(iter(lost))
    edit_tensors(sharded / SHARD, lambda tensors: tensors.update({name: lost[name]}))
    refused(lambda: load_model(sharded), name, "also in model-00001-of-00003.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_truncated(single, keep):
    size = (single / SINGLE).stat().st_size
    os.truncate(single / SINGLE, int(size * keep) if isinstance(keep, float) else keep % size)
    refused(lambda: load_model(single), SINGLE, "truncated")


def test_trailing_data(single):
    with open(single / SINGLE, "ab") as file:
        file.write(b"x")
    refused(lambda: load_model(single), SINGLE, "trailing data")


@pytest.mark.parametrize("bit", [0, 3, 8, 20, 40, 63])
def test_flipped_header_length(single, bit):
    raw = bytearray((single / SINGLE).read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    (single / SINGLE).write_bytes(raw)
    refused(lambda: load_model(single), SINGLE, "header")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda text: "\x00" + text[1:], "not a readable"),
        (lambda text: "[]", "not a readable"),
        (lambda text: text.replace("{", '{"a": 1,', 1), "not a readable"),
        (lambda text: text.replace('"shape":[64]', '"shape":[65]', 1), "does not fill"),
        (lambda text: text.replace('"shape":[64]', '"shape":[-64]', 1), "shape"),
        (lambda text: text.replace('"shape":[64]', '"shape":64', 1), "not a readable"),
        (lambda text: text.replace('"shape":[64]', '"shape":[64.0]', 1), "shape"),
        (lambda text: text.replace('"data_offsets"', '"offsets"', 1), "data_offsets"),
        (lambda text: text.replace("mlp.up_proj", "mlp.gate_proj", 1), "there twice"),
        (lambda text: "[" * 100_000, "not a readable"),
        (
            lambda text: "{" + '"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},' * 100_000 + text[1:],
            "twice",
        ),
        (lambda text: text.replace('"shape":[64]', '"shape":[true]', 1), "shape[0]: expected int"),
        (lambda text: text.replace('"shape":[64]', f'"shape":[{10**400}]', 1), "shape[0]: expected int <"),
        (lambda text: text.replace('"shape":[64]', f'"shape":[{"9" * 5000}]', 1), "not a readable"),
        (
            lambda text: text.replace('"shape":[64]', f'"shape":{[1] * 1000}', 1),
            "shape: expected array of length <= 8",
        ),
        (
            lambda text: text.replace('"data_offsets":[', '"data_offsets":[0,', 1),
            "data_offsets: expected array of length 2",
        ),
        (lambda text: text.replace('"dtype":"F32"', '"dtype":[]', 1), "dtype: expected str"),
        (lambda text: text + " " * (1 << 24), "expected at most 16777216"),
    ],
)
def test_damaged_header(single, change, said):
    edit_header(single / SINGLE, change)
    refused(lambda: load_model(single), SINGLE, said)


def test_overlapping_tensors(single):
    def overlap(text):
        header = json.loads(text)
        header["image_newline"]["data_offsets"] = [0, 256]
        return json.dumps(header)

    edit_header(single / SINGLE, overlap)
    refused(lambda: load_model(single), SINGLE, "starts at byte")


@pytest.mark.parametrize("dtype, said", [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_wrong_dtype(single, dtype, said):
    edit_tensors(single / SINGLE, lambda tensors: tensors.update(image_newline=tensors["image_newline"].to(dtype)))
    refused(lambda: load_model(single), "image_newline", said, "expected F32, F16, BF16")


def test_wrong_shape(single):
    edit_tensors(single / SINGLE, lambda tensors: tensors.update(image_newline=torch.zeros(63)))
    refused(lambda: load_model(single), "image_newline", "[63]", "[64]")


@pytest.mark.parametrize("part, rows", [("self_attn.k_proj", 32), ("self_attn.q_proj", 64), ("mlp.up_proj", 96)])
def test_parts_of_one_matrix_are_named_as_on_disk(single, part, rows):
    """The decoder has q, k and v in one matrix, and gate and up in another; a checkpoint does not."""
    name = f"layers.1.{part}.weight"
    on_disk = f"language_model.model.{name}"
    tensors = load_file(single / SINGLE)
    one_more = torch.zeros(rows + 1, 64)
    for changed, *said in (
        ({on_disk: one_more}, f"{on_disk} has shape [{rows + 1}, 64], config.json asks for [{rows}, 64]"),
        ({on_disk: None}, f"missing 1: language_model.{name}"),
        ({f"model.language_model.{name}": tensors[on_disk].clone()}, on_disk, f"model.language_model.{name}", "same"),
    ):
        save_file({key: t for key, t in (tensors | changed).items() if t is not None}, single / SINGLE)
        refused(lambda: load_model(single), *said)


def test_a_checkpoint_with_our_names_is_no_hugging_face_checkpoint(single):
    def change(tensors):
        layer = "language_model.model.layers.0.mlp"
        parts = [tensors.pop(f"{layer}.{part}_proj.weight") for part in ("gate", "up")]
        tensors[f"{layer}.gate_up_proj.weight"] = torch.cat(parts)

    edit_tensors(single / SINGLE, change)
    refused(
        lambda: load_model(single), "missing 2: ", "mlp.gate_proj.weight", "unexpected 1: ", "mlp.gate_up_proj.weight"
    )


def test_missing_and_left_over(single):
    def change(tensors):
        tensors["extra.weight"] = tensors.pop("image_newline")

    edit_tensors(single / SINGLE, change)
    refused(lambda: load_model(single), "missing 1: image_newline", "unexpected 1: extra.weight")


def test_many_missing_are_counted(single):
    def change(tensors):
        for name in [n for n in tensors if "language_model.model.layers" in n]:
            del tensors[name]

    edit_tensors(single / SINGLE, change)
    refused(lambda: load_model(single), "missing 18: language_model.layers.0.", "and 14 more")


def test_tower_layer_that_cannot_exist(single):
    name = "vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias"
    edit_tensors(single / SINGLE, lambda tensors: tensors.update({name: torch.zeros(48)}))
    refused(lambda: load_model(single), f"unexpected 1: {name}")


def test_the_same_tensor_in_two_layouts(single):
    edit_tensors(
        single / SINGLE,
        lambda tensors: tensors.update({"lm_head.weight": tensors["language_model.lm_head.weight"].clone()}),
    )
    refused(lambda: load_model(single), "lm_head.weight and", "the same tensor")


def test_a_file_that_shrinks_while_it_is_read(single):
    stored = weights.read.read_headers(single)
    last = max(stored.values(), key=lambda tensor: tensor.start)
    os.truncate(single / SINGLE, last.start + 1)
    target = torch.empty(last.shape, dtype=weights.read.DTYPES[last.dtype])
    refused(lambda: weights.read.fill([(last, target)], lambda _: None), SINGLE, last.name)
    (single / SINGLE).unlink()
    refused(lambda: weights.read.fill([(last, target)], lambda _: None), SINGLE, "no such file")


def test_the_tokenizer_is_checked_before_the_weights_are_read(single, monkeypatch):
    monkeypatch.setattr(weights.build, "fill", lambda *_: pytest.fail("loading started"))
    edit_json(single / "config.json", lambda c: c.update(image_token_index=17))
    refused(lambda: load(single, device="cpu"), "image_token_index is 17")


def test_what_does_not_fit_is_said_before_loading(single, monkeypatch):
    monkeypatch.setattr(weights.build, "_free_bytes", lambda device: 500_000)
    monkeypatch.setattr(weights.build, "fill", lambda *_: pytest.fail("loading started"))
    refused(lambda: load_model(single, device="cpu"), "take 0.61 MB in float32", "cpu has 0.50 MB free")


@pytest.mark.parametrize(
    "device", ["tpu", "cuda:99", "cpu:0:1", "", "cuda:99999999999999999999", "cuda:٣", "cuda:00", "cpu\n"]
)
def test_device(single, device):
    refused(lambda: load_model(single, device=device), f"device {device!r}")


def test_a_process_that_may_not_allocate_the_weights(single, monkeypatch):
    def full(*size, device=None, **options):
        if device == torch.device("cpu"):
            raise RuntimeError("[enforce fail] you tried to allocate 1 bytes\nsecond line")
        return empty(*size, device=device, **options)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", full)
    refused(lambda: load_model(single, device="cpu"), "the weights take 0.61 MB", "enforce fail")


def test_dtype_name(single):
    refused(lambda: load_model(single, dtype="int8"), "'int8'", "bfloat16")


# Memory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory(tmp_path):
    """Peak resident memory < the weights in the target dtype + 1 GiB, for 2 GB of float32 on disk."""
    shape = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=27, num_attention_heads=16, vocab_size=32064
    )
    folder = tiny.write(tmp_path / "large", shards=3, kv_heads=16, tokenizer=False, text_config=shape)
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) > 2e9
    program = (
        "import sys; from pathlib import Path; from weights import load_model\n"
        "model = load_model(Path(sys.argv[1]), device='cpu', dtype=sys.argv[2])\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(sum(p.nbytes for p in model.parameters()), int(peak.split()[1]) * 1024)\n"
    )
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", program, str(folder), dtype]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        size, peak = map(int, done.stdout.split())
        assert size > (2e9 if dtype == "float32" else 1e9)
        assert peak < size + 2**30, f"{dtype}: {peak / 2**20:.0f} MiB for {size / 2**20:.0f} MiB of weights"
