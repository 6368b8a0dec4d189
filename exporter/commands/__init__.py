"""The commands: each is its options, and one call of the function of the same name."""
