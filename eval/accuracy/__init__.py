"""Measuring accuracy: data sets, tasks, metrics, the runner and its folders, reports and comparisons."""
