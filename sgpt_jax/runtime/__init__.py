"""How programs run: threads, processes, caches, progress."""
