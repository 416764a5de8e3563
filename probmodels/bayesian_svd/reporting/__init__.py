"""Parts of what a run writes: sections of its report, tables of numbers, words for a methods section, what to cite."""
