"""Several `litgpt` commands, one after the other, by the same processes: `ranks.py COMMANDS.json`, a list of lists of words."""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from litgpt.__main__ import main

    for words in json.loads(Path(sys.argv[1]).read_text()):
        if code := main(words):
            print(f"failed: {words}", file=sys.stderr)
            sys.exit(code)
