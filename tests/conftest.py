"""Properties are checked on the same examples in every run, nothing is written beside the tests, and the tests' small
tensors are not shared out among threads, which would mostly wait for one another."""

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "minivlm", derandomize=True, database=None, deadline=None, max_examples=200, suppress_health_check=list(HealthCheck)
)
settings.load_profile("minivlm")

torch.set_num_threads(1)
