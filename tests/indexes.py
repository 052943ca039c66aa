"""An encoder for indexes of tests."""

import hashlib

import numpy as np


def encode(texts):
    """A vector of 16 numbers from a hash of the text; the same every time."""
    digests = [hashlib.blake2b(text.encode(), digest_size=64).digest() for text in texts]
    return np.array([np.frombuffer(digest, "<i4") for digest in digests], np.float32) / 2**31
