"""The typed config tree, and the files and flags that it is read from."""

from base.config.config import Config
from base.config.files import Override, load_config, validate

__all__ = ["Config", "Override", "load_config", "validate"]
