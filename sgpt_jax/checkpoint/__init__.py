"""Checkpoints: from files to tensors, leaves and arrays on devices, and back."""
