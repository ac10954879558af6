"""Configuration: Hydra composes, pydantic checks, mistakes are told in sentences."""
