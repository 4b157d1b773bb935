"""How the bundled demo checkpoint is made: tokenizer, batches, losses, optimisers, export."""
