"""The loader: the child process that reads checkpoint files and moves their bytes. The daemon's side is loads/."""
