"""Publishing: reads a checkpoint's files once, names it by their bytes, and keeps what its agent needs to serve it."""
