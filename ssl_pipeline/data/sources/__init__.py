"""Sources, one file each: `data=NAME` is the module NAME."""
