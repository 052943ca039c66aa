"""Prints the tests, or whole files, that a run of pytest skipped, one a line; the run's junit XML is the argument."""

import sys
import xml.etree.ElementTree as ElementTree

for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
    skipped = case.find("skipped")
    if skipped is None or "GPU" in (skipped.get("message") or ""):
        continue
    file, name = case.get("file"), case.get("name")
    # A file that is skipped when it is collected stands there without a class.
    print(f"{file}::{name}" if case.get("classname") else file)
