"""Where weights come from: a hub or a directory, safetensors or `.bin`, read lazily; the adapter, typed."""
