"""Serving bundles: `engine` batches requests continuously over one session; HTTP on top speaks OpenAI's API."""
