"""Parity: the statistics, the verdict, and the proof that the check can fail."""
