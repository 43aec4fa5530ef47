"""Checks register as their module is imported, once per process: before any test swaps the registry for its own."""

from labs_lib.lab import check

for lab in check.labs_with_checks():
    check.load_checks(lab)
