"""Domain generalization: the target is never seen before the test. One file a method."""
