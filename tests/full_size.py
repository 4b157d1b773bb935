"""One run at full size: LLaVA-NeXT in the shape of vicuna-7B with random weights, in bfloat16, on the CPU.

    PYTHONPATH=tests/helpers python tests/full_size.py [--layers 32]

It writes about 14 GB of sharded safetensors to a temporary folder. A second process loads them, answers a question
about an image with 4 tokens, and prints times and peak memory. It is not part of the suite, since it takes minutes,
14 GB of disk and 17 GB of memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

import tiny
import weights
from minivlm import Sampling

SHARD_BYTES = 2 << 30


def write(folder: Path, layers: int) -> None:
    """Write a checkpoint like the hub's, except that its weights are random and its tokenizer has few tokens."""
    config = tiny.make_config(
        "next-vicuna",
        kv_heads=32,
        dtype=torch.bfloat16,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        text_config=dict(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=layers,
            num_attention_heads=32,
            max_position_embeddings=4096,
            vocab_size=32064,
        ),
        vision_config=dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
    )
    tiny.dump(folder / "config.json", config)
    tiny.write_tokenizer(folder, "next-vicuna")
    tiny.write_processor(folder, config)
    write_shards(folder, config)


def write_shards(folder: Path, config: dict) -> None:
    """Write random weights, a shard at a time, and the index."""
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in tiny.shapes(config):
        tensor = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.03, 0.03)
        shard[tiny.on_disk(name, "a")] = tensor + 1 if "norm" in name and name.endswith("weight") else tensor
        if sum(stored.nbytes for stored in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    tiny.dump(folder / "model.safetensors.index.json", {"weight_map": index})


def load_and_ask(folder: Path) -> None:
    """Load the checkpoint, answer one question, and print what that took."""
    begin = time.perf_counter()
    vlm = weights.load(folder, device="cpu", dtype="bfloat16")
    loaded = time.perf_counter()
    answer = vlm.ask("What is this?", [Image.new("RGB", (336, 336), "white")], sampling=Sampling(max_new_tokens=4))
    done = time.perf_counter()
    size = sum(parameter.nbytes for parameter in vlm.model.parameters())
    print(f"weights {size / 1e9:.2f} GB, loaded in {loaded - begin:.1f} s")
    print(f"tokens {answer.token_ids} in {done - loaded:.1f} s")
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(f"peak resident memory {int(peak.split()[1]) * 1024 / 1e9:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="decoder layers; fewer for a quick try")
    parser.add_argument("--folder", type=Path, help="load this checkpoint instead of writing one")
    args = parser.parse_args()
    if args.folder:
        return load_and_ask(args.folder)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        write(Path(folder), args.layers)
        print(f"written in {time.perf_counter() - begin:.1f} s", flush=True)
        subprocess.run([sys.executable, __file__, "--folder", folder], check=True)


if __name__ == "__main__":
    main()
