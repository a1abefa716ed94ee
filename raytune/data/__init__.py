"""What the model sees: rows -> Conversation -> chat template -> tokens and targets -> packed rows in an Arrow store -> Batch.

`sources` reads rows and names every bad one by file and line; `formats` turns a row into a `Conversation`; `template` renders it and
finds each turn's text; `masking` says which tokens are targets; `tokenising` does all of that for one shard of the sources; `split`
holds rows out; `packing` lays documents into rows; `store` keeps them content-addressed on disk; `order` says which rows a step sees,
as a function of the step; `batches` makes tensors of them. Nothing here imports torch except `batches`, and only `sources` may
import `datasets`: a training worker opens a store and makes batches, and pays for no more than that.
"""
