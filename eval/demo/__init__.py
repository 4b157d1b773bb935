"""The pages of the bundled demo checkpoint, drawn by code."""
