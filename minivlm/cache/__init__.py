"""The explicit KV cache and the policies that decide what it holds."""
