"""From a folder of weights to a model that is ready to train, and from trained weights back to a folder.

`load.load_model` puts together what the other files own: `attention` (documents of a packed row do not see each other),
`quantize` (bases in 4 or 8 bits), `packed_experts` (the part of them that transformers does not quantise), `adapters` (which
parameters are trained). `export` writes what was trained in the formats of transformers and PEFT; `merge` lays an adapter into
its base, tensor by tensor. Imports transformers, peft and bitsandbytes; knows neither DeepSpeed nor Ray.
"""
