"""Measuring speed: model shapes with random weights, contenders that take turns, and reports."""
