"""The KV policies, one file each."""
