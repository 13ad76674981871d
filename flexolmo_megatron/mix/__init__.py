"""Recipes of data sets: which sources, which filters, and what is known about both; and running them."""
