"""Many variants of one run, early losers stopped. A trial is a value (`trial`), drawn from a `space`; other modules run it."""
