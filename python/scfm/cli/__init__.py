"""The command line: one file a verb. ``scfm --help`` lists them."""
