"""Measuring: `eval.accuracy` scores answers, `eval.speed` times the model, `eval.demo` draws the demo's pages."""
