"""One attempt after the other: who holds a run, its workers, what ended them, and what is done then."""
