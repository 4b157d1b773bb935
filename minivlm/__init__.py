"""minivlm: LLaVA-1.5 and LLaVA-NeXT in plain PyTorch, with A-VL in an explicit KV cache."""
