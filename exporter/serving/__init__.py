"""Serving bundles: `engine` batches requests continuously over one session; the HTTP on top of it speaks OpenAI's API."""
