"""`data.limits`: how much of a source may be lost, or be trained otherwise than it should, before a run is stopped for it."""

from raytune.config.sections.section import Fraction, Section


class LimitsSection(Section):
    """Shares of the rows of a source above which nothing is trained: a run stops before any worker starts, with the first rows.
    What is below is said and trained. 1 waives a limit. They change nothing of what is trained."""

    lost: Fraction = 0.1
    """Rows that are not trained at all: bad ones that `on_bad_row: skip` leaves out, those without targets, those all of whose
    targets lie behind `max_length`, and those that `too_long: drop` leaves out."""
    no_target: Fraction = 0.05
    """Rows no part of which carries loss, so that `targets` and the roles or weights of the rows do not go together."""
    cut: Fraction = 0.05
    """Rows of chats that lose trained tokens to `max_length`: a model that sees answers end anywhere learns to end them anywhere.
    Plain text that `too_long` cuts has no answers, and is not counted."""
    unending: Fraction = 0.05
    """Documents whose last target is no special token: a model that is not trained to end its turn goes on until it is cut."""
    double_bos: Fraction = 0.01
    """Documents that begin with two beginning-of-text tokens, since rows or the template write what is added anyway. No prompt
    will begin so."""
    prompt_trained: Fraction = 0.05
    """Rows whose question is trained though `targets` does not ask for that: plain text that holds the turns of a chat, and
    answers that repeat all of their question first."""
    blank_answers: Fraction = 0.05
    """Rows with a trained answer, or a text, that is empty or nothing but white space."""


def waived() -> LimitsSection:
    """Limits that nothing exceeds."""
    return LimitsSection(**dict.fromkeys(LimitsSection.model_fields, 1.0))
