"""A subset of Fashion-MNIST that travels with the package; see README.md and LICENSE beside this file."""
