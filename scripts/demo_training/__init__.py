"""How the bundled demo checkpoint is made: tokenizer, packed batches, losses, optimisers, export and evaluation."""
