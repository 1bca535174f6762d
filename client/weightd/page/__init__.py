"""Pages: the drawing code (`assets/`) of the report of `weightd plan --html` and of `weightd web`, and its documents."""
