"""Tokenised once: shards, built by any process and resumed, packed into a store at the address of what is in it."""
