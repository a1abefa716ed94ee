"""Parts of a model that we find, change or replace: layers, norms, experts, rows of tokens, quantised weights."""
