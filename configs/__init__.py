"""Training protocols and suites in YAML, what was published under them in CSV, installed as ``kdzoo.configs``."""
