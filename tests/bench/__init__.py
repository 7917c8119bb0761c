"""Load generator and benchmark; started by hand (`make bench`), not collected by pytest."""
