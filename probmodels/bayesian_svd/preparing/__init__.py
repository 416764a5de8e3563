"""Steps from a labelled field to a problem: the matrix, options, reduced data, and what a result keeps."""
