"""What measures accuracy: data sets, metrics, the runner and its folders, reports, comparisons."""
