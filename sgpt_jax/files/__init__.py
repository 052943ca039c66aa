"""Reading and writing files: lines, corpora, judgements, runs."""
