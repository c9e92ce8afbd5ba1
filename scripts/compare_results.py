"""Say which differences between evaluations exceed the noise: `python scripts/compare_results.py A.json B.json`.

Each place is a file that recipes/eval.py wrote (runs/x/results/base_eval.json, or its --output), or a run folder;
several of either with commas between are training seeds of one system. Every further one is compared with the first.
"""

import argparse

from chatmodel.evaluation.comparison import load_system, render_comparison
from chatmodel.runtime import entry_point


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="the system that the others are compared with")
    parser.add_argument("others", nargs="+", help="one or more others")
    args = parser.parse_args()
    first = load_system(args.first)
    print("\n\n".join(render_comparison(first, load_system(other)) for other in args.others))


if __name__ == "__main__":
    entry_point(main)
