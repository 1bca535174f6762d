"""Settings: their names and meaning, where they come from, and how people write sizes and shares."""
