#!/usr/bin/env python3
"""Puts the report of `promptweave-lab reproduce` into docs/reproduction-tables.md, between the markers of its profile.
docs/reproduction.md has the prose, which is written by hand.

    python3 scripts/publish_reproduction.py small
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "reproduction-tables.md"
PICTURES = {
    "weights.svg": "weights of HGPrompt by target and source",
    "spearman.svg": "weights against what their sources are worth",
    "scalability.svg": "accuracy against the number of sources",
    "tsne.svg": "features of test images before and after",
}


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    profile = sys.argv[1]
    folder = ROOT / "reproduction" / "mini-vtab" / profile
    text = (folder / "report.md").read_text().strip()
    for name, label in PICTURES.items():
        if (folder / name).exists():
            text += f"\n\n![{label}](../{(folder / name).relative_to(ROOT)})"
    begin, end = f"<!-- {profile}: made by `make reproduce` -->", f"<!-- end of {profile} -->"
    before = DOCUMENT.read_text()
    # A profile that was not published before gets its section at the end.
    if begin not in before:
        before += f"\n## Profile {profile}\n\n{begin}\n\n{end}\n"
    if before.count(begin) != 1 or before.count(end) != 1:
        sys.exit(f"error: {DOCUMENT} does not have the markers `{begin}` and `{end}` exactly once each")
    head, tail = before.split(begin)[0], before.split(end)[1]
    DOCUMENT.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}")
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
