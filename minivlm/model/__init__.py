"""The network: configuration, LLaMA decoder, CLIP vision tower, LLaVA's projector and the packing of images."""
