"""From what a user gives to what the network takes: images, chat templates, tokenizers, the processor."""
