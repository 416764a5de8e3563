"""Which part of a field is read from files, and how: at once, or in chunks."""
