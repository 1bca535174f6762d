"""What survives the daemon: memory, manifests and the root record in the descriptor store; the digest index on disk."""
