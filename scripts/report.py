"""Draw the report of one or more runs: python scripts/report.py RUN_DIR [RUN_DIR ...]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nemo_ssopd.observe.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description="Write report.png and report.html into each run's folder.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder with a metrics.jsonl")
    for run_dir in parser.parse_args().run_dirs:
        try:
            write_report(run_dir)
        except ValueError as error:
            sys.exit(f"report: {error}")
        print(f"{run_dir / 'report.png'}\n{run_dir / 'report.html'}")


if __name__ == "__main__":
    main()
