"""What survives the daemon: segments, manifests and the root record in the service manager's descriptor store, and the digest index on disk."""
