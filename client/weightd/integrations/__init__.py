"""Load models with frameworks' own code on shared memory: one module per framework."""

NAME = "weightd"
"""What command lines of serving engines call us: a load format of vLLM's, an option of SGLang's loader."""
