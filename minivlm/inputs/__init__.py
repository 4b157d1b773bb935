"""What a user gives, made into what the network takes: images, chat templates, tokenizers, the processor."""
