"""What the model sees: rows -> Conversation -> chat template -> tokens and targets -> packed rows in an Arrow store -> Batch.

`sources` finds files, and the parts of them that can be read alone; `readers` reads their rows and names every bad one by file
and line; `split` holds rows out; `formats` turns a row into a `Conversation`, and `source_rows` all those of a source; `shaping`
says what is trained of one (system prompt, last exchanges, thoughts), and `long_chats` shortens one that does not fit; `template`
renders it and finds each turn's text (`template_text` says which template, `template_front` what a config puts in front of it,
`tokenizers` opens what its text is for); `text_encoder` knows where tokens lie in a text; `masking` says which of them are
targets, and how much each weighs; `tokenising` does all of that for one shard of the sources (`shards` has its tasks and
results); `packing` lays documents into rows, which `row_file` writes; `build` makes a store of them, at the address of its
`store_request` (`store_place`), where `store` reads it; `order` says which rows a step sees, as a function of the step;
`batches` makes tensors of them.

Only `batches` imports torch itself, and only `sources` may import `datasets`; of transformers, `tokenizers` opens tokenizers,
`rendering` applies templates and `template_front` reads their variables.
"""
