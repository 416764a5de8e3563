"""Parts of what a run writes: tables of numbers, words for a methods section, what to cite."""
