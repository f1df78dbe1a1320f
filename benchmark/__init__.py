"""The shared benchmark: runs suites of the scripts, and turns what they logged into tables and figures."""
