"""From a user's text and images to the network's inputs: images, templates, tokenizers, processor."""
