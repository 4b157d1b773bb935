"""How the bundled demo checkpoint is trained: tokenizer, packed batches, losses, optimiser, export, evaluation."""
