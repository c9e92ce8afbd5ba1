"""Where do the tasks for lm_eval lie? Prints the folder for `--include_path`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.stdout.write(f"{Path(__file__).parent}\n")
