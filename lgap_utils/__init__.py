"""Language Guided Adversarial Purification: the package under the notebooks. It imports no heavy library."""

# The public address, named here alone: tools/badges.py writes it into badges and notebooks.
REPOSITORY = "https://github.com/OWNER/lgap"
__version__ = "0.1.0"
