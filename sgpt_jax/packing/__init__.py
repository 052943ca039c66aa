"""From token ids to batches of few shapes."""
