"""From a folder of weights to a model that is ready to train, and from trained weights back to a folder.

`load.load_model` puts together what the rooms own; `inference` is for saved models; `meta_shape` counts what no reader of a plan
knows. Imports transformers, peft and bitsandbytes; knows neither DeepSpeed nor Ray. Rooms, from the ground up:

    attention   documents of a packed row do not see each other, also where a row is divided among ranks
    parts       what we find or change in a model: layers, norms, experts, rows of tokens, bases in 4 or 8 bits
    adapters    which parameters are trained, by PEFT and beside it: a file per method
    files       a model as files: told by headers, checked, written whole or not at all in the formats of transformers and PEFT
    gguf        a whole model as one GGUF file
    merging     adapters laid into a base, tensor by tensor, or into one another
"""
