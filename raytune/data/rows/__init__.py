"""Rows of sources: on which side of a split they lie, and the documents of tokens that they become."""
