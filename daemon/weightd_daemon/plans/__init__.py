"""Plans: from files on disk to tensors whose equality is known, without a daemon."""
