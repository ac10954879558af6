"""Domain adaptation: the target is known, without labels or with a few. One file a method."""
