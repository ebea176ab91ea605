"""Training protocols and suites in YAML, installed as ``kdzoo.configs``."""
