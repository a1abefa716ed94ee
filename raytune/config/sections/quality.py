"""`data.quality`: what is looked for among training rows, and what becomes of the rows that are found."""

from typing import Annotated, Literal

from pydantic import Field

from raytune.config.sections.section import Section

Policy = Literal["keep", "drop", "error", "ignore"]
FINDINGS = ("damaged_text", "leaks", "benchmark_overlaps", "contradictions", "exact_duplicates", "near_duplicates")
"""Keys of policies, and names of the counts in the report. A row that a former one leaves out is no original of a later one."""


class QualityPolicies(Section):
    """What is looked for among the training rows before they are tokenised; none of it without this section, which may be empty
    (`quality: {}`). Each finding is counted, with the first rows by file and line, and has a policy: `keep` trains such rows all
    the same, `drop` leaves them out, `error` stops before anything is tokenised, `ignore` does not look."""

    exact_duplicates: Policy = "keep"
    """Of rows with equal turns, tools or text, all but the first, over all training sources. Other columns do not count."""
    near_duplicates: Policy = "keep"
    """Of rows that share most of their runs of five words, and so do their last answers, all but the first. Case, white space,
    punctuation, system prompts and tools do not count. The share is an estimate (MinHash). Needs the extra `quality`."""
    near_similarity: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """From which share (of the runs of words that either row has) on two rows are near duplicates."""
    damaged_text: Policy = "keep"
    """Rows with a character that stands for lost text: U+FFFD, NUL, or a control character such as Windows' quotes become."""
    leaks: Policy = "keep"
    """Training rows that are held out for validation too: equal, nearly so, or with the same turns before the last answer."""
    contradictions: Policy = "keep"
    """Rows with the same turns before the last answer, but another last answer than a row among them; `drop` leaves out all of
    them, since nobody knows which is right. Where several answers are as good as each other, it is none."""
    benchmark_overlaps: Policy = "keep"
    """Rows that have a passage of `ngram_words` words in common with a row of `benchmarks`."""
    ngram_words: Annotated[int, Field(ge=5, le=100)] = 13
    """Words of such a passage, without case and punctuation. Rows of a benchmark with fewer words cannot be found, and passages
    that more than ten of its rows have are its wording and do not count."""
