"""Merge an adapter into its base: a plan from headers, the arithmetic of one tensor, and the stream that writes it."""
