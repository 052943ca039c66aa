"""Embedding, re-ranking and searching over HTTP: the application, its batching, the search page."""
