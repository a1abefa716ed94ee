"""What the model sees: rows -> Conversation -> chat template -> tokens and targets -> packed rows in an Arrow store -> Batch.

Rooms, from the ground up; each imports those before it:

    conversations   a row as it is understood: turns (`conversation`), what is trained of one (`shaping`), which of its tokens are
                    targets and how much each weighs (`masking`), chats that do not fit (`long_chats`)
    files           where rows come from: found (`sources`), opened, read, and every bad row named by file and line (`readers`)
    formats         a row -> a `Conversation`: recognised, read, and rows made of rows
    templates       a `Conversation` -> text and tokens: the templates that we ship, and where each turn lies in any of them
    rows            sides of a split (`split`), all rows of a source (`source_rows`), the documents of tokens that they become
    quality         rows among each other: doubles, leaks, contradictions
    store           tokenised once: shards by any process (`tokenising`), laid into rows (`packing`), a store at the address of
                    what is in it (`build`, `request`); which rows a step sees, as a function of the step (`order`)
    stream          the same while training goes on, for inputs larger than memory and disk
    batches         rows -> tensors of a step, on each rank

`preview` shows rows as they are trained. Only `batches` imports torch itself, and only `files.sources` may import `datasets`; of
transformers, `templates.tokenizers` opens tokenizers, `templates.rendering` applies templates and `templates.front` reads their
variables.
"""
