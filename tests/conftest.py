"""Properties are checked on the same examples in every run, and nothing is written beside the tests."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "minivlm", derandomize=True, database=None, deadline=None, max_examples=200, suppress_health_check=list(HealthCheck)
)
settings.load_profile("minivlm")
