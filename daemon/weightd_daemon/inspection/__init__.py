"""What monitors ask: answers of InspectionService. Nothing here changes anything, the order of eviction included."""
