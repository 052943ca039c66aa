"""This project beside torch, sentence-transformers and FAISS, in turn in one process."""
