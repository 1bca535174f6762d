"""The catalogue of a running fleet: follows its agents, answers where checkpoints belong, and orders fetches."""
