"""The measurements that README and docs quote, each repeated by ``python -m tests.benchmarks.NAME``."""
