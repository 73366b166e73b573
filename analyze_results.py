"""Write the evaluation report, as Markdown and as one HTML file, from comparison_results.json or a folder of runs.

    python analyze_results.py [RESULTS] [--baseline NAME] [--benchmark FILE] [--out FOLDER]

RESULTS is comparison_results.json or a folder (default: out/finetune): that file in it, or else all runs below it.
`--help` lists all options; the code is in benchmarks/analysis.py.
"""

import sys

from benchmarks.analysis import main

if __name__ == "__main__":
    sys.exit(main())
