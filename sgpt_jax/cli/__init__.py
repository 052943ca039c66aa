"""The command `sgpt`."""
