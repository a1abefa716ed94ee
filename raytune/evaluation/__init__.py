"""What a model is worth: losses turned into perplexities, answers written and compared with the data.

`perplexity` and `text_metrics` are pure; `generation` runs a model; `compare` puts base and tuned side by side.
"""
