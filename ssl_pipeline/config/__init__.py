"""Configuration: Hydra composes, pydantic checks, mistakes are reported in sentences."""
