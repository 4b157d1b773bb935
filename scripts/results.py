"""Measure what the documentation shows of accuracy and write docs/results.md.

See eval/accuracy/results_page.py.
"""

from eval.accuracy.results_page import write_results
from minivlm.app.cli import run

if __name__ == "__main__":
    run(write_results)
