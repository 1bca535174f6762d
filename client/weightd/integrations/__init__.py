"""Load models with frameworks' own code on shared memory: one module per framework."""
