"""Settings: their names and meanings, their sources, and the notation of sizes and shares."""
