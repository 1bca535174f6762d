"""Pages: the drawing code in `assets/`, and the documents that it draws: a plan's report, and `weightd web`."""
