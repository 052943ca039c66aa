"""From texts to token ids: the only tokenising code."""
