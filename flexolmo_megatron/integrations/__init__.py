"""Thin adapters that let other trainers run this package's models. Nothing here is imported by the rest of it."""
