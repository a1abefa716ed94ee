"""A page for each kind of config problem: why it is refused and what to write instead. Shown by `raytune explain E101`."""

from dataclasses import dataclass

from raytune.config.problems import (
    BAD_OVERRIDE,
    CONFLICT,
    DUPLICATE_KEY,
    MISSING_KEY,
    NO_SUCH_FILE,
    NOT_POSSIBLE,
    NOT_YAML,
    REFUSED_YAML,
    SECRET_VALUE,
    UNKNOWN_KEY,
    UNREADABLE,
    WRONG_VALUE,
)


@dataclass(frozen=True, slots=True)
class ErrorPage:
    title: str
    cause: str
    fix: str
    wrong: str
    """YAML, or a command line that starts with `raytune`."""
    right: str


ERROR_PAGES = {
    UNKNOWN_KEY: ErrorPage(
        "unknown key",
        "The file has a key that raytune does not know, or knows elsewhere. A mistyped key would otherwise be ignored, and the "
        "run would train with the default.",
        "Take the suggestion, or list the keys of the section with `raytune explain SECTION`. Names of Hugging Face, Axolotl and "
        "LLaMA-Factory are recognised and translated in the suggestion.",
        "training:\n  lr: 2e-4",
        "training:\n  learning_rate: 2e-4",
    ),
    DUPLICATE_KEY: ErrorPage(
        "duplicate key",
        "A key is written twice in one section. Most YAML readers silently keep the last one.",
        "Keep one of the two lines.",
        "training:\n  seed: 1\n  seed: 2",
        "training:\n  seed: 2",
    ),
    MISSING_KEY: ErrorPage(
        "missing key",
        "A section needs a key that has no default, or a run does not say what it trains (model.base) and on what (data.train). "
        "The built-in toy is trained where it is asked for by name only.",
        "Add the key.",
        "data:\n  train:\n    format: text",
        "data:\n  train:\n    path: demo:train\n    format: text",
    ),
    WRONG_VALUE: ErrorPage(
        "value not allowed",
        "The value has the wrong type, is out of range, or is not one of the allowed words. Nothing is converted silently: "
        "quoted numbers and `yes` are text; numbers are finite.",
        "Write a value of the kind that the message names; `raytune explain KEY` shows an example.",
        "adapter:\n  rank: 16a",
        "adapter:\n  rank: 16",
    ),
    CONFLICT: ErrorPage(
        "keys that contradict each other",
        "Each value is fine alone, but together they cannot be done, or nothing would read one of them.",
        "The message names the keys; change or leave out one of them.",
        "training:\n  warmup_steps: 100\n  max_steps: 10",
        "training:\n  warmup_steps: 5\n  max_steps: 10",
    ),
    NOT_YAML: ErrorPage(
        "not valid YAML",
        "The text cannot be read as YAML: a tab in the indentation, an open quote or bracket, or uneven indentation.",
        "Indent with spaces, and put text that contains `: ` or starts with a special character in quotes.",
        "training:\n\tseed: 1",
        "training:\n  seed: 1",
    ),
    UNREADABLE: ErrorPage(
        "file that cannot be read",
        "The config file does not exist, is a folder, is not UTF-8 text, or is larger than 1 MiB.",
        "Check the path, and save the file as UTF-8.",
        "raytune check no-such-file.yaml",
        "raytune check run.yaml",
    ),
    REFUSED_YAML: ErrorPage(
        "YAML feature that is not allowed",
        "Tags (`!!python/object`, `!include`), merge keys (`<<`), several documents in one file, keys that are not plain text, "
        "deep nesting and many aliases are refused: they make a config do or mean more than it shows.",
        "Write values plainly; share settings between runs with a second file: `raytune check base.yaml overlay.yaml`.",
        "training:\n  seed: !!int 1",
        "training:\n  seed: 1",
    ),
    BAD_OVERRIDE: ErrorPage(
        "override that cannot be applied",
        "An override on the command line is not `key.sub=value`, or names a position that a list does not have.",
        "Write the dotted key, `=`, and the value as in YAML. Positions in lists count from 0.",
        "raytune check run.yaml data.train.7.path=rows.jsonl",
        "raytune check run.yaml data.train.0.path=demo:train",
    ),
    SECRET_VALUE: ErrorPage(
        "secret in a config",
        "A key or a value looks like an access token, a key, or a URL with a password. Configs are copied into run folders, logs "
        "and reports, so it would leak.",
        "Log in on the machines instead (`hf auth login`, a cloud role, a mounted file); revoke a token that was shared.",
        "model:\n  base: hf_" + "a" * 24,  # not as one word: `submit` looks into these files, too
        "model:\n  base: demo",
    ),
    NO_SUCH_FILE: ErrorPage(
        "file that a key names does not exist",
        "A local file of rows, a template or a model folder is not on this machine. Relative paths start at the working "
        "directory. With `cluster.address` set nothing is checked, since files then lie where the cluster is.",
        "Correct the path, or run the command where the file is.",
        "data:\n  train: no-such-rows.jsonl",
        "data:\n  train: demo:train",
    ),
    NOT_POSSIBLE: ErrorPage(
        "cannot be done with this model, these rows or these machines",
        "The config is valid, but what it names does not allow it: rows that cannot be read or fit no format, a tokenizer "
        "without a template, adapter targets that the model does not have, more tokens than it has positions, workers that the "
        "machines do not hold, a folder that cannot be written. `check` looks at all of that without a cluster; with `--fast` it "
        "does not.",
        "The message names the key and the nearest setting that works.",
        "data:\n  max_length: 1000000",
        "data:\n  max_length: 512",
    ),
}
