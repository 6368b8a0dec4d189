"""Running bundles: `load.load` opens one, `runner.Runner` computes, `generate.generate` answers a prompt."""
