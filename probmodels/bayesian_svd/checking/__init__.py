"""What would make the modes of a record wrong: halves that differ, single times, cycles that were left in."""
