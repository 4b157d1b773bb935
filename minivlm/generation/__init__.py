"""From a prompt to tokens and text: prefill and decode steps, sampling, torch.compile, and the `VLM` that answers."""
