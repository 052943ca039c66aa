"""The decoder: pure functions of arrays, without files and without family names."""
