"""The network: configuration, LLaMA decoder, CLIP vision tower, and what LLaVA puts between."""
