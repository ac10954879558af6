"""The documentation site: the pages of ``docs``, what is generated from the code, and the code that they link to."""
