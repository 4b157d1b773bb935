"""Measuring: `eval.accuracy` scores answers, `eval.speed` times models, `eval.demo` draws pages."""
