"""Write one table of several evaluations: python scripts/eval_table.py RUN_DIR [RUN_DIR ...] [--output DIR]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nemo_ssopd.evaluation.table import write_table


def main() -> None:
    parser = argparse.ArgumentParser(description="Write table.md, table.json and table.png of finished evaluations.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="run_dir of scripts/evaluate.py")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder to write into (this one)")
    arguments = parser.parse_args()
    try:
        write_table(arguments.run_dirs, arguments.output)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print((arguments.output / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
