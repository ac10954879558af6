"""Pretext tasks, one file each: `pretext=NAME` is the module NAME."""
