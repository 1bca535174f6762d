"""State that survives the daemon: memory, manifests and root record in the descriptor store; digest index on disk."""
