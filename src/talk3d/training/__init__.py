"""Losses, the one loop, and checkpoints."""
