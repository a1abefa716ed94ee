"""YAML as programs other than raytune read it."""

from functools import partial
from typing import Any

import yaml

# libyaml's reading of the same language, in a tenth of the time.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
read_yaml = partial(yaml.load, Loader=_LOADER)
read_all_yaml = partial(yaml.load_all, Loader=_LOADER)
