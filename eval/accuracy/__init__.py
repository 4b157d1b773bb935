"""Measuring accuracy: data sets, tasks, metrics, the runner and its folders, reports."""
