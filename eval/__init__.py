"""Measuring answers: data sets, ANLS, the runner and its report; and the pages of the bundled demo."""
