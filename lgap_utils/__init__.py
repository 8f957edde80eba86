"""Language Guided Adversarial Purification: the machinery under the notebooks. Importing it loads no heavy library."""

REPOSITORY = "https://github.com/OWNER/lgap"  # the one place that names the public address; the badges are tested against it
__version__ = "0.1.0"
